"""What the arms of a reproduction call: fits, tests and collections at one scale, with the user's flags."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_core.cli import Spec, load
from lit_core.errors import InputError
from lit_core.stages import ExperimentCLI

DATA_PATH = re.compile(r"--data\.[\w.]*path\+?=(.+)")
ONE_DEVICE = r"1|\d+,|\[\d+\]"  # ways to write one device, or which one


@dataclass(frozen=True)
class Setting:
    """What an experiment's arms are built from.

    Args:
        spec: The experiment.
        scale: ``smoke``, ``tiny`` or ``paper``.
        flags: ``--model.*``, ``--data.*`` and ``--trainer.*`` for every fit.
        further: Text that results depend on besides, such as that of files which flags name.
    """

    spec: Spec
    scale: str
    flags: tuple[str, ...]
    further: str = ""
    _configs: dict[str | None, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def fingerprint(self) -> str:
        """Text that changes with anything that the results depend on."""
        paths = {path for stage in (None, *self.spec.stages) for path in self.spec.configs(self.scale, stage)}
        return "\n".join(
            [*(f"{path.name}\n{path.read_text()}" for path in sorted(paths)), *self.flags, *self._data(), self.further]
        )

    def _data(self) -> list[str]:
        """Size and time of the files that flags such as ``--data.path`` name: results are not those of changed data."""
        named = [DATA_PATH.fullmatch(flag) for flag in self.flags]
        paths = [path for match in named if match for path in _paths(match[1])]
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        return [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]

    def fit(
        self, folder: Path, seed: int, flags: Sequence[str] = (), stage: str | None = None, spec: Spec | None = None
    ) -> ExperimentCLI:
        """Fit into ``folder``, from its ``last.ckpt`` if an earlier start was cut off.

        Args:
            folder: Where the run writes.
            seed: Seed of data order and of every draw.
            flags: Flags of this arm; they come after the experiment's own and win.
            stage: Stage whose configuration is used.
            spec: Another method than the experiment's, with its own configuration.
        """
        spec = spec or self.spec
        every = [*self.flags, *flags, f"--seed_everything={seed}"]
        if (folder / "last.ckpt").exists():
            every = [flag for flag in every if not flag.startswith("--model.")]
            every.append(f"--ckpt_path={folder / 'last.ckpt'}")
        return ExperimentCLI(spec, ["fit", *every], spec.configs(self.scale, stage), folder, quiet=True)

    def test(self, folder: Path, seed: int, checkpoint: Path, stage: str | None = None) -> ExperimentCLI:
        """Rank the test queries by a checkpoint."""
        flags = [flag for flag in self.flags if not flag.startswith("--model.")]
        args = ["test", *flags, f"--seed_everything={seed}", f"--ckpt_path={checkpoint}"]
        return ExperimentCLI(self.spec, args, self.spec.configs(self.scale, stage), folder, quiet=True)

    def collection(self, folder: Path, seed: int) -> Any:
        """The test collection, for arms without a model."""
        args = ["test", *self.flags, f"--seed_everything={seed}"]
        cli = ExperimentCLI(self.spec, args, self.spec.configs(self.scale), folder, quiet=True, execute=False)
        cli.datamodule.setup("test")
        return cli.datamodule.collection("test")

    def value(self, stage: str | None, name: str) -> Any:
        """A value of the configuration, such as ``trainer.max_steps``."""
        if stage not in self._configs:  # reading it takes a second
            configs = self.spec.configs(self.scale, stage)
            cli = ExperimentCLI(self.spec, ["fit", *self.flags], configs, Path(), quiet=True, execute=False)
            self._configs[stage] = cli.config["fit"]
        return self._configs[stage][name]


def reproduce(spec: Spec, options: argparse.Namespace, flags: list[str]) -> None:
    """Run the arms that are not done yet and write the report."""
    from lit_core.reproduce import run_reproduce

    setting = Setting(spec, options.scale, ("--trainer.devices=1", *_joined(flags)))
    devices = [flag.partition("=")[2] for flag in setting.flags if flag.startswith("--trainer.devices=")][-1]
    if not re.fullmatch(ONE_DEVICE, devices) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"reproduce trains on one device (got {devices}): each process would run all arms; use fit")
    experiment = load(spec.arms)(setting)
    arms = options.arms[0] if options.arms in (["main"], ["all"]) else options.arms
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {options.jobs}")
    performer = Performer(setting, options.runs_dir)
    run_reproduce(
        experiment, options.runs_dir, arms, options.seeds, options.scale, options.fresh, options.jobs, performer
    )


class Performer:
    """Does single runs of an experiment in a process of its own.

    Args:
        setting: What the arms are built from.
        runs_dir: Where all runs go.
    """

    def __init__(self, setting: Setting, runs_dir: Path) -> None:
        self.setting, self.runs_dir = setting, runs_dir
        self.experiment: Any = None  # built where it is used

    def __call__(self, arm: str, seed: int) -> None:
        """Run an arm at a seed."""
        from lit_core.cli import quieten
        from lit_core.reproduce import run_job

        if self.experiment is None:
            quieten()
            self.experiment = load(self.setting.spec.arms)(self.setting)
        run_job(self.experiment, self.runs_dir, self.setting.scale, arm, seed)


def _paths(value: str) -> list[Path]:
    """Paths of a flag, which may have one or a list of them: ``a`` or ``[a, b]``."""
    try:
        found = yaml.safe_load(value) if value.startswith("[") else value
    except yaml.YAMLError:  # the parser of the flags tells what is wrong
        found = value
    return [Path(str(path)) for path in (found if isinstance(found, list) else [value])]


def _joined(flags: Sequence[str]) -> list[str]:
    """``--flag value`` as ``--flag=value``, so that a flag is one string."""
    joined: list[str] = []
    for flag in flags:
        if flag.startswith("--"):
            joined.append(flag)
        elif joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={flag}"
        else:
            raise InputError(f"'{flag}' belongs to no flag")
    return joined
