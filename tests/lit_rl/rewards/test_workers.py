import ctypes
import gc
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing import active_children
from operator import call
from pathlib import Path
from threading import Timer

import pytest

from lit_rl.rewards.math import math_reward, prepare
from lit_rl.rewards.workers import RewardWorkers

ROOT = Path(__file__).parents[3]
HOLDS_THE_LOCK = (re.match, "(a+)+$", "a" * 50 + "b")  # in C, so that no other thread of the process can run
AT_LARGE = """
import sys, threading, time
from contextlib import suppress
from multiprocessing import active_children
from operator import call
from lit_rl.rewards.workers import RewardWorkers
workers = RewardWorkers(call, processes=2, limit={limit})
workers.evaluate([(float, 1)] * 2)
def work():
    with suppress(Exception):  # a thread that prints while the interpreter ends aborts it
        workers.evaluate([(time.sleep, 60)])
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print(*[child.pid for child in active_children()], flush=True)
{then}
"""


def pids() -> set[int]:
    return {child.pid for child in active_children() if child.pid and child.name == "reward-worker"}


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def large(limit: float, then: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", AT_LARGE.format(limit=limit, then=then)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_without_processes_the_function_runs_here() -> None:
    with RewardWorkers(math.sqrt, processes=0) as workers:
        assert workers.evaluate([(4,), (9,)]) == [2.0, 3.0]
        assert workers.evaluate([]) == []
        with pytest.warns(RuntimeWarning, match=r"2 of 3 rewards are 0 .*: 1 TypeError, 1 ValueError"):
            assert workers.evaluate([(-1,), (4,), ("x",)]) == [0.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="closed"):
        workers.evaluate([(4,)])


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"holds by name, got .*lambda"):
        RewardWorkers(lambda: 1.0)
    with pytest.raises(ValueError, match="got -1"):
        RewardWorkers(math.sqrt, processes=-1)
    with pytest.raises(ValueError, match="got 0"):
        RewardWorkers(math.sqrt, limit=0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_rewards_come_in_the_order_of_the_samples(count: int) -> None:
    with RewardWorkers(math.sqrt, processes=3) as workers:
        assert workers.evaluate([(i * i,) for i in range(count)]) == [float(i) for i in range(count)]
        assert len(pids()) == min(3, count)
        assert workers.evaluate([]) == []
    assert not pids()


@pytest.mark.slow
def test_a_sample_over_its_limit_costs_only_itself() -> None:
    samples = [(float, i) for i in range(40)]
    samples[3] = samples[30] = (time.sleep, 60)  # type: ignore[assignment]
    samples[20] = HOLDS_THE_LOCK  # type: ignore[assignment]
    with RewardWorkers(call, processes=2, limit=0.5) as workers:
        assert workers.evaluate([(float, 1)] * 2) == [1.0, 1.0]
        before = pids()
        started = time.monotonic()
        with pytest.warns(RuntimeWarning, match=r"3 of 40 rewards are 0 .*: 3 over the limit of 0\.5 s") as told:
            rewards = workers.evaluate(samples)
        assert len(told) == 1
        assert rewards == [0.0 if i in (3, 20, 30) else float(i) for i in range(40)]
        assert time.monotonic() - started < 4  # three limits, shared by two workers, and three starts
        assert not before & pids()  # both have been replaced
        assert workers.evaluate([(float, 5)]) == [5.0]


@pytest.mark.slow
def test_the_limit_is_for_a_sample_not_for_the_batch() -> None:
    with RewardWorkers(call, processes=1, limit=0.5) as workers:
        with pytest.warns(RuntimeWarning, match="6 TypeError"):  # sleep returns no number, but none is over the limit
            assert workers.evaluate([(time.sleep, 0.2)] * 6) == [0.0] * 6
        assert len(pids()) == 1


@pytest.mark.slow
def test_a_sample_that_ends_its_process_costs_only_itself() -> None:
    endings = [(os._exit, 0), (ctypes.string_at, 0), (signal.raise_signal, signal.SIGKILL), (sys.exit, 1)]
    samples = [sample for ending in endings for sample in ((float, 2), ending, (float, 3))]
    with RewardWorkers(call, processes=1) as workers:
        with pytest.warns(RuntimeWarning, match="4 of 12 rewards are 0 .*: 1 SystemExit, 3 ended the process"):
            assert workers.evaluate(samples) == [2.0, 0.0, 3.0] * 4
        assert len(pids()) == 1


@pytest.mark.slow
def test_a_worker_killed_between_batches_is_replaced_in_silence() -> None:
    with RewardWorkers(call, processes=2) as workers, warnings.catch_warnings():
        warnings.simplefilter("error")
        workers.evaluate([(float, 1)] * 8)
        killed = min(pids())
        os.kill(killed, signal.SIGKILL)
        os.kill(max(pids()), signal.SIGINT)  # ignored
        time.sleep(0.1)
        assert workers.evaluate([(float, i) for i in range(8)]) == [float(i) for i in range(8)]
        assert killed not in pids()
        assert len(pids()) == 2


@pytest.mark.slow
def test_an_interrupted_batch_leaves_nothing_for_the_next_one() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with RewardWorkers(call, processes=2, limit=30) as workers:
        workers.evaluate([(float, 1)] * 2)
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            workers.evaluate([(float, 7), (float, 7), (time.sleep, 20), (time.sleep, 20)])
        signal.signal(signal.SIGALRM, before)
        assert not pids()
        assert workers.evaluate([(float, 1), (float, 2)]) == [1.0, 2.0]


@pytest.mark.slow
def test_closing_from_another_thread_is_an_error_there_and_starts_no_worker() -> None:
    workers = RewardWorkers(call, processes=2, limit=50)
    workers.evaluate([(float, 1)] * 2)
    closing = Timer(0.3, workers.close)
    closing.start()
    with pytest.raises((ValueError, OSError)):
        workers.evaluate([(time.sleep, 60)] * 3)
    closing.join()
    assert not pids()


@pytest.mark.slow
def test_garbage_collection_ends_the_workers() -> None:
    workers = RewardWorkers(call, processes=2)
    workers.evaluate([(float, 1)] * 2)
    mine = pids()
    del workers
    gc.collect()
    assert len(mine) == 2
    assert all(gone(pid) for pid in mine)


@pytest.mark.slow
def test_a_worker_that_cannot_prepare_is_an_error() -> None:
    with (
        RewardWorkers(math.sqrt, processes=1, prepare=os.getcwdb().__getitem__) as workers,
        pytest.raises(RuntimeError, match="cannot start: TypeError"),
    ):
        workers.evaluate([(4,)])
    with (
        RewardWorkers(math.sqrt, processes=1, prepare=os.abort) as workers,
        pytest.raises(RuntimeError, match="cannot start: the process ended"),
    ):
        workers.evaluate([(4,)])
    assert not pids()


@pytest.mark.slow
@pytest.mark.parametrize("then", ["", "raise SystemExit", "workers.close()"])
def test_the_interpreter_ends_although_a_worker_is_busy(then: str) -> None:
    started = time.monotonic()
    with large(limit=50, then=then) as parent:
        out, _ = parent.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert parent.returncode == 0
    assert len(out.split()) == 2
    assert all(gone(int(pid)) for pid in out.split())


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed() -> None:
    with large(limit=0.8, then="time.sleep(60)") as parent:
        assert parent.stdout is not None
        mine = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(mine) == 2
    patience = time.monotonic() + 9  # the busy one ends at its limit and five seconds, the other one at once
    while not all(gone(pid) for pid in mine) and time.monotonic() < patience:
        time.sleep(0.1)
    assert all(gone(pid) for pid in mine)


@pytest.mark.slow
def test_workers_bring_no_torch() -> None:
    with RewardWorkers(call, processes=1, prepare=prepare) as workers:
        samples = [
            (eval, f"{name!r} in __import__('sys').modules") for name in ("torch", "sympy", "lit_rl.rewards.math")
        ]
        assert workers.evaluate(samples) == [0.0, 1.0, 1.0]


@pytest.mark.slow
def test_a_symbolic_answer_without_end_is_worth_nothing_within_a_second() -> None:
    responses = [r"\boxed{\sqrt{8}}", r"\boxed{(x+1)^{9999}}", r"\boxed{9^{9^{9}}}", r"\boxed{2\sqrt{2}}"]
    seconds = []
    with RewardWorkers(math_reward, processes=2, limit=0.6, prepare=prepare) as workers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a busy machine
            workers.evaluate([(responses[0], "7")] * 2)  # the workers have started
        for _ in range(3):  # the quickest tells what the limit does, the others what else the machine does
            started = time.monotonic()
            with pytest.warns(RuntimeWarning, match=r"1 of 4 rewards .* 1 over the limit of 0\.6 s"):
                assert workers.evaluate([(r, r"2\sqrt{2}") for r in responses]) == [1.0, 0.0, 0.0, 1.0]
            seconds.append(time.monotonic() - started)
    assert min(seconds) < 1
