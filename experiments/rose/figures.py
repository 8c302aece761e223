"""Figures of the ROSE experiment: where trees branch, learning over tokens, length against alpha, one tree."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lit_core.files import read_json
from lit_core.plots import COLOURS, INK, QUIET, canvas, curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Folders = Mapping[str, Sequence[Path]]
ROLES = ("decision", "connector", "other", "end")
BINS = 20  # of relative positions
TOKENS = "rollout/tokens_total"


def figures(metric: str, alphas: Mapping[float, str]) -> Callable[[Folders], Mapping[str, "Figure"]]:
    """What draws the figures.

    Args:
        metric: Recorded under ``val/`` and drawn over tokens.
        alphas: Arm of each length penalty.
    """

    def draw(folders: Folders) -> Mapping[str, "Figure"]:
        found: dict[str, Figure] = {}
        places = {name: paths[0] for name, paths in folders.items() if (paths[0] / "places.json").exists()}
        if places:
            found["Where trees branch"] = branch_roles(places)
            found["Branch positions"] = branch_positions(places)
        for name in ("val/success", f"val/{metric}", "rollout/reward_mean"):
            runs = over_tokens(folders, name)
            if runs:
                found[f"{name.replace('/', ' ')} over tokens"] = curves(runs, name, "tokens drawn")
        lengths = {alpha: folders[name] for alpha, name in alphas.items() if _has_length(folders.get(name, ()))}
        if len(lengths) > 1:
            found["Length against alpha"] = length_by_alpha(lengths)
        trees = places.get("at_offdiag")
        if trees is not None:
            found["A tree"] = tree_figure(read_json(trees / "trees.json"))
        return found

    return draw


def _has_length(paths: Sequence[Path]) -> bool:
    found = [read_json(path / "results.json")["metrics"] for path in paths]
    return bool(found) and all("correct_length" in metrics for metrics in found)


def branch_roles(places: Mapping[str, Path]) -> "Figure":
    """Share of the branches by the role of the token that is drawn anew, a bar for each score."""
    with canvas(8.0, 0.7 + 0.42 * len(places), "Where trees branch", "share of branches by role of the token") as (
        figure,
        axes,
    ):
        for row, path in enumerate(places.values()):
            counts = read_json(path / "places.json")["roles"]
            total, left = max(1, sum(counts.values())), 0.0
            for colour, role in zip(COLOURS, ROLES, strict=False):
                share = counts.get(role, 0) / total
                axes.barh(row, share, left=left, color=colour, height=0.7, label=role if row == 0 else None)
                if share > 0.06:
                    axes.text(
                        left + share / 2, row, f"{share:.2f}", ha="center", va="center", color="white", fontsize=8
                    )
                left += share
        axes.set_yticks(range(len(places)), [name.removeprefix("at_") for name in places])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        figure.legend(loc="outside lower center", ncols=len(ROLES), frameon=False)
    return figure


def branch_positions(places: Mapping[str, Path]) -> "Figure":
    """Histogram of the branches over the relative position in the parent, a line for each score."""
    import numpy as np

    with canvas(8.0, 4.2, "Branch positions", "share of branches, by position relative to the parent's length") as (
        figure,
        axes,
    ):
        for index, (name, path) in enumerate(places.items()):
            values = np.asarray(read_json(path / "places.json")["relative_positions"])
            heights, edges = np.histogram(values, BINS, (0, 1))
            shares = heights / max(1, len(values))
            axes.stairs(
                shares, edges, color=COLOURS[index % len(COLOURS)], label=name.removeprefix("at_"), linewidth=1.6
            )
        axes.set_xlabel("position / length")
        axes.legend(frameon=False, ncols=2)
    return figure


def over_tokens(folders: Folders, name: str) -> dict[str, list[list[list[float]]]]:
    """A recorded value of each arm's seeds, over the tokens that they have drawn by then, in the mean."""
    import numpy as np

    found: dict[str, list[list[list[float]]]] = {}
    for arm, paths in folders.items():
        recorded = [read_json(path / "curves.json") for path in paths if (path / "curves.json").exists()]
        recorded = [run for run in recorded if run.get(name) and run.get(TOKENS)]
        drawn: dict[float, list[float]] = {}
        for run in recorded:
            steps, tokens = np.asarray([[0.0, 0.0], *run[TOKENS]]).T
            for step, _ in run[name]:
                drawn.setdefault(step, []).append(float(np.interp(step, steps, tokens)))
        for run in recorded:
            found.setdefault(arm, []).append([[fmean(drawn[step]), value] for step, value in run[name]])
    return found


def length_by_alpha(folders: Mapping[float, Sequence[Path]]) -> "Figure":
    """Mean length of correct responses and success, by the length penalty."""
    with canvas(7.0, 4.0, "Length against alpha", "each point a seed; line: mean over seeds") as (figure, axes):
        right = axes.twinx()
        for side, metric, colour in ((axes, "correct_length", COLOURS[0]), (right, "success", COLOURS[1])):
            means = []
            for alpha, paths in sorted(folders.items()):
                values = [read_json(path / "results.json")["metrics"][metric] for path in paths]
                side.plot([alpha] * len(values), values, "o", color=colour, alpha=0.5, markersize=4)
                means.append(fmean(values))
            side.plot(sorted(folders), means, color=colour)
            side.set_ylabel(metric.replace("_", " "), color=colour)
        right.grid(False)
        axes.set_xlabel("length penalty (alpha)")
    return figure


def tree_figure(trees: Sequence[Mapping[str, Any]]) -> "Figure":
    """The first tree with both outcomes: a row a response, what it drew itself, coloured by its advantages."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    tree = next((tree for tree in trees if len({r["reward"] for r in tree["responses"]}) > 1), trees[0])
    responses = tree["responses"]
    most = max((abs(value) for r in responses for value in r["advantages"]), default=0.0) or 1.0
    shade, scale = colormaps["RdBu"], Normalize(-most, most)
    width = max(len(r["pieces"]) for r in responses)
    with canvas(max(8.0, 0.3 * width), 1.2 + 0.5 * len(responses), "A tree", _drawable(tree["prompt"])) as (
        figure,
        axes,
    ):
        axes.grid(False)
        for row, response in enumerate(responses):
            for place in range(response["branch"], len(response["pieces"])):
                value = response["advantages"][place]
                axes.barh(row, 1, left=place, color=shade(scale(value)), edgecolor="white", height=0.8)
                text = _drawable(response["pieces"][place])
                colour = "white" if abs(value) > 0.6 * most else INK
                axes.text(place + 0.5, row, text[:6], ha="center", va="center", fontsize=6.5, color=colour)
            if response["parent"] >= 0:
                x = response["branch"]
                axes.plot([x, x], [response["parent"] + 0.4, row], color=QUIET, linewidth=1)
            axes.text(width + 0.4, row, f"reward {response['reward']:g}", va="center", fontsize=8, color=QUIET)
        axes.set_xlim(0, width + 5)
        axes.invert_yaxis()
        axes.set_yticks(range(len(responses)), [f"response {row}" for row in range(len(responses))])
        axes.set_xlabel("token; blue: advantage above 0, red: below")
    return figure


def _drawable(piece: str) -> str:
    """A token's text in characters that every font has."""
    return "".join(character if character.isascii() and character.isprintable() else "?" for character in piece.strip())
