"""Rewards computed in child processes, with a time limit for each sample."""

import os
import pickle
import signal
import sys
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from threading import Lock
from types import TracebackType
from typing import Any, Self

START_SECONDS = 120.0  # to import the function and prepare; generous, it only keeps a run from waiting for ever
GRACE_SECONDS = 5.0  # beyond the limit, after which a worker ends by itself: nobody is there to end it
POLL_SECONDS = 2.0  # after which a worker without work looks whether its parent still lives
MOST_CHUNK = 64  # samples in a message
SPAWN = get_context("spawn")  # a fork would copy locks that torch's threads hold

Samples = Sequence[Sequence[Any]]


class RewardWorkers:
    """Processes that compute a function for many samples: whatever one sample does, the others get their value.

    A sample that runs over the limit, ends its process or raises scores 0, and one ``RuntimeWarning`` for the batch
    counts such samples. Processes start with the first batch; one that ended is replaced. ``close``, a ``with`` block,
    garbage collection and the end of the interpreter end them, and they end by themselves when their parent is gone.
    As always with processes that start afresh, a script keeps its own start behind ``if __name__ == "__main__"``.

    Args:
        function: Reward of a sample, called as ``function(*sample)``; a function that a module holds by name.
        processes: Number of workers; 0 computes in this process, without a limit.
        limit: Seconds of wall-clock time for each sample.
        prepare: Called once in each worker, before its first sample and outside the limit: for slow imports.
    """

    def __init__(
        self,
        function: Callable[..., float],
        processes: int = 2,
        limit: float = 5.0,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        if processes < 0:
            raise ValueError(f"need a number of processes of at least 0, got {processes}")
        if not limit > 0:
            raise ValueError(f"need a limit of more than 0 seconds, got {limit}")
        if processes:
            _check_importable(function, prepare)
        self.function, self.processes, self.limit, self.prepare = function, processes, limit, prepare
        self._workers: list[_Worker] = []
        self._lock = Lock()
        self._closing = weakref.finalize(self, _end, self._workers, os.getpid())

    def evaluate(self, samples: Samples) -> list[float]:
        """Rewards of samples, in their order; calls from several threads take turns.

        Args:
            samples: The function's arguments, for each sample.

        Raises:
            ValueError: The pool is closed, or another thread closes it meanwhile.
            RuntimeError: A worker cannot start.
        """
        with self._lock:
            self._check_open()
            batch = _Batch(samples, self.processes)
            try:
                (self._run if self.processes else self._run_here)(batch)
            except BaseException:
                _end(self._workers, os.getpid())  # what they still compute belongs to no batch
                raise
        if batch.failures:
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(batch.failures.items()))
            message = f"{batch.failures.total()} of {len(samples)} rewards are 0 because computing them failed: {told}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return batch.rewards

    def close(self) -> None:
        """End the workers at once; a second call does nothing."""
        self._closing()

    def _check_open(self) -> None:
        if not self._closing.alive:
            raise ValueError("need open reward workers, got closed ones")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_here(self, batch: "_Batch") -> None:
        for sample, arguments in enumerate(batch.samples):
            batch.settle(sample, *_outcome(self.function, arguments))

    def _run(self, batch: "_Batch") -> None:
        for worker in [worker for worker in self._workers if not worker.process.is_alive()]:
            self._drop(worker)
        while batch.unsettled:
            self._check_open()  # else workers would be started that nobody ends
            while len(self._workers) < min(self.processes, batch.unsettled):
                self._workers.append(_Worker(self.function, self.prepare, self.limit))
            for worker in [worker for worker in self._workers if worker.ready and not worker.given]:
                if not worker.give(batch):
                    self._drop(worker)
            self._listen(batch, [worker for worker in self._workers if worker.given or not worker.ready])

    def _listen(self, batch: "_Batch", busy: list["_Worker"]) -> None:
        """Wait for a result or a deadline, whichever is first, and act on it."""
        patience = min((worker.deadline for worker in busy), default=0.0) - time.monotonic()
        heard = wait([worker.connection for worker in busy], max(patience, 0.0))
        self._check_open()
        for worker in busy:
            failure = worker.receive(batch) if worker.connection in heard else worker.overdue()
            if failure:
                batch.settle(worker.given.popleft(), 0.0, failure)
                batch.waiting.extendleft(reversed(worker.given))
                self._drop(worker)

    def _drop(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        worker.end()


class _Batch:
    """Samples, by their place: those that wait for a worker, and what came out of the others."""

    def __init__(self, samples: Samples, processes: int) -> None:
        self.samples = samples
        self.waiting = deque(range(len(samples)))
        self.rewards = [0.0] * len(samples)
        self.unsettled = len(samples)
        self.failures = Counter[str]()
        self.chunk = max(1, min(MOST_CHUNK, len(samples) // (4 * max(processes, 1))))  # small enough to spread evenly

    def settle(self, sample: int, reward: float, failure: str) -> None:
        self.rewards[sample] = reward
        self.unsettled -= 1
        if failure:
            self.failures[failure] += 1


class _Worker:
    """A child process, with the samples that it has been given and has not answered."""

    def __init__(self, function: Callable[..., float], prepare: Callable[[], object] | None, limit: float) -> None:
        self.limit = limit
        self.given = deque[int]()
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        self.connection, theirs = SPAWN.Pipe()
        arguments = (theirs, function, prepare, limit, os.getpid())
        self.process = SPAWN.Process(target=_serve, args=arguments, daemon=True, name="reward-worker")
        if sys.platform == "win32":
            self.process.start()
        else:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: deaf from its first moment
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def give(self, batch: _Batch) -> bool:
        """Hand over the next samples; False where the process has ended, which is no sample's fault."""
        chunk = [batch.waiting.popleft() for _ in range(min(batch.chunk, len(batch.waiting)))]
        if not chunk:
            return True
        try:
            self.connection.send([tuple(batch.samples[sample]) for sample in chunk])
        except OSError:
            batch.waiting.extendleft(reversed(chunk))
            return False
        self.given.extend(chunk)
        self.deadline = time.monotonic() + self.limit
        return True

    def receive(self, batch: _Batch) -> str:
        """Take a message; returns what went wrong with the process, or nothing."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            if self.ready:
                return "ended the process"
            message = "the process ended; its own message is on the standard error stream"
        if self.ready:
            batch.settle(self.given.popleft(), *message)
        elif message:
            raise RuntimeError(f"reward workers cannot start: {message}")
        self.ready = True
        self.deadline = time.monotonic() + self.limit
        return ""

    def overdue(self) -> str:
        """The limit, where it has passed."""
        if time.monotonic() < self.deadline:
            return ""
        if not self.ready:
            raise RuntimeError(f"reward workers cannot start: nothing heard for {START_SECONDS:g} s")
        return f"over the limit of {self.limit:g} s"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _end(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # a fork has a copy of the list, not the right to end its parent's workers
        while workers:  # taken one by one: another thread may be at it too
            with suppress(IndexError):
                workers.pop().end()


def _check_importable(*functions: Callable[..., object] | None) -> None:
    try:
        pickle.dumps(functions)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"need functions that a module holds by name, got {functions}") from error


def _outcome(function: Callable[..., float], arguments: Sequence[Any]) -> tuple[float, str]:
    """Reward and nothing, or 0 and the name of the error."""
    try:
        return float(function(*arguments)), ""
    except (Exception, SystemExit) as error:
        return 0.0, type(error).__name__


def _serve(
    connection: Connection,
    function: Callable[..., float],
    prepare: Callable[[], object] | None,
    limit: float,
    parent: int,
) -> None:
    """What a worker does: report that it is ready, then answer each sample of each chunk with a message of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with suppress(EOFError, OSError):  # the parent is gone
        try:
            if prepare is not None:
                prepare()
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
            return
        connection.send("")
        while True:
            while not connection.poll(POLL_SECONDS):
                if os.getppid() != parent:  # the pipe stays open where a fork of the parent holds it too
                    return
            for arguments in connection.recv():
                _alarm(limit + GRACE_SECONDS)
                connection.send(_outcome(function, arguments))
            _alarm(0)


def _alarm(seconds: float) -> None:
    """Have the system end this process after a time, even in the midst of a computation that runs no Python."""
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
