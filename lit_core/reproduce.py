"""Run the arms of an experiment, restartably, and report on them.

Everything lies in ``runs/<experiment>/``: ``manifest.json`` (what is planned and done), ``<arm>/seed<k>/`` for each
run, and the report. In a run's folder ``arm.json`` says what is run there, ``elapsed.json`` for how long, and
``results.json``, which the arm writes last, that it is done.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_core.errors import InputError
from lit_core.experiment import Arm, ArmContext, Clock, Experiment
from lit_core.files import read_json, write_json
from lit_core.jobs import Perform, Task, run_tasks
from lit_core.report import (
    ArmResults,
    Claim,
    build_report,
    console_tables,
    device_name,
    format_seconds,
    versions,
    write_report,
)
from lit_core.results import COSTS, Results, read_results, write_results

__all__ = ["Arm", "ArmContext", "Claim", "Clock", "Experiment", "run_reproduce", "write_results"]


@dataclass(frozen=True)
class _Job:
    arm: Arm
    seed: int
    folder: Path
    fingerprint: str

    @property
    def label(self) -> str:
        return f"{self.arm.name} seed {self.seed}" if self.arm.seeded else self.arm.name

    def done(self) -> bool:
        return (self.folder / "results.json").exists()


class _Runner:
    """The jobs of one call of ``run_reproduce``."""

    def __init__(
        self, experiment: Experiment, root: Path, arms: Sequence[Arm], seeds: Sequence[int], scale: str
    ) -> None:
        self.experiment, self.root, self.scale = experiment, root, scale
        self.arms, self.seeds = arms, tuple(seeds)
        package = versions().get("lit-suite", "")
        self.jobs: dict[tuple[str, int], _Job] = {}
        for seed in self.seeds:  # seed by seed: an interrupted run holds complete comparisons
            for arm in arms:
                own_seed = seed if arm.seeded else 0
                text = json.dumps([experiment.name, arm.name, own_seed, scale, experiment.fingerprint, package])
                fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
                folder = root / arm.name / f"seed{own_seed}"
                self.jobs.setdefault((arm.name, own_seed), _Job(arm, own_seed, folder, fingerprint))

    def job(self, arm: str, seed: int) -> _Job:
        return self.jobs[arm, seed if self.experiment.arm(arm).seeded else 0]

    def check(self) -> None:
        """Refuse folders that hold runs of another configuration."""
        for job in self.jobs.values():
            card = job.folder / "arm.json"
            found = read_json(card).get("fingerprint") if card.exists() else None
            if found != job.fingerprint and (card.exists() or job.done()):
                raise InputError(
                    "holds a run with another configuration, scale or version; use --fresh to delete and repeat it, "
                    "or another --runs_dir",
                    job.folder,
                )

    def delete(self) -> None:
        for job in self.jobs.values():
            if job.folder.exists():
                shutil.rmtree(job.folder)

    def write_manifest(self, running: _Job | None = None) -> None:
        entries = []
        for job in self.jobs.values():
            state = "done" if job.done() else "running" if job is running else "planned"
            entries.append({"arm": job.arm.name, "seed": job.seed, "state": state, "fingerprint": job.fingerprint})
        plan = {"experiment": self.experiment.name, "scale": self.scale, "versions": versions(), "runs": entries}
        write_json(self.root / "manifest.json", plan)

    def run(self, job: _Job) -> float:
        """Run a job and return its seconds, those of earlier starts included."""
        write_json(
            job.folder / "arm.json",
            {
                "arm": job.arm.name,
                "seed": job.seed,
                "scale": self.scale,
                "fingerprint": job.fingerprint,
                "device": device_name(),
            },
        )
        needed = {name: self.job(name, job.seed).folder for name in job.arm.after}
        with Clock(job.folder) as clock:
            names = (self.experiment.name, self.scale, job.arm.name)
            job.arm.run(ArmContext(*names, job.seed, job.folder, clock, needed))
        if not job.done():
            raise RuntimeError(f"arm '{job.arm.name}' ended without write_results in {job.folder}")
        return clock.seconds()

    def run_here(self, say: Callable[[str], None]) -> None:
        """Run the jobs that are not done, one after the other."""
        started = time.perf_counter()
        for number, job in enumerate(self.jobs.values(), start=1):
            label = f"[{number}/{len(self.jobs)}] {job.label}"
            if job.done():
                say(f"{label}: already done")
                continue
            say(f"{label}: goes on after an interruption …" if (job.folder / "arm.json").exists() else f"{label} …")
            self.write_manifest(running=job)
            seconds = self.run(job)
            total = format_seconds(time.perf_counter() - started)
            say(f"{label}: done in {format_seconds(seconds)}, {total} since the start")

    def run_apart(self, slots: int, perform: Perform, say: Callable[[str], None]) -> None:
        """Run the jobs that are not done side by side, each in a process of its own."""
        waiting = [job for job in self.jobs.values() if not job.done()]
        say(f"{len(waiting)} of {len(self.jobs)} runs to do, {slots} at a time …")
        self.write_manifest()
        number = {id(job): place for place, job in enumerate(waiting)}
        tasks = []
        for job in waiting:
            needed = [id(self.job(name, job.seed)) for name in job.arm.after]
            after = [number[other] for other in needed if other in number]
            tasks.append(Task(job.label, job.folder, job.arm.name, job.seed, after))
        run_tasks(tasks, slots, perform, say)

    def results(self, job: _Job) -> Results:
        """A job's results; its cost with that of the jobs it builds on, each counted once."""
        needed: dict[Path, _Job] = {}

        def collect(current: _Job) -> None:
            needed[current.folder] = current
            for name in current.arm.needs:
                collect(self.job(name, current.seed))

        collect(job)
        own = read_results(job.folder)
        costs = [read_results(other.folder).cost for other in needed.values()]
        cost = {
            name: math.fsum(one.get(name, 0.0) for one in costs) for name in COSTS if any(name in one for one in costs)
        }
        return Results(own.metrics, own.per_item, cost)

    def report(self, figures: bool = True) -> tuple[dict[str, Any], Path]:
        shown = [arm for arm in self.arms if not arm.hidden] or list(self.arms)
        arms = []
        for arm in shown:
            seeds = self.seeds if arm.seeded else (0,)
            runs = tuple(self.results(self.job(arm.name, seed)) for seed in seeds)
            arms.append(ArmResults(arm.name, arm.title, seeds, runs, arm.seeded))
        experiment = self.experiment
        devices = {read_json(job.folder / "arm.json").get("device", "") for job in self.jobs.values()}
        device = ", ".join(sorted(devices - {""}))
        report = build_report(
            experiment.name, self.scale, arms, experiment.claims, experiment.table_metrics, device, experiment.notes
        )
        captions: dict[str, str] = {}
        if figures:
            from lit_core.plots import write_figures

            names = experiment.curves or tuple(f"val/{metric}" for metric in experiment.table_metrics)
            folders = {arm.title: [self.job(arm.name, seed).folder for seed in arm.seeds] for arm in arms}
            every = {
                arm.name: [self.job(arm.name, seed).folder for seed in (self.seeds if arm.seeded else (0,))]
                for arm in self.arms
            }
            further = experiment.figures(every) if experiment.figures else {}
            captions = write_figures(self.root, report, folders, names, further)
        return report, write_report(self.root, report, captions)


def run_job(experiment: Experiment, runs_dir: Path | str, scale: str, arm: str, seed: int) -> None:
    """Do one run of a reproduction that another process leads, which holds the folder's lock."""
    runner = _Runner(experiment, Path(runs_dir) / experiment.name, experiment.select(arm), [seed], scale)
    runner.run(runner.job(arm, seed))


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when the process ends, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (root / ".lock").open("w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: worker processes would inherit that
        except OSError:
            raise InputError("another reproduce is running here; wait for it or use another --runs_dir", root) from None
        yield


def run_reproduce(
    experiment: Experiment,
    runs_dir: Path | str = Path("runs"),
    arms: Literal["main", "all"] | Sequence[str] = "main",
    seeds: Sequence[int] = (0, 1, 2),
    scale: str = "tiny",
    fresh: bool = False,
    jobs: int | None = None,
    perform: Perform | None = None,
) -> Path:
    """Run the arms that are not done yet, then write and print the report.

    Args:
        experiment: What to run.
        runs_dir: Everything goes to ``runs_dir/<experiment>``.
        arms: ``main``, ``all`` or names of arms; what they need is run too. The report covers these arms and seeds.
        seeds: Seeds of each arm.
        scale: Name of the scale.
        fresh: Delete the folders of these arms and seeds first.
        jobs: Runs at a time; by default as the experiment says.
        perform: Does one run in another process, as :func:`run_job` does; without it runs are done here, one by one.

    Returns:
        Path of ``report.md``.

    Raises:
        InputError: An unknown arm, unusable seeds, folders that hold runs of another configuration, or another
            ``reproduce`` at work in the folder.
        SystemExit: 130 after Ctrl-C; the same call goes on from there.
    """
    from rich.console import Console

    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"--seeds takes different whole numbers from 0 on, got {list(seeds)}")
    root = Path(runs_dir) / experiment.name
    runner = _Runner(experiment, root, experiment.select(arms), seeds, scale)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no width; tables should not be folded to 80 columns

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with _locked(root):
        if fresh:
            runner.delete()
        runner.check()
        try:
            slots = (jobs or experiment.jobs) if perform is not None else 1
            if slots > 1 and perform is not None:
                runner.run_apart(slots, perform, say)
            else:
                runner.run_here(say)
            runner.write_manifest()
            report, path = runner.report()
        except (KeyboardInterrupt, SystemExit) as interrupt:
            # Lightning turns Ctrl-C into SystemExit(1)
            if not isinstance(interrupt, KeyboardInterrupt) and not isinstance(
                interrupt.__context__, KeyboardInterrupt
            ):
                raise
            runner.write_manifest()
            command = "the same command without --fresh" if fresh else "the same command"
            say(f"Interrupted; what is done is kept, and {command} goes on from here.")
            raise SystemExit(130) from None
    for table in console_tables(report):
        console.print(table)
    for note in report["notes"]:
        say(f"Note: {note}")
    say(f"Report, plots and runs: {root.resolve()}")
    return path
