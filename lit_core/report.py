"""The report over an experiment's arms: the same numbers as JSON, as Markdown and as tables for the screen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_core.files import write_json, write_text
from lit_core.results import COSTS, Results

if TYPE_CHECKING:
    from rich.table import Table

    from lit_core.intervals import Interval

PACKAGES = ("lit-suite", "torch", "lightning", "transformers", "numpy", "ranx", "bm25s")
VERDICTS = {True: "holds", False: "does not hold", "inconclusive": "inconclusive"}


@dataclass(frozen=True)
class Claim:
    """A comparison that the experiment makes, decided by the interval of the paired difference.

    Args:
        text: The claim in words.
        metric: Metric that decides it.
        arm: Arm that should be better.
        baseline: Arm that it is compared with.
        larger_is_better: Whether larger values of the metric are better.
    """

    text: str
    metric: str
    arm: str
    baseline: str
    larger_is_better: bool = True


@dataclass(frozen=True)
class ArmResults:
    """All runs of an arm that a report covers.

    Args:
        name: Name on the command line and in folder names.
        title: Name in tables and plots.
        seeds: Seeds that were run; a single one for an arm that has no random part.
        runs: Results in the order of ``seeds``.
        seeded: Whether the seed changes anything; otherwise the one run counts for every seed it is compared with.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    runs: tuple[Results, ...]
    seeded: bool = True


def _metric_interval(arm: ArmResults, metric: str) -> tuple["Interval", str]:
    from lit_core.intervals import bootstrap_mean, seed_interval

    if all(metric in run.per_item for run in arm.runs):
        over = "seeds and items" if len(arm.runs) > 1 else "items"
        return bootstrap_mean([run.per_item[metric] for run in arm.runs]), f"bootstrap over {over}"
    return seed_interval([run.metrics[metric] for run in arm.runs]), "t over seeds" if len(arm.runs) > 1 else "none"


def _difference(arm: ArmResults, baseline: ArmResults, metric: str) -> tuple["Interval", str]:
    from lit_core.intervals import paired_difference, seed_difference

    a, b = list(arm.runs), list(baseline.runs)
    if not arm.seeded:
        a *= len(b)
    if not baseline.seeded:
        b *= len(arm.runs)
    if all(metric in run.per_item for run in a + b):
        over = "seeds and items" if len(a) > 1 else "items"
        try:
            interval = paired_difference([run.per_item[metric] for run in a], [run.per_item[metric] for run in b])
        except ValueError as error:
            raise ValueError(f"cannot compare '{arm.name}' with '{baseline.name}': {error}") from None
        return interval, f"paired bootstrap over {over}"
    interval = seed_difference([run.metrics[metric] for run in a], [run.metrics[metric] for run in b])
    return interval, "paired t over seeds" if len(a) > 1 else "none"


def _verdict(difference: "Interval", larger_is_better: bool) -> bool | str:
    low, high = (difference.low, difference.high) if larger_is_better else (-difference.high, -difference.low)
    return True if low > 0 else False if high < 0 else "inconclusive"  # NaN bounds are neither


def _bounds(interval: "Interval") -> list[float] | None:
    return None if math.isnan(interval.low) else [interval.low, interval.high]


def _arm_report(arm: ArmResults) -> dict[str, Any]:
    metrics = {}
    for name in [name for name in arm.runs[0].metrics if all(name in run.metrics for run in arm.runs)]:
        interval, method = _metric_interval(arm, name)
        per_seed = [run.metrics[name] for run in arm.runs]
        mean = math.fsum(per_seed) / len(per_seed)
        metrics[name] = {"mean": mean, "ci95": _bounds(interval), "per_seed": per_seed, "interval": method}
    cost = {name: _mean_cost(arm.runs, name) for name in COSTS}
    seeds = list(arm.seeds)
    return {
        "name": arm.name,
        "title": arm.title,
        "seeded": arm.seeded,
        "seeds": seeds,
        "metrics": metrics,
        "cost": cost,
    }


def _mean_cost(runs: Sequence[Results], name: str) -> float | None:
    known = [run.cost[name] for run in runs if name in run.cost]
    return math.fsum(known) / len(known) if len(known) == len(runs) else None


def _claim_report(claim: Claim, arm: ArmResults, baseline: ArmResults) -> dict[str, Any]:
    interval, method = _difference(arm, baseline, claim.metric)
    return {
        "text": claim.text,
        "metric": claim.metric,
        "arm": claim.arm,
        "baseline": claim.baseline,
        "difference": interval.mean,
        "ci95": _bounds(interval),
        "holds": _verdict(interval, claim.larger_is_better),
        "larger_is_better": claim.larger_is_better,
        "interval": method,
    }


def build_report(
    experiment: str,
    scale: str,
    arms: Sequence[ArmResults],
    claims: Sequence[Claim],
    table_metrics: Sequence[str],
    device: str = "",
    further_notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Gather the arms' results into the report that ``report.json`` holds.

    Costs are means over the seeds; the device is this process's unless one is named. Claims about arms that were not
    run are left out; those whose metric a run lacks are named in the notes. A claim holds if the 95 % interval of the
    paired difference lies on the claimed side of 0, does not hold if it lies on the other one, and is
    ``"inconclusive"`` otherwise, also where a single seed without values of items gives no interval.

    Raises:
        ValueError: Two arms of a claim were measured on different items.
    """
    by_name = {arm.name: arm for arm in arms}
    compared = [claim for claim in claims if _measured(claim, by_name)]
    n_seeds = max((len(arm.runs) for arm in arms if arm.seeded), default=1)
    missing = [claim.text for claim in claims if {claim.arm, claim.baseline} <= set(by_name) and claim not in compared]
    notes = [f"Not measured: {text}." for text in missing]
    notes += ["Costs are means over seeds and include the arms that an arm builds on."]
    if n_seeds == 1 and any(arm.seeded for arm in arms):
        notes.append("One seed: intervals cover the items (queries) only and say nothing about other seeds.")
    if any(not arm.seeded for arm in arms) and any(arm.seeded for arm in arms):
        notes.append("Arms without a random part are run once and compared with every seed of the others.")
    return {
        "experiment": experiment,
        "scale": scale,
        "device": device or device_name(),
        "versions": versions(),
        "table_metrics": list(table_metrics),
        "arms": [_arm_report(arm) for arm in arms],
        "claims": [_claim_report(claim, by_name[claim.arm], by_name[claim.baseline]) for claim in compared],
        "notes": [*notes, *further_notes],
    }


def _measured(claim: Claim, arms: Mapping[str, ArmResults]) -> bool:
    both = [arms[name] for name in (claim.arm, claim.baseline) if name in arms]
    return len(both) == 2 and all(claim.metric in run.metrics for arm in both for run in arm.runs)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide about results."""
    import platform

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The first accelerator's name, or the CPU with the number of threads used."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {torch.get_num_threads()} threads"


def format_interval(mean: float, ci95: Sequence[float] | None, signed: bool = False) -> str:
    """``0.812 [0.790, 0.834]``, with a sign if asked, without brackets if there is no interval."""
    number = "{:+.3f}" if signed else "{:.3f}"
    return number.format(mean) + ("" if ci95 is None else " [" + ", ".join(map(number.format, ci95)) + "]")


def format_seconds(seconds: float) -> str:
    """``0.4 s``, ``41 s``, ``2 min 03 s`` or ``1 h 02 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def format_count(count: float) -> str:
    """``850``, ``12.3k``, ``4.5M`` or ``1.2B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{count:.0f}"


def _or_dash(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)


def arm_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the arms' table, as text."""
    metrics = report["table_metrics"]
    rows = []
    for arm in report["arms"]:
        found = [arm["metrics"].get(name) for name in metrics]
        values = ["-" if entry is None else format_interval(entry["mean"], entry["ci95"]) for entry in found]
        cost = arm["cost"]
        costs = [_or_dash(cost["wall_s"], format_seconds)]
        costs += [_or_dash(cost[name], format_count) for name in ("tokens", "steps")]
        rows.append([arm["title"], *values, str(len(arm["seeds"])), *costs])
    return ["arm", *metrics, "seeds", "time", "tokens", "steps"], rows


def claim_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the claims' table, as text."""
    rows = []
    for claim in report["claims"]:
        metric = claim["metric"] + ("" if claim["larger_is_better"] else " (smaller is better)")
        difference = format_interval(claim["difference"], claim["ci95"], signed=True)
        rows.append([claim["text"], metric, difference, VERDICTS[claim["holds"]]])
    return ["claim", "metric", "difference [95 % interval]", "verdict"], rows


def to_markdown(report: dict[str, Any], figures: Mapping[str, str] | None = None) -> str:
    """The report as Markdown.

    Args:
        report: The report as ``build_report`` returns it.
        figures: Caption and file name of the figures to show.
    """
    parts = [f"# {report['experiment']}", f"Scale `{report['scale']}`, device: {report['device']}.", "## Arms"]
    parts.append("Mean [95 % interval]; metrics first, then the cost of one seed.")
    parts += [_markdown_table(*arm_rows(report))]
    if report["claims"]:
        parts += ["## Claims", _markdown_table(*claim_rows(report))]
    parts += ["## Reading the numbers", "\n".join(f"- {note}" for note in [*_interval_notes(report), *report["notes"]])]
    if figures:
        parts += ["## Figures", *(f"![{caption}]({name})" for caption, name in figures.items())]
    parts += ["## Versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())]
    return "\n\n".join(parts) + "\n"


def _interval_notes(report: dict[str, Any]) -> list[str]:
    shown = [arm["metrics"].get(name) for arm in report["arms"] for name in report["table_metrics"]]
    methods = [entry["interval"] for entry in [*shown, *report["claims"]] if entry is not None]
    named = ", ".join(method for method in dict.fromkeys(methods) if method != "none")
    return [f"Intervals: {named or 'none (a single value each)'}."]


def _markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [headings, rule, *rows]
    )


def console_tables(report: dict[str, Any]) -> list["Table"]:
    """The tables of arms and claims for a terminal."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    colours = {"holds": "green", "does not hold": "red", "inconclusive": "yellow"}
    for title, (headings, rows) in (("arms", arm_rows(report)), ("claims", claim_rows(report))):
        table = Table(title=f"{report['experiment']} ({report['scale']}): {title}", title_justify="left")
        for position, heading in enumerate(headings):
            table.add_column(Text(heading), justify="right" if position and title == "arms" else "left")
        for row in rows:
            table.add_row(*(Text(cell, style=colours.get(cell, "") if title == "claims" else "") for cell in row))
        if rows:
            tables.append(table)
    return tables


def write_report(folder: Path | str, report: dict[str, Any], figures: Mapping[str, str] | None = None) -> Path:
    """Write ``report.json`` and ``report.md`` and return the path of the latter."""
    folder = Path(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", to_markdown(report, figures))
    return folder / "report.md"
