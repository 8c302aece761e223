"""Figures of a report: arms with intervals, training curves, differences; as PNG files and in TensorBoard."""

import re
import struct
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_core.files import atomic_path, read_json
from lit_core.report import VERDICTS, format_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[Sequence[float]]  # [[x, value], ...] of one run

# the Okabe-Ito palette, told apart by colour-blind readers, without its yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, QUIET, GRID = "#222222", "#666666", "#E4E4E4"
VERDICT_COLOURS = {True: "#0072B2", False: "#D55E00", "inconclusive": QUIET}
RGBA = 4  # channels of matplotlib's PNG files
UNLIKE = 20  # differences that are so many times larger than others would hide them
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "savefig.dpi": 150,
}


@contextmanager
def canvas(width: float, height: float, title: str, subtitle: str) -> Iterator[tuple["Figure", "Axes"]]:
    """A figure of this size in inches with one plot; drawn without pyplot, so without a window or global state."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        figure.text(0.012, 1 - 0.36 / height, subtitle, va="center", fontsize=9, color=QUIET)
        axes.set_title(" ", fontsize=10)  # room for the subtitle
        yield figure, axes


def _rows(axes: "Axes", labels: Sequence[str], values: Sequence[str]) -> None:
    """One row for each label, first on top, with the values as text to the right of the plot."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 44) for label in labels], color=INK)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    for row, value in enumerate(values):
        axes.text(
            1.03, row, value, transform=axes.get_yaxis_transform(), va="center", fontfamily="monospace", fontsize=9
        )


def bar_with_intervals(report: Mapping[str, Any], metric: str) -> "Figure":
    """Every arm's mean of a metric with its interval, and its seeds as open circles.

    Args:
        report: Content of ``report.json``.
        metric: Name of a metric; arms without it are left out.

    Raises:
        ValueError: No arm has the metric.
    """
    found = [(index, arm) for index, arm in enumerate(report["arms"]) if metric in arm["metrics"]]
    if not found:
        raise ValueError(f"no arm has the metric '{metric}'")
    entries = [arm["metrics"][metric] for _, arm in found]
    several = any(len(entry["per_seed"]) > 1 for entry in entries)
    subtitle = "mean and 95 % interval" + ("; circles: single seeds" if several else "")
    with canvas(8.0, 1.3 + 0.42 * len(found), metric, subtitle) as (figure, axes):
        for row, ((index, _), entry) in enumerate(zip(found, entries, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            if entry["ci95"] is not None:
                axes.plot(entry["ci95"], [row, row], color=colour, linewidth=2.5, solid_capstyle="round", alpha=0.55)
            if len(entry["per_seed"]) > 1:
                below = [row + 0.24] * len(entry["per_seed"])
                axes.scatter(entry["per_seed"], below, s=18, facecolors="white", edgecolors=colour, linewidths=1.0)
            axes.scatter([entry["mean"]], [row], s=46, color=colour, zorder=4)
        labels = [arm["title"] for _, arm in found]
        _rows(axes, labels, [format_interval(entry["mean"], entry["ci95"]) for entry in entries])
    return figure


def differences(report: Mapping[str, Any]) -> "Figure":
    """Every claim's difference, arm minus baseline, with its interval around 0.

    Raises:
        ValueError: The report holds no claims.
    """
    claims = report["claims"]
    if not claims:
        raise ValueError("the report holds no claims")
    with canvas(8.0, 1.35 + 0.56 * len(claims), "Claims", "difference, arm minus baseline; 95 % interval") as (
        figure,
        axes,
    ):
        axes.axvline(0.0, color=INK, linewidth=1.0)
        values, labels = [], []
        for row, claim in enumerate(claims):
            colour = VERDICT_COLOURS[claim["holds"]]
            if claim["ci95"] is not None:
                axes.plot(claim["ci95"], [row, row], color=colour, linewidth=2.5, solid_capstyle="round", alpha=0.55)
            axes.scatter([claim["difference"]], [row], s=46, color=colour, zorder=4)
            values.append(
                format_interval(claim["difference"], claim["ci95"], signed=True) + f"\n{VERDICTS[claim['holds']]}"
            )
            smaller = "" if claim["larger_is_better"] else ", smaller is better"
            labels.append(f"{claim['text']} ({claim['metric']}{smaller})")
        _rows(axes, labels, values)
        reaches = sorted(filter(None, (max(map(abs, [c["difference"], *(c["ci95"] or [])])) for c in claims)))
        if reaches and reaches[-1] > UNLIKE * reaches[0]:  # shares beside lengths, say: each is to be seen
            middle = reaches[(len(reaches) - 1) // 2]
            axes.set_xscale("symlog", linthresh=middle)
            decades = [10.0**power for power in range(-6, 7) if middle < 10.0**power <= reaches[-1]]
            ticks = [*(-value for value in reversed(decades)), 0.0, *decades]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        for text, claim in zip(axes.texts, claims, strict=True):
            text.set_color(VERDICT_COLOURS[claim["holds"]])
    return figure


def curves(
    runs: Mapping[str, Sequence[Points]],
    name: str,
    x_label: str = "optimizer steps",
    colours: Mapping[str, str] | None = None,
) -> "Figure":
    """A recorded value over training: for each arm the mean line over its seeds and their range as a band.

    Seeds are read off by linear interpolation at the first seed's positions, as far as all of them reach.

    Args:
        runs: For each arm's title the points ``[[x, value], ...]`` of each of its seeds.
        name: Name of the value.
        x_label: What ``x`` counts.
        colours: Colour of each title; by order of the palette if not given.

    Raises:
        ValueError: An arm without seeds or a seed without points.
    """
    import numpy as np

    several = any(len(seeds) > 1 for seeds in runs.values())
    with canvas(8.0, 4.2, name, "mean over seeds; band: range of the seeds" if several else "one seed") as (
        figure,
        axes,
    ):
        ends = []
        for index, (title, seeds) in enumerate(runs.items()):
            if not seeds or not all(len(points) for points in seeds):
                raise ValueError(f"arm '{title}' has no points of '{name}'")
            tables = [np.asarray(sorted(map(tuple, points)), dtype=float) for points in seeds]
            x = tables[0][:, 0]
            x = x[(x >= max(table[0, 0] for table in tables)) & (x <= min(table[-1, 0] for table in tables))]
            values = np.stack([np.interp(x, table[:, 0], table[:, 1]) for table in tables])
            colour = (colours or {}).get(title, COLOURS[index % len(COLOURS)])
            dashes = ("-", "--", ":")[index // len(COLOURS) % 3]
            marker = "o" if len(x) <= 25 else ""
            axes.plot(x, values.mean(0), dashes, color=colour, linewidth=1.8, marker=marker, markersize=3.5)
            if len(tables) > 1:
                axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            if len(x):
                ends.append((float(values[:, -1].mean()), title, colour))
        axes.set_xlabel(x_label)
        axes.margins(x=0.02)
        _label_ends(axes, ends)
    return figure


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Write each line's name beside its last value, moved apart where they would cover one another."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap, placed = 0.065, list[float]()
    for value, _, _ in sorted(ends):
        wanted = (value - low) / (high - low)
        placed.append(max(wanted, placed[-1] + gap) if placed else wanted)
    overflow = max(0.0, placed[-1] - 1.0) if placed else 0.0
    for index in reversed(range(len(placed))):  # push down what stands above the plot, and what is below it in turn
        ceiling = 1.0 if index == len(placed) - 1 else placed[index + 1] - gap
        placed[index] = min(placed[index], ceiling) if overflow else placed[index]
    for height, (_, title, colour) in zip(placed, sorted(ends), strict=True):
        text = textwrap.shorten(title, 40, placeholder="…")
        axes.text(1.015, height, text, transform=axes.transAxes, va="center", color=colour, fontsize=9)


def file_name(name: str) -> str:
    """``val/ndcg@10`` as part of a file name: ``val_ndcg_10``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")


def log_pictures(folder: Path | str, pictures: Mapping[str, Path]) -> None:
    """Write PNG files as TensorBoard images into ``folder``, in place of those of an earlier report."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
    from torch.utils.tensorboard import FileWriter

    folder = Path(folder)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = FileWriter(str(folder))
    for name, path in pictures.items():
        content = path.read_bytes()  # as it is: to draw it again would take as long as at first
        width, height = struct.unpack(">II", content[16:24])
        image = Summary.Image(height=height, width=width, colorspace=RGBA, encoded_image_string=content)
        writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]))
    writer.close()


def write_figures(
    root: Path | str,
    report: Mapping[str, Any],
    folders: Mapping[str, Sequence[Path]],
    curve_names: Sequence[str],
    further: Mapping[str, "Figure"] | None = None,
) -> dict[str, str]:
    """Draw a report's figures: PNG files in ``root`` and images in ``root/tensorboard``.

    Args:
        root: Folder of the report.
        report: Content of ``report.json``.
        folders: For each arm's title the folders of its seeds, whose ``curves.json`` are drawn where they exist.
        curve_names: Names of the curves to draw; those that no arm recorded are left out.
        further: Figures of the experiment's own, by caption.

    Returns:
        Caption and file name of each figure.
    """
    root = Path(root)
    figures: dict[str, Figure] = {}
    for metric in report["table_metrics"]:
        if any(metric in arm["metrics"] for arm in report["arms"]):
            figures[metric] = bar_with_intervals(report, metric)
    if report["claims"]:
        figures["claims"] = differences(report)
    colours = {arm["title"]: COLOURS[index % len(COLOURS)] for index, arm in enumerate(report["arms"])}
    recorded = {
        title: [read_json(path / "curves.json") for path in paths if (path / "curves.json").exists()]
        for title, paths in folders.items()
    }
    for name in curve_names:
        runs = {title: [run[name] for run in seeds if run.get(name)] for title, seeds in recorded.items()}
        runs = {title: seeds for title, seeds in runs.items() if seeds}
        if runs:
            figures[f"{name} over training"] = curves(runs, name, colours=colours)
    figures |= further or {}
    names = {caption: f"{file_name(caption)}.png" for caption in figures}
    for caption, figure in figures.items():
        with atomic_path(root / names[caption]) as temporary:
            figure.savefig(temporary, format="png", bbox_inches="tight", facecolor="white")
    if figures:
        log_pictures(root / "tensorboard", {f"report/{caption}": root / name for caption, name in names.items()})
    return names
