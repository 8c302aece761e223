import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_core.reproduce import Arm, ArmContext, Claim, Clock, Experiment, run_reproduce, write_results


class Log:
    """Arms that write how often they were run."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []
        self.fail_at: tuple[str, int] | None = None

    def run(self, context: ArmContext) -> None:
        if (context.arm, context.seed) == self.fail_at:
            raise KeyboardInterrupt
        self.runs.append((context.arm, context.seed))
        value = len(context.arm) / 10 + context.seed / 100
        cost = {"wall_s": 10.0, "tokens": 100, "steps": 2}
        write_results(context.folder, {"mrr@10": value}, {"mrr@10": {"q1": value - 0.1, "q2": value + 0.1}}, cost)

    def experiment(self, fingerprint: str = "lr: 1") -> Experiment:
        arms = (
            Arm("bm25", "BM25", self.run, seeded=False),
            Arm("stage", "Stage", self.run, hidden=True),
            Arm("method", "Method", self.run, needs=("stage",)),
            Arm("ablation", "Ablation", self.run, main=False, needs=("method", "bm25", "stage")),
        )
        claims = (Claim("the method beats BM25", "mrr@10", "method", "bm25"),)
        return Experiment("demo", arms, claims, ("mrr@10",), fingerprint)


@pytest.fixture
def log() -> Log:
    return Log()


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "demo" / "report.json").read_text())


def test_main_arms_with_what_they_need(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_reproduce(log.experiment(), tmp_path, seeds=[0, 1])
    assert log.runs == [("bm25", 0), ("stage", 0), ("method", 0), ("stage", 1), ("method", 1)]
    assert path == tmp_path / "demo" / "report.md"
    report = report_in(tmp_path)
    assert [arm["name"] for arm in report["arms"]] == ["bm25", "method"]  # the hidden one is not shown
    assert [arm["seeds"] for arm in report["arms"]] == [[0], [0, 1]]
    assert report["arms"][1]["cost"] == {"wall_s": 20.0, "tokens": 200.0, "steps": 4.0}  # with its stage
    assert report["claims"][0]["difference"] == pytest.approx(0.605 - 0.4)
    printed = capsys.readouterr().out
    assert "[3/5] method seed 0: done" in printed
    assert str((tmp_path / "demo").resolve()) in printed
    manifest = json.loads((tmp_path / "demo" / "manifest.json").read_text())
    assert {entry["state"] for entry in manifest["runs"]} == {"done"}


def test_done_arms_are_kept_and_shared_stages_counted_once(log: Log, tmp_path: Path) -> None:
    run_reproduce(log.experiment(), tmp_path, seeds=[0])
    log.runs.clear()
    run_reproduce(log.experiment(), tmp_path, arms="all", seeds=[0])
    assert log.runs == [("ablation", 0)]
    assert report_in(tmp_path)["arms"][2]["cost"]["wall_s"] == 40.0  # itself, method, bm25, and stage once


def test_ctrl_c_exits_with_130_and_the_same_call_goes_on(
    log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.fail_at = ("method", 0)
    with pytest.raises(SystemExit) as interrupt:
        run_reproduce(log.experiment(), tmp_path, seeds=[0])
    assert interrupt.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().out
    states = {
        entry["arm"]: entry["state"] for entry in json.loads((tmp_path / "demo/manifest.json").read_text())["runs"]
    }
    assert states == {"bm25": "done", "stage": "done", "method": "planned"}
    log.fail_at = None
    run_reproduce(log.experiment(), tmp_path, seeds=[0])
    assert log.runs == [("bm25", 0), ("stage", 0), ("method", 0)]
    assert "method seed 0: goes on after an interruption" in capsys.readouterr().out


def test_ctrl_c_within_a_trainer_is_told_apart_from_other_exits(tmp_path: Path) -> None:
    def interrupted(context: ArmContext) -> None:  # what Lightning's trainer does
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    def exits(context: ArmContext) -> None:
        sys.exit(3)

    for run, code in ((interrupted, 130), (exits, 3)):
        with pytest.raises(SystemExit) as exit_of:
            run_reproduce(Experiment("demo", (Arm("a", "A", run),), (), (), ""), tmp_path)
        assert exit_of.value.code == code


def test_another_configuration_is_refused_unless_fresh(log: Log, tmp_path: Path) -> None:
    run_reproduce(log.experiment(), tmp_path, seeds=[0])
    with pytest.raises(InputError, match=r"bm25/seed0: holds a run with another configuration.*--fresh"):
        run_reproduce(log.experiment("lr: 2"), tmp_path, seeds=[0])
    with pytest.raises(InputError, match="--runs_dir"):
        run_reproduce(log.experiment(), tmp_path, seeds=[0], scale="smoke")
    log.runs.clear()
    run_reproduce(log.experiment("lr: 2"), tmp_path, seeds=[0], fresh=True)
    assert log.runs == [("bm25", 0), ("stage", 0), ("method", 0)]


def test_an_unfinished_run_of_another_configuration_is_refused(log: Log, tmp_path: Path) -> None:
    log.fail_at = ("bm25", 0)  # its checkpoint would otherwise be taken for this configuration's
    with pytest.raises(SystemExit):
        run_reproduce(log.experiment(), tmp_path)
    with pytest.raises(InputError, match="another configuration"):
        run_reproduce(log.experiment("lr: 2"), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["bm52"]}, "unknown arm 'bm52'; use main, all, or some of bm25, stage, method, ablation"),
        ({"arms": []}, "no arms to run"),
        ({"seeds": [1, 1]}, r"--seeds takes different whole numbers from 0 on, got \[1, 1\]"),
        ({"seeds": []}, "--seeds"),
    ],
)
def test_bad_options(log: Log, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_reproduce(log.experiment(), tmp_path, **options)


def test_contradictions_in_an_experiment(log: Log) -> None:
    bm25, method = Arm("bm25", "", log.run, seeded=False), Arm("method", "", log.run, needs=("stage",))
    with pytest.raises(ValueError, match="two arms called 'bm25'"):
        Experiment("demo", (bm25, bm25), (), (), "")
    with pytest.raises(ValueError, match="needs 'stage', which does not stand before it"):
        Experiment("demo", (method,), (), (), "")
    with pytest.raises(ValueError, match="'fixed' has no seed but needs 'random'"):
        Experiment(
            "demo", (Arm("random", "", log.run), Arm("fixed", "", log.run, seeded=False, needs=("random",))), (), (), ""
        )
    with pytest.raises(ValueError, match="unknown arm 'bm52'"):
        Experiment("demo", (bm25,), (Claim("x", "mrr@10", "bm52", "bm25"),), (), "")


def test_of_gives_the_folders_of_needed_arms_only(tmp_path: Path) -> None:
    seen = {}

    def run(context: ArmContext) -> None:
        if context.arm == "last":
            seen.update({name: context.of(name) for name in ("fixed", "first")})
            with pytest.raises(ValueError, match="does not declare that it needs 'other'"):
                context.of("other")
        write_results(context.folder, {"mrr@10": 1.0})

    arms = (Arm("fixed", "", run, seeded=False), Arm("first", "", run), Arm("last", "", run, needs=("fixed", "first")))
    run_reproduce(Experiment("demo", arms, (), ("mrr@10",), ""), tmp_path, seeds=[4])
    assert seen == {"fixed": tmp_path / "demo/fixed/seed0", "first": tmp_path / "demo/first/seed4"}


def test_an_arm_must_write_its_results(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="arm 'a' ended without write_results"):
        run_reproduce(Experiment("demo", (Arm("a", "A", lambda context: None),), (), (), ""), tmp_path)


def test_clock_adds_up_over_starts(tmp_path: Path) -> None:
    with Clock(tmp_path, period=0.01):
        time.sleep(0.05)
        beaten = json.loads((tmp_path / "elapsed.json").read_text())["wall_s"]
    first = json.loads((tmp_path / "elapsed.json").read_text())["wall_s"]
    assert 0 < beaten < first
    with Clock(tmp_path) as clock:
        assert clock.seconds() >= first >= 0.05


PROGRAM = """
import json, sys, time
from pathlib import Path
from lit_core.files import write_json
from lit_core.reproduce import Arm, Experiment, run_reproduce, write_results

def run(context):
    state = context.folder / "state.json"
    step, value = json.loads(state.read_text()) if state.exists() else (0, context.seed)
    while step < 40:
        value = (value * 31 + 7) % 1009
        step += 1
        write_json(state, [step, value])
        with (context.folder / "steps.txt").open("a") as stream:
            stream.write("x")
        time.sleep(float(sys.argv[2]) if context.arm == "two" else 0)
    write_results(context.folder, {"value": float(value)}, cost={"steps": step})

arms = (Arm("one", "One", run), Arm("two", "Two", run))
run_reproduce(Experiment("demo", arms, (), ("value",), "x"), sys.argv[1], seeds=[0, 1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_kill_9_and_start_again_ends_with_the_same_numbers(tmp_path: Path) -> None:
    def command(folder: str, pause: str) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(tmp_path / folder), pause]

    subprocess.run(command("whole", "0"), check=True, capture_output=True)
    steps = tmp_path / "killed" / "demo" / "two" / "seed0" / "steps.txt"
    with subprocess.Popen(command("killed", "0.1"), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (steps.exists() and len(steps.read_text()) > 15) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        second = subprocess.run(command("killed", "0"), capture_output=True, text=True)
        assert "another reproduce is running here" in second.stderr  # at the same time
        process.kill()
    before = json.loads((steps.parent / "elapsed.json").read_text())["wall_s"]
    done = subprocess.run(command("killed", "0"), check=True, capture_output=True, text=True).stdout
    assert "one seed 0: already done" in done
    assert "two seed 0: goes on" in done
    assert len(steps.read_text()) <= 41  # at most the step between the checkpoint and the count was repeated
    whole, killed = (json.loads((tmp_path / name / "demo/report.json").read_text()) for name in ("whole", "killed"))
    assert [arm["metrics"] for arm in whole["arms"]] == [arm["metrics"] for arm in killed["arms"]]
    assert json.loads((steps.parent / "elapsed.json").read_text())["wall_s"] > before >= 1  # killed after 1.6 s
