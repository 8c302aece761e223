import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_core.errors import InputError
from lit_core.jobs import LOG, Task, run_tasks

ROOT = Path(__file__).parents[2]


class Write:
    """Writes a file a run; some arms behave badly."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, arm: str, seed: int) -> None:
        print(f"this is {arm}")
        if arm == "refuses":
            raise InputError("not like this")
        if arm == "fails":
            raise RuntimeError("broken inside")
        if arm == "dies":
            os._exit(3)
        if arm == "waits":
            time.sleep(60)
        with (self.folder / "order").open("a") as stream:
            stream.write(f"{arm}{seed} ")
        (self.folder / f"{arm}{seed}.{os.environ['OMP_NUM_THREADS']}").touch()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # the other processes import this file


def task(folder: Path, arm: str, seed: int = 0, after: tuple[int, ...] = ()) -> Task:
    return Task(f"{arm} seed {seed}", folder / arm / str(seed), arm, seed, after)


@pytest.mark.slow
def test_tasks_run_after_those_they_need(tmp_path: Path) -> None:
    said: list[str] = []
    tasks = [
        task(tmp_path, "a"),
        task(tmp_path, "b", after=(0,)),
        task(tmp_path, "a", 1),
        task(tmp_path, "c", after=(1, 2)),
    ]
    run_tasks(tasks, 2, Write(tmp_path), said.append)
    order = (tmp_path / "order").read_text().split()
    assert sorted(order) == ["a0", "a1", "b0", "c0"]
    assert order.index("a0") < order.index("b0") < order.index("c0")
    assert order.index("a1") < order.index("c0")
    assert len(said) == 4
    assert said[0].startswith("a seed ")
    assert (tmp_path / "a" / "0" / LOG).read_text() == "this is a\n"
    assert (tmp_path / f"a0.{max(1, (os.cpu_count() or 1) // 2)}").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "error", "text"),
    [
        ("refuses", InputError, "not like this"),
        ("fails", RuntimeError, "broken inside"),
        ("dies", RuntimeError, "failed"),
    ],
)
def test_a_run_that_goes_wrong_ends_all(tmp_path: Path, arm: str, error: type[Exception], text: str) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=text):
        run_tasks([task(tmp_path, "waits"), task(tmp_path, arm)], 2, Write(tmp_path), print)
    assert time.monotonic() - started < 30


LEADER = """
import sys
from pathlib import Path
from tests.lit_core.test_jobs import Write, task
from lit_core.jobs import run_tasks
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_tasks([task(folder, "waits")], 1, Write(folder), print)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes are told apart by /proc")
def test_no_run_outlives_a_killed_leader(tmp_path: Path) -> None:
    script = tmp_path / "leader.py"
    script.write_text(LEADER)
    leader = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    log = tmp_path / "waits" / "0" / LOG
    deadline = time.monotonic() + 60
    while not (log.exists() and "this is waits" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.read_text() == "this is waits\n"  # a line can be read while the run goes on
    children = _children(leader.pid)
    assert children
    leader.kill()
    leader.wait()
    deadline = time.monotonic() + 20  # they look once a second
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(child) for child in children)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie does nothing
    except OSError:
        return False


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found
