"""What each coefficient does: success, entropy inside the region, and the mass that leaks into the tail."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_core.files import atomic_path, write_json, write_text
from lit_core.plots import curves

METRICS = ("success", "pass@4", "invalid", "entropy", "region_entropy", "tail_mass", "distinct_correct")
DRAWN = {
    "success": "Success",
    "region_entropy": "Entropy inside the region (nats)",
    "tail_mass": "Mass in the tail (log10)",
}
SMALLEST = 1e-6  # mass that is drawn


@dataclass(frozen=True)
class Trial:
    """One run with one coefficient.

    Args:
        term: Title of the exploration term.
        coefficient: Its weight.
        metrics: On the validation problems, after training.
    """

    term: str
    coefficient: float
    metrics: Mapping[str, float]


def write_sweep(folder: Path, trials: Sequence[Trial]) -> None:
    """Write ``sweep.json``, ``sweep.md`` and a figure for each of three metrics."""
    rows = [{"term": trial.term, "coefficient": trial.coefficient, **trial.metrics} for trial in trials]
    write_json(folder / "sweep.json", rows)
    lines = ["| term | coefficient | " + " | ".join(METRICS) + " |", "|---|---:|" + "---:|" * len(METRICS)]
    for trial in trials:
        values = " | ".join(f"{trial.metrics[name]:.4f}" for name in METRICS)
        lines.append(f"| {trial.term} | {trial.coefficient:g} | {values} |")
    text = "# Coefficients\n\nOne run each, on validation problems; the best success chooses the coefficient.\n\n"
    figures = "\n\n".join(f"![{title}](sweep_{name}.png)" for name, title in DRAWN.items())
    write_text(folder / "sweep.md", text + "\n".join(lines) + f"\n\n{figures}\n")
    for name, title in DRAWN.items():
        _draw(folder / f"sweep_{name}.png", trials, name, title)


def _draw(path: Path, trials: Sequence[Trial], metric: str, title: str) -> None:
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    for trial in trials:
        (points,) = lines.setdefault(trial.term, [[]])
        value = trial.metrics[metric]
        points.append((trial.coefficient, math.log10(max(value, SMALLEST)) if metric == "tail_mass" else value))
    figure = curves(lines, title, "coefficient")
    (axes,) = figure.axes
    axes.set_xscale("log")
    ticks = sorted({trial.coefficient for trial in trials})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", facecolor="white")
