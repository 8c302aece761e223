"""Wiring of the experiment: ``python -m experiments.boom``."""

import sys
from collections.abc import Sequence

from experiments.boom import SPEC


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line of this experiment; returns the exit code."""
    from lit_core.cli import main as run

    return run(SPEC, args)


if __name__ == "__main__":
    sys.exit(main())
