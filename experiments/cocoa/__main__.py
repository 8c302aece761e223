"""Wiring of the experiment: ``python -m experiments.cocoa``."""

import sys
from collections.abc import Sequence

from experiments.cocoa import SPEC


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line of this experiment; returns the exit code."""
    from lit_core.cli import main as run

    return run(SPEC, args)


if __name__ == "__main__":
    sys.exit(main())
