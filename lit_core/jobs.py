"""Runs of a reproduction side by side, in processes of their own: small models leave cores idle."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm import tqdm

from lit_core.errors import InputError

LOG = "log.txt"
END_SECONDS = 10.0  # for an idle process to leave
LINES_TOLD = 15  # of the log of a run that failed
SPAWN = get_context("spawn")  # a fork would copy locks that torch's threads hold


@dataclass
class Task:
    """A run.

    Args:
        label: What the user sees.
        folder: The run's folder; what it prints goes to ``log.txt`` there.
        arm: Name of the arm.
        seed: Its seed.
        after: Numbers of the tasks that have to be done before.
    """

    label: str
    folder: Path
    arm: str
    seed: int
    after: Sequence[int]
    started: float = 0.0
    state: str = "waiting"  # then running, then done


Perform = Callable[[str, int], None]


class _Worker:
    """A process that does one task after the other."""

    def __init__(self, perform: Perform) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_serve, args=(theirs, perform, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        task.state, task.started, self.task = "running", time.perf_counter(), task
        self.connection.send((task.arm, task.seed, task.folder))

    def finish(self) -> Task:
        """The task that is done.

        Raises:
            InputError: It has refused its input.
            RuntimeError: It has failed; the error ends with the end of its log.
        """
        task = self.task
        assert task is not None  # only busy workers are listened to
        try:
            refused, failed = self.connection.recv()
        except (EOFError, OSError):  # the process is gone
            refused, failed = "", True
        if refused:
            raise InputError(refused)
        if failed:
            log = task.folder / LOG
            end = "\n".join(log.read_text(errors="replace").splitlines()[-LINES_TOLD:]) if log.exists() else "nothing"
            raise RuntimeError(f"{task.label} failed; {log} ends with\n{end}")
        task.state, self.task = "done", None
        return task

    def end(self) -> None:
        """Let an idle process go, and stop a busy one."""
        if self.task is None:
            with suppress(OSError):
                self.connection.send(None)
            self.process.join(END_SECONDS)
        self.connection.close()
        self.process.terminate()
        self.process.join()


def run_tasks(tasks: Sequence[Task], slots: int, perform: Perform, say: Callable[[str], None]) -> None:
    """Run tasks, at most ``slots`` at a time, the first that can start first.

    Args:
        tasks: In an order in which each stands after those it needs.
        slots: Processes; each has its share of the cores.
        perform: Does a run; it can be pickled.
        say: Prints a line.

    Raises:
        InputError: A run has refused its input; the error is its own line.
        RuntimeError: A run has failed; the error ends with the end of its log.
    """
    threads = str(max(1, (os.cpu_count() or 1) // slots))
    workers: list[_Worker] = []
    bar = tqdm(total=len(tasks), desc="runs", unit="run", leave=False, dynamic_ncols=True, disable=None)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads  # read when a process starts
    try:
        while not all(task.state == "done" for task in tasks):
            for task in tasks:
                ready = task.state == "waiting" and all(tasks[number].state == "done" for number in task.after)
                free = next((worker for worker in workers if worker.task is None), None)
                if ready and free is None and len(workers) < slots:
                    workers.append(free := _Worker(perform))
                if ready and free is not None:
                    free.give(task)
            busy = [worker for worker in workers if worker.task is not None]
            bar.set_postfix_str(", ".join(worker.task.label for worker in busy if worker.task))
            heard = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in heard:
                    done = worker.finish()
                    bar.update()
                    with bar.external_write_mode():
                        say(f"{done.label}: done in {time.perf_counter() - done.started:.0f} s")
    finally:
        bar.close()
        for worker in workers:
            worker.end()
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(connection: Connection, perform: Perform, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader decides
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            message = connection.recv()
            if message is None:
                return
            arm, seed, folder = message
            connection.send(_outcome(perform, arm, seed, folder))


def _outcome(perform: Perform, arm: str, seed: int, folder: Path) -> tuple[str, bool]:
    """Do a run: what it refuses, and whether it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(line_buffering=True)  # a file would get its lines in blocks, long after
    try:
        perform(arm, seed)
    except InputError as error:
        return str(error), False
    except BaseException:
        traceback.print_exc()
        return "", True
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return "", False


def _watch(parent: int) -> None:
    """End this process when the leader is gone, however that ended: nobody would know of its result."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
