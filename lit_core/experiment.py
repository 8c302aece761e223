"""What an experiment is: its arms, what each is told when it runs, and what is claimed about them."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_core.errors import InputError
from lit_core.files import read_json, write_json
from lit_core.report import Claim


class Clock:
    """Seconds spent on a run over all its starts, kept in ``elapsed.json``.

    A thread writes the file every ``period`` seconds, so a kill loses at most that much. Steps that a kill threw away
    and that were done again count: their time was spent.

    Args:
        folder: Folder of the run.
        period: Seconds between two writes.
    """

    def __init__(self, folder: Path, period: float = 1.0) -> None:
        self.path, self.period = folder / "elapsed.json", period
        self.before = float(read_json(self.path)["wall_s"]) if self.path.exists() else 0.0
        self.started = time.perf_counter()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="clock", daemon=True)

    def seconds(self) -> float:
        """Seconds spent so far, earlier starts included."""
        return self.before + time.perf_counter() - self.started

    def _beat(self) -> None:
        while not self.stopped.wait(self.period):
            write_json(self.path, {"wall_s": self.seconds()})

    def __enter__(self) -> "Clock":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()
        write_json(self.path, {"wall_s": self.seconds()})


@dataclass(frozen=True)
class ArmContext:
    """What an arm is told when it runs.

    Args:
        experiment: Name of the experiment.
        scale: ``smoke``, ``tiny`` or ``paper``.
        arm: Name of the arm.
        seed: Seed of this run.
        folder: Where everything of this run goes; after a kill it holds what the killed run left.
        clock: Measures this run.
        needed: Folders of the arms that this one needs.
    """

    experiment: str
    scale: str
    arm: str
    seed: int
    folder: Path
    clock: Clock
    needed: dict[str, Path] = field(default_factory=dict)

    def of(self, arm: str) -> Path:
        """Folder of a needed arm at the same seed; it is done.

        Raises:
            ValueError: The arm is not declared in ``needs``.
        """
        if arm not in self.needed:
            raise ValueError(f"arm '{self.arm}' does not declare that it needs '{arm}', only {sorted(self.needed)}")
        return self.needed[arm]


@dataclass(frozen=True)
class Arm:
    """One of the things an experiment compares.

    Args:
        name: Name on the command line and in folder names.
        title: Name in tables and plots.
        run: Does the work in ``context.folder``, going on from what it finds there, and ends with ``write_results``.
        main: Whether it is run by default.
        seeded: Whether the seed changes anything; otherwise it is run once, in ``seed0``.
        needs: Arms that have to be done before, at the same seed; their costs are added to this arm's.
        reads: Arms whose results this one reads; they are done before, at the same seed, and their costs are their own.
        hidden: Left out of tables and plots (a shared pre-training, say); run where it is needed, or ``main``.
    """

    name: str
    title: str
    run: Callable[[ArmContext], None]
    main: bool = True
    seeded: bool = True
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    hidden: bool = False

    @property
    def after(self) -> tuple[str, ...]:
        """Arms that have to be done before."""
        return (*self.needs, *self.reads)


@dataclass(frozen=True)
class Experiment:
    """Arms and what is claimed about them.

    Args:
        name: Name of the experiment and of its folder.
        arms: Arms in the order of the table; an arm stands after those that it needs.
        claims: Comparisons to decide.
        table_metrics: Metrics shown in tables and plots.
        fingerprint: Text that changes whenever results would: the configuration of this scale, printed.
        curves: Names of recorded curves to plot; those of ``val/<table metric>`` if empty.
        jobs: Runs at a time that make the best of this machine; more than 1 where models are too small for its cores.
        notes: Further notes under the report's tables.
        figures: Draws further figures of the report: from the folders of each arm that was run, by its name, to
            matplotlib's figures by caption.
    """

    name: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    table_metrics: tuple[str, ...]
    fingerprint: str
    curves: tuple[str, ...] = ()
    jobs: int = 1
    notes: tuple[str, ...] = ()
    figures: Callable[[Mapping[str, Sequence[Path]]], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        seen: dict[str, Arm] = {}
        for arm in self.arms:
            if arm.name in seen:
                raise ValueError(f"experiment '{self.name}' has two arms called '{arm.name}'")
            for needed in arm.after:
                if needed not in seen:
                    raise ValueError(f"arm '{arm.name}' needs '{needed}', which does not stand before it")
                if seen[needed].seeded and not arm.seeded:
                    raise ValueError(f"arm '{arm.name}' has no seed but needs '{needed}', which has one")
            seen[arm.name] = arm
        for claim in self.claims:
            for name in (claim.arm, claim.baseline):
                if name not in seen:
                    raise ValueError(f"claim '{claim.text}' names an unknown arm '{name}'")

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def select(self, arms: str | Sequence[str]) -> tuple[Arm, ...]:
        """Arms to run for ``main``, ``all`` or names, with those that they need, in order.

        Raises:
            InputError: An unknown name, or none.
        """
        names = [arms] if isinstance(arms, str) else list(arms)
        known = [arm.name for arm in self.arms]
        chosen: set[str] = set()
        for name in names:
            if name in ("main", "all"):
                chosen |= {arm.name for arm in self.arms if arm.main or (name == "all" and not arm.hidden)}
            elif name in known:
                chosen.add(name)
            else:
                raise InputError(f"unknown arm '{name}'; use main, all, or some of {', '.join(known)}")
        if not chosen:
            raise InputError(f"no arms to run; use main, all, or some of {', '.join(known)}")
        for arm in reversed(self.arms):
            if arm.name in chosen:
                chosen.update(arm.after)
        return tuple(arm for arm in self.arms if arm.name in chosen)
