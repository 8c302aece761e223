"""What the arms of a reproduction call: fits, tests and collections at one scale, with the user's flags."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_core.cli import Spec, load
from lit_core.errors import InputError
from lit_core.stages import ExperimentCLI


@dataclass(frozen=True)
class Setting:
    """What an experiment's arms are built from.

    Args:
        spec: The experiment.
        scale: ``smoke``, ``tiny`` or ``paper``.
        flags: ``--model.*``, ``--data.*`` and ``--trainer.*`` for every fit.
    """

    spec: Spec
    scale: str
    flags: tuple[str, ...]

    def fingerprint(self) -> str:
        """Text that changes with anything that the results depend on."""
        paths = {path for stage in (None, *self.spec.stages) for path in self.spec.configs(self.scale, stage)}
        return "\n".join([*(f"{path.name}\n{path.read_text()}" for path in sorted(paths)), *self.flags])

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
        args = ["fit", *self.flags]
        cli = ExperimentCLI(self.spec, args, self.spec.configs(self.scale, stage), Path(), quiet=True, execute=False)
        return cli.config["fit"][name]


def reproduce(spec: Spec, options: argparse.Namespace, flags: list[str]) -> None:
    """Run the arms that are not done yet and write the report."""
    from lit_core.reproduce import run_reproduce

    experiment = load(spec.arms)(Setting(spec, options.scale, tuple(_joined(flags))))
    arms = options.arms[0] if options.arms in (["main"], ["all"]) else options.arms
    run_reproduce(experiment, options.runs_dir, arms, options.seeds, options.scale, options.fresh)


def _joined(flags: Sequence[str]) -> list[str]:
    """``--flag value`` as ``--flag=value``, so that a flag is one string."""
    joined: list[str] = []
    for flag in flags:
        if flag.startswith("--"):
            joined.append(flag)
        elif joined and "=" not in joined[-1]:
            joined[-1] += f"={flag}"
        else:
            raise InputError(f"'{flag}' belongs to no flag")
    return joined
