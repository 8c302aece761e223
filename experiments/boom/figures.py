"""Figures of the BOOM experiment: in-domain against out-of-domain, updates, drift by layer, gains of pairs."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.boom.pairs import GAINS
from experiments.boom.training import BASE, EXPORT, FULL
from lit_core.files import read_json
from lit_core.plots import COLOURS, INK, canvas
from lit_core.results import read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Folders = Mapping[str, Sequence[Path]]
UPDATES = ("old", "updated", "naive", "with_core", "update", "updated_twice", FULL)
NAMED = 14  # points with their names beside them; more have numbers and a list
DRIFTED = ("m20", "m40", "m60", "m80", FULL)


def figures(folders: Folders) -> Mapping[str, "Figure"]:
    """Draw the figures of the arms that were run."""
    means = {name: _means(paths) for name, paths in folders.items()}
    found: dict[str, Figure] = {}
    placed = {name: of for name, of in means.items() if {"in_domain", "out_of_domain", "cost"} <= of.keys()}
    if len(placed) > 1:
        found["In-domain against out-of-domain"] = domains(placed)
    updates = {name: means[name] for name in UPDATES if {"old_tasks", "new_tasks"} <= means.get(name, {}).keys()}
    if len(updates) > 1:
        found["What an update keeps and learns"] = updates_figure(updates)
    members = {name: folders[name][0] / EXPORT for name in DRIFTED if name in folders}
    if len(members) > 1 and BASE in folders and all(path.exists() for path in members.values()):
        from lit_core.merging import drift, drift_figure

        report = drift(members, folders[BASE][0] / EXPORT)
        found["Drift by layer"] = drift_figure(report)
        found["Directions by layer"] = drift_figure(report, "cosine")
    if "gains" in folders:
        found["Gains of pairs of sets"] = gains_figure(read_json(folders["gains"][0] / GAINS))
    return found


def _means(paths: Sequence[Path]) -> dict[str, float]:
    runs = [read_results(path).metrics for path in paths]
    return {name: fmean(run[name] for run in runs) for name in runs[0] if all(name in run for run in runs)}


def domains(means: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Each model by what it scores in and out of domain; the area of a point is what it cost.

    Args:
        means: Of each arm ``in_domain``, ``out_of_domain`` and ``cost``.
    """
    subtitle = "mean over seeds; the area of a point is its cost in runs over all data"
    labels = _labels(means)
    numbered = len(labels) > NAMED
    with canvas(12.5 if numbered else 8.4, 6.0, "In-domain against out-of-domain", subtitle) as (figure, axes):
        for number, of in enumerate(means.values()):
            colour, size = COLOURS[number % len(COLOURS)], _size(of)
            axes.scatter([of["in_domain"]], [of["out_of_domain"]], s=size, color=colour, alpha=0.6, linewidths=0)
        for number, (names, (x, y), size) in enumerate(labels, start=1):
            text, beside = (str(number), 2.0) if numbered else (", ".join(names), 5.0)
            axes.annotate(text, (x, y), xytext=(beside + math.sqrt(size) / 2, 3), textcoords="offset points",
                          fontsize=7 if numbered else 8, color=INK)  # fmt: skip
        if numbered:
            lines = [textwrap.fill(f"{number}  {', '.join(names)}", 34, subsequent_indent="     ")
                     for number, (names, _, _) in enumerate(labels, start=1)]  # fmt: skip
            half = (len(lines) + 1) // 2
            for place, part in ((1.02, lines[:half]), (1.3, lines[half:])):
                axes.text(place, 1.0, "\n".join(part), transform=axes.transAxes, va="top", fontsize=7, color=INK)
        axes.set_xlabel("in-domain")
        axes.set_ylabel("out-of-domain")
        axes.margins(0.12)
    return figure


def _size(of: Mapping[str, float]) -> float:
    return 24 + 70 * of["cost"]


def _labels(means: Mapping[str, Mapping[str, float]]) -> list[tuple[list[str], tuple[float, float], float]]:
    """Names, place and size of each point; points that lie on one another share a label."""
    spans = [max(of[axis] for of in means.values()) - min(of[axis] for of in means.values()) or 1.0
             for axis in ("in_domain", "out_of_domain")]  # fmt: skip
    found: list[tuple[list[str], tuple[float, float], float]] = []
    for name, of in means.items():
        place = of["in_domain"], of["out_of_domain"]
        for names, other, _ in found:
            if all(abs(a - b) < 0.01 * span for a, b, span in zip(place, other, spans, strict=True)):
                names.append(name)
                break
        else:
            found.append(([name], place, _size(of)))
    return found


def updates_figure(means: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Scores of old and new tasks over the cost of an update.

    Args:
        means: Of each arm ``old_tasks``, ``new_tasks`` and ``cost``.
    """
    subtitle = "mean over seeds; old and new tasks of a model are joined"
    taken: list[float] = []
    with canvas(8.4, 4.6, "What an update keeps and learns", subtitle) as (figure, axes):
        for number, (name, of) in enumerate(means.items()):
            colour, cost = COLOURS[number % len(COLOURS)], 0.0 if name == "old" else of["cost"]
            while cost in taken:
                cost += 0.025  # beside a model of the same cost
            taken.append(cost)
            axes.plot([cost, cost], [of["old_tasks"], of["new_tasks"]], color=colour, linewidth=1.2, alpha=0.7)
            axes.scatter([cost], [of["old_tasks"]], color=colour, s=46)
            axes.scatter([cost], [of["new_tasks"]], facecolors="white", edgecolors=colour, s=46, zorder=3)
            axes.annotate(
                name, (cost, of["old_tasks"]), xytext=(6, 3), textcoords="offset points", fontsize=8, color=INK
            )
        axes.scatter([], [], color=INK, s=46, label="old tasks")
        axes.scatter([], [], facecolors="white", edgecolors=INK, s=46, label="new tasks")
        axes.legend(frameon=False)
        axes.set_xlabel("cost of the update, in runs over all data")
        axes.margins(0.12)
    return figure


def gains_figure(record: Mapping[str, Any]) -> "Figure":
    """A heat map of how much two sets save one another.

    Args:
        record: ``names`` and ``gains``, None on the diagonal.
    """
    import numpy as np

    names = record["names"]
    table = np.array([[math.nan if cell is None else cell for cell in row] for row in record["gains"]])
    reach = float(np.nanmax(np.abs(table))) or 1.0
    subtitle = "relative held-out loss that joint training saves, mean of the two"
    with canvas(3.5 + 0.75 * len(names), 2.4 + 0.42 * len(names), "Gains of pairs of sets", subtitle) as (figure, axes):
        image = axes.imshow(table, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8, color=INK)
        axes.set_yticks(range(len(names)), names, fontsize=8, color=INK)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for (row, column), cell in np.ndenumerate(table):
            if not math.isnan(cell):
                colour = "white" if abs(cell) > 0.6 * reach else INK
                axes.text(column, row, f"{cell:.3f}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(image, ax=axes, fraction=0.05)
    return figure
