"""Figures of the MGS experiment: where gradients conflict, and the bandit's gain over mixing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_core.files import read_json
from lit_core.intervals import seed_difference
from lit_core.plots import COLOURS, INK, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Folders = Mapping[str, Sequence[Path]]
MAPS = {"mixed": "Conflicts under mixing", "mgs": "Conflicts under MGS"}
PLAIN = "mixed"


def figures(folders: Folders) -> Mapping[str, "Figure"]:
    """Draw the figures of the arms that were run."""
    from lit_rl.callbacks.interference import CONFLICTS, ConflictMap

    found: dict[str, Figure] = {}
    for arm, title in MAPS.items():
        paths = [path / "fit" / CONFLICTS for path in folders.get(arm, ())]
        if paths and all(path.exists() for path in paths):
            found[title] = ConflictMap.mean([read_json(path) for path in paths]).draw(title)
    for prefix, title in (("bandit_", "Bandit"), ("bandit_told_", "Bandit, told the domain")):
        points = {
            name.removeprefix(prefix): read_json(paths[0] / "bandit.json")
            for name, paths in folders.items()
            if name.startswith(prefix) and (paths[0] / "bandit.json").exists()
            and name.startswith("bandit_told_") == (prefix == "bandit_told_")
        }  # fmt: skip
        if PLAIN in points and len(points) > 1:
            found[title] = gain_over_mixing(points, title)
    return found


def gain_over_mixing(points: Mapping[str, Sequence[Sequence[Sequence[float]]]], title: str) -> "Figure":
    """Difference in expected reward to mixing, seed by seed: mean and 95 % interval over the steps.

    Args:
        points: For each way ``[[step, reward], ...]`` of every seed.
        title: Of the figure.
    """
    subtitle = "expected reward less that of mixing; mean over seeds and 95 % interval"
    with canvas(8.0, 4.2, title, subtitle) as (figure, axes):
        axes.axhline(0.0, color=INK, linewidth=1.0)
        plain = points[PLAIN]
        steps = [step for step, _ in plain[0]]
        for colour, (name, runs) in zip(COLOURS, ((n, r) for n, r in points.items() if n != PLAIN), strict=False):
            gains = []
            for at in range(len(steps)):
                ours, theirs = [run[at][1] for run in runs], [run[at][1] for run in plain]
                gains.append(seed_difference(ours, theirs))
            axes.plot(steps, [gain.mean for gain in gains], color=colour, label=name)
            axes.fill_between(steps, [gain.low for gain in gains], [gain.high for gain in gains], color=colour,
                              alpha=0.15, linewidth=0)  # fmt: skip
        axes.set_xlabel("optimizer steps")
        axes.legend(frameon=False)
    return figure
