"""Figures of the CoCoA experiment: what is retrieved, what is reconstructed, what a linear map reads."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lit_core.files import read_json
from lit_core.plots import COLOURS, INK, QUIET, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Folders = Mapping[str, Sequence[Path]]
RIGHT, WRONG = "#009E73", "#BBBBBB"


def figures(folders: Folders) -> Mapping[str, "Figure"]:
    """Draw the figures of the arms that were run."""
    found: dict[str, Figure] = {}
    for arm, paths in folders.items():
        if arm == "cocoa" and _retrieved(paths[0]):
            found["Retrieved by CoCoA"] = retrieval_grid(paths[0])
        if arm == "bridge" and (paths[0] / "words.json").exists():
            found["Reconstructed words"] = reconstructed_words(paths[0])
    probes = {arm: paths for arm, paths in folders.items() if _probe(paths)}
    if probes:
        found["Attributes by a linear probe"] = probe_bars(probes)
    return found


def retrieval_grid(folder: Path) -> "Figure":
    """A row a query: itself, then its best candidates, the right one framed."""
    import numpy as np

    rows, pictures = read_json(folder / "retrieval.json"), np.load(folder / "retrieval.npz")["pictures"]
    columns = 1 + max(len(row["candidates"]) for row in rows)
    subtitle = "query on the left, best candidates to its right; the right one in green"
    with canvas(1.5 * columns + 1.2, 1.55 * len(rows) + 0.9, "Retrieved", subtitle) as (figure, axes):
        axes.remove()
        grid = figure.subplots(len(rows), columns, squeeze=False)
        grid[0, 0].set_title(" ", fontsize=10)  # room for the subtitle
        for line, row in zip(grid, rows, strict=True):
            cells: list[dict[str, Any] | None] = [row["query"], *row["candidates"]]
            for place, cell in zip(line, [*cells, *[None] * (columns - len(cells))], strict=True):
                _draw(place, cell, pictures)
            line[0].set_ylabel(row["task"], fontsize=7, color=QUIET)
    return figure


def _draw(place: Any, cell: dict[str, Any] | None, pictures: Any) -> None:
    place.set_xticks([])
    place.set_yticks([])
    place.grid(visible=False)
    if cell is None:
        place.axis("off")
        return
    text = textwrap.fill(cell["text"], 22)
    if cell["picture"] is not None:
        place.imshow(pictures[cell["picture"]])
        if "right" not in cell:
            place.set_xlabel(text[:70], fontsize=5.5, color=INK)  # above, it would meet the title of the figure
    else:
        place.text(0.5, 0.5, text, ha="center", va="center", fontsize=6, transform=place.transAxes)
    for spine in place.spines.values():
        spine.set_visible(True)
        right = cell.get("right")
        spine.set_color(INK if right is None else RIGHT if right else WRONG)
        spine.set_linewidth(2.5 if right else 1)


def reconstructed_words(folder: Path) -> "Figure":
    """A row an example: the query, the text with hidden words, and what was told, also behind another query."""
    import numpy as np

    rows, pictures = read_json(folder / "words.json"), np.load(folder / "words.npz")["pictures"]
    subtitle = "texts told through the bridge token alone; hidden words are boxes"
    with canvas(9.0, 1.35 * len(rows) + 0.9, "Reconstructed words", subtitle) as (figure, axes):
        axes.remove()
        grid = figure.subplots(len(rows), 2, squeeze=False, width_ratios=[1, 6])
        grid[0, 0].set_title(" ", fontsize=10)  # room for the subtitle
        for (left, right), row in zip(grid, rows, strict=True):
            _draw(left, {"text": row["text"], "picture": row["picture"]}, pictures)
            right.axis("off")
            lines = {"target": row["target"], "shown": row["shown"], "told": row["told"], "other": row["without"]}
            for number, (name, text) in enumerate(lines.items()):
                colour = {"told": COLOURS[0], "other": COLOURS[1]}.get(name, INK)
                shown = f"{name:>7}  {textwrap.shorten(text, 96, placeholder=' …')}"
                drawn = right.text(0.0, 0.9 - 0.26 * number, shown, fontsize=7, color=colour, va="top",
                                   fontfamily="monospace", transform=right.transAxes)  # fmt: skip
                drawn.set_in_layout(False)  # a long line takes no room from the pictures
    return figure


def probe_bars(folders: Folders) -> "Figure":
    """Accuracy of the linear probe, attribute by attribute, a bar for each arm."""
    tables = {arm: [read_json(path / "probe.json") for path in paths] for arm, paths in folders.items()}
    names = list(next(iter(tables.values()))[0])
    width = 0.8 / len(tables)
    with canvas(9.0, 4.2, "Attributes by a linear probe", "accuracy from the bridge token, mean over seeds") as (
        figure,
        axes,
    ):
        for number, (arm, rows) in enumerate(tables.items()):
            values = [fmean(row[name] for row in rows) for name in names]
            places = [place + number * width for place in range(len(names))]
            axes.bar(places, values, width, color=COLOURS[number % len(COLOURS)], label=arm)
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names)
        axes.set_ylim(0, 1)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _retrieved(folder: Path) -> bool:
    return (folder / "retrieval.json").exists() and bool(read_json(folder / "retrieval.json"))


def _probe(paths: Sequence[Path]) -> bool:
    return bool(paths) and all((path / "probe.json").exists() for path in paths)
