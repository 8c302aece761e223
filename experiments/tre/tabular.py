"""The tabular study: which exploration bonus gets a policy out of a habit without feeding the vocabulary's tail.

It repeats the table of the TRE card, section 7.1, in ten seconds for three seeds on one core. The task is built so
that the habit and the better token are the two most probable ones; it shows a mechanism, it does not rank methods.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lit_core.files import atomic_path, read_json, write_json, write_text
from lit_core.intervals import Interval, seed_difference, seed_interval
from lit_core.plots import COLOURS, curves
from lit_core.progress import track
from lit_core.report import versions
from lit_rl.tabular.ppo import TabularSettings, Term, run
from lit_rl.tabular.problem import TabularProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERMS: Mapping[str, tuple[Term | None, tuple[float, ...]]] = {  # coefficients of the card
    "no bonus": (None, (0.0,)),
    "entropy": (Term(), (0.001, 0.003, 0.01, 0.03)),
    "TRE-K2": (Term(top_k=2), (0.001, 0.003, 0.01, 0.03)),
    "TRE-K2 without the factor": (Term(top_k=2, scale="none"), (0.03, 0.1)),
    "TRE-P.99": (Term(top_p=0.99), (0.01, 0.03)),
}
METRICS = {"reward": 3, "valid": 3, "tail_mass": 4, "entropy": 3}  # and the decimals that they are shown with
LABELS = {"reward": "Expected reward", "tail_mass": "Tail mass"}
TERM_COLOURS = dict(zip(TERMS, COLOURS, strict=False))
FIGURES = {
    "tabular_reward.png": "Expected reward over the iterations, best coefficient of each bonus",
    "tabular_reward_by_coefficient.png": "Expected reward by coefficient",
    "tabular_tail_mass.png": "Tail mass over the iterations, best coefficient of each bonus",
    "tabular_tail_mass_by_coefficient.png": "Tail mass by coefficient",
}
PARTS = {
    "main": "Bonus and coefficient",
    "horizon": "Length of the sequence",
    "region": "Size of the region",
    "third": "The better token ranked third, tied with the fourth",
    "adam_eps": "Adam's epsilon at 1e-5 instead of 1e-8",
    "mass": "TRE-K2 with the mass-preserving gradient",
}
NOTES = (
    "The task is built so that the habit and the better token are both in the top 2. That favours K = 2.",
    "Rewards, valid shares and tail masses are exact expectations under the final policy, not sampled.",
    "Intervals are Student's t over seeds. One far wider than the others, or beyond 0 or 1, means that some seeds left "
    "the habit and others did not.",
    "The best coefficient is chosen by the very runs that are shown.",
    "How far the tail follows the full entropy depends on Adam's epsilon, which is 1e-8 unless said otherwise; the "
    "extended study has it at 1e-5.",
)


@cache
def _version() -> str:
    return versions().get("lit-suite", "")


@dataclass(frozen=True)
class Case:
    """One setting of the study: a row of a table."""

    part: str
    title: str
    term: Term | None
    coefficient: float
    problem: TabularProblem
    settings: TabularSettings

    def fingerprint(self, seed: int) -> str:
        """Text that is equal only for runs with equal results."""
        term = self.term and asdict(self.term)
        parts = [asdict(self.problem), term, self.coefficient, asdict(self.settings), seed, _version()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def main_cases(problem: TabularProblem, settings: TabularSettings) -> Iterator[Case]:
    """The card's table."""
    for title, (term, coefficients) in TERMS.items():
        for coefficient in coefficients:
            yield Case("main", title, term, coefficient, problem, settings)


def more_cases(problem: TabularProblem, settings: TabularSettings) -> Iterator[Case]:
    """Where the table's picture ends: other lengths, regions, ranks, and how the gradient is taken and followed."""
    region = Term(top_k=2)
    for length in (4, 12, 24):
        other = replace(problem, positions=length)
        yield Case("horizon", f"no bonus, T = {length}", None, 0.0, other, settings)
        yield Case("horizon", f"entropy, T = {length}", Term(), 0.003, other, settings)
        yield Case("horizon", f"entropy, T = {length}", Term(), 0.01, other, settings)
        yield Case("horizon", f"TRE-K2, T = {length}", region, 0.003, other, settings)
    for top_k in (2, 3, 4, 8, 16):
        yield Case("region", f"TRE-K{top_k}", Term(top_k=top_k), 0.003, problem, settings)
    for top_k in (2, 3, 4, 8):  # at 0.003 none of them leaves the habit
        yield Case("third", f"TRE-K{top_k}", Term(top_k=top_k), 0.01, replace(problem, better_rank=3), settings)
    coarse = replace(settings, adam_eps=1e-5)
    for coefficient in (0.003, 0.01, 0.03):
        yield Case("adam_eps", "entropy", Term(), coefficient, problem, coarse)
        yield Case("adam_eps", "TRE-K2", region, coefficient, problem, coarse)
        yield Case("mass", "TRE-K2", replace(region, mass_preserving=True), coefficient, problem, settings)


def study(folder: Path, seeds: Sequence[int], quick: bool = False, extended: bool = False) -> dict[str, Any]:
    """Run the study and write ``tabular.json``, ``tabular.md`` and the figures.

    Runs that ``tabular.json`` holds already are not repeated; it is written after every setting.

    Args:
        folder: Where the files go.
        seeds: Seeds of every setting.
        quick: A tiny task for a few iterations, to see that everything works; the numbers mean nothing.
        extended: Also the settings of :func:`more_cases`.

    Returns:
        ``rows``, one for each setting, ``best``, one for each bonus of the main table, ``notes`` and ``figures``.

    Raises:
        ValueError: No seeds, or one of them twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"need different seeds, at least one, got {list(seeds)}")
    problem, settings = TabularProblem(), TabularSettings()
    if quick:
        problem = replace(problem, positions=4, vocabulary=100)
        settings = replace(settings, iterations=10, samples=64, record_every=5)
    cases = list(main_cases(problem, settings)) + (list(more_cases(problem, settings)) if extended else [])
    runs = _run_missing(folder / "tabular.json", cases, seeds)
    rows = [_row(case, [case.fingerprint(seed) for seed in seeds], runs) for case in cases]
    notes = [*(["A quick run: the numbers mean nothing."] if quick else []), *NOTES]
    report = {"seeds": list(seeds), "rows": rows, "best": _best(rows), "notes": notes, "figures": FIGURES}
    write_json(folder / "tabular.json", {**report, "runs": runs})
    _draw(folder, report, runs)
    write_text(folder / "tabular.md", to_markdown(report))
    return report


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: a table for each part, the best of the main one, notes and figures."""
    parts = ["# Tabular study", f"Seeds: {', '.join(map(str, report['seeds']))}. Mean [95 % interval]."]
    for part, title in PARTS.items():
        rows = [row for row in report["rows"] if row["part"] == part]
        if rows:
            shown = [[_shown(row["metrics"][name], digits) for name, digits in METRICS.items()] for row in rows]
            named = [[row["title"], f"{row['coefficient']:g}", *cells] for row, cells in zip(rows, shown, strict=True)]
            parts += [f"## {title}", _table(["bonus", "coefficient", *METRICS], named)]
    best = [[one["title"], f"{one['coefficient']:g}", _shown(one["gain"], 3)] for one in report["best"]]
    parts += ["## Best coefficient of each bonus", _table(["bonus", "coefficient", "reward, minus no bonus"], best)]
    parts += ["## Reading the numbers", "\n".join(f"- {note}" for note in report["notes"])]
    parts += ["## Figures", *(f"![{caption}]({name})" for name, caption in report["figures"].items())]
    return "\n\n".join(parts) + "\n"


def _run_missing(path: Path, cases: Sequence[Case], seeds: Sequence[int]) -> dict[str, Any]:
    """Results of all runs by fingerprint, those of earlier calls included."""
    earlier = read_json(path) if path.exists() else {}
    runs: dict[str, Any] = earlier.get("runs", {})
    missing = [case for case in cases if any(case.fingerprint(seed) not in runs for seed in seeds)]
    for case in track(missing, "tabular study", unit="setting"):
        wanted = [seed for seed in seeds if case.fingerprint(seed) not in runs]
        for found in run(case.problem, case.term, case.coefficient, wanted, case.settings) if wanted else []:
            runs[case.fingerprint(found.seed)] = asdict(found)
        write_json(path, {**earlier, "runs": runs})
    return runs


def _row(case: Case, fingerprints: Sequence[str], runs: Mapping[str, Any]) -> dict[str, Any]:
    finals = {name: [runs[key]["curves"][name][-1] for key in fingerprints] for name in METRICS}
    metrics = {name: {**_entry(seed_interval(values)), "per_seed": values} for name, values in finals.items()}
    named = {"part": case.part, "title": case.title, "coefficient": case.coefficient}
    return {**named, "metrics": metrics, "runs": list(fingerprints)}


def _best(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each bonus of the main table the coefficient with the highest reward, and what it gains, paired by seed."""
    best = []
    for title in list(TERMS)[1:]:
        candidates = [row for row in rows if (row["part"], row["title"]) == ("main", title)]
        row = max(candidates, key=lambda row: row["metrics"]["reward"]["mean"])
        gain = seed_difference(*(one["metrics"]["reward"]["per_seed"] for one in (row, rows[0])))
        best.append({**{key: row[key] for key in ("title", "coefficient", "runs")}, "gain": _entry(gain)})
    return best


def _draw(folder: Path, report: Mapping[str, Any], runs: Mapping[str, Any]) -> None:
    main = [row for row in report["rows"] if row["part"] == "main"]
    figures = {}
    for metric in ("reward", "tail_mass"):
        figures[f"tabular_{metric}.png"] = _over_iterations(metric, [main[0], *report["best"]], runs)
        figures[f"tabular_{metric}_by_coefficient.png"] = _by_coefficient(metric, main[0], main[1:])
    for name, figure in figures.items():
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, format="png", bbox_inches="tight", facecolor="white")


def _over_iterations(metric: str, rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Any]) -> "Figure":
    lines, colours = {}, {}
    for row in rows:
        title = f"{row['title']}, {row['coefficient']:g}" if row["coefficient"] else row["title"]
        found = [runs[key] for key in row["runs"]]
        lines[title] = [list(zip(one["iterations"], one["curves"][metric], strict=True)) for one in found]
        colours[title] = TERM_COLOURS[row["title"]]
    return curves(lines, f"{LABELS[metric]}, best coefficients", "PPO iterations", colours)


def _by_coefficient(metric: str, none: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> "Figure":
    def per_seed(row: Mapping[str, Any]) -> list[float]:
        values: list[float] = row["metrics"][metric]["per_seed"]
        return [math.log10(value) for value in values] if metric == "tail_mass" else values

    lines: dict[str, list[list[tuple[float, float]]]] = {}
    for row in rows:
        values = per_seed(row)
        seeds = lines.setdefault(row["title"], [[] for _ in values])
        for points, value in zip(seeds, values, strict=True):
            points.append((row["coefficient"], value))
    name = f"{LABELS[metric]} of the final policy" + (", log10" if metric == "tail_mass" else "")
    figure = curves(lines, name, "coefficient", TERM_COLOURS)
    (axes,) = figure.axes
    axes.set_xscale("log")
    ticks = sorted({row["coefficient"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    level, colour = fmean(per_seed(none)), TERM_COLOURS[none["title"]]
    axes.axhline(level, color=colour, linestyle="--", linewidth=1.0)
    across = axes.get_yaxis_transform()  # x as a share of the width
    axes.text(0.99, level, none["title"], color=colour, transform=across, ha="right", va="bottom", fontsize=9)
    return figure


def _entry(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "ci95": None if math.isnan(interval.low) else [interval.low, interval.high]}


def _shown(entry: Mapping[str, Any], digits: int) -> str:
    bounds = entry["ci95"] and ", ".join(f"{bound:.{digits}f}" for bound in entry["ci95"])
    return f"{entry['mean']:.{digits}f}" + (f" [{bounds}]" if bounds else "")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *rows])
