"""Wall time until the command line answers: ``python -m benchmarks.startup``."""

import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.harness import announce, arguments, print_table

COMMANDS = (
    (("experiments",), 2.0),
    (("experiments.llm_ql", "--help"), 2.0),
    (("experiments.llm_ql", "fit", "--help"), 12.0),
)


def compare(command: tuple[str, ...], limit: float, repetitions: int) -> dict[str, Any]:
    """Row of the table for one command; it must succeed and print something."""
    seconds, answered = [], True
    for _ in range(repetitions):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        answered = answered and done.returncode == 0 and bool(done.stdout.strip())
    median = statistics.median(seconds)
    return {
        "command": f"python -m {' '.join(command)}",
        "wall s": median,
        "least": min(seconds),
        "most": max(seconds),
        "limit": limit,
        "reached": median < limit,
        "answered": answered,
    }


def main() -> int:
    """Time each command; 1 where one fails."""
    settings = arguments(__doc__)
    repetitions = 1 if settings.quick else 3
    announce("Start-up", ("torch", "lightning"), settings.threads, f"wall seconds, median of {repetitions}")
    rows = [compare(command, limit, repetitions) for command, limit in COMMANDS]
    print_table(rows)
    return 0 if all(row["answered"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
