"""Where domains get in each other's way: a heat map of conflicts, layer by kind of module."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_core.files import atomic_path
from lit_core.plots import canvas
from lit_rl.methods.mgs import MGS
from lit_rl.modules.surgery import ConflictTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class InterferenceMap(Callback):
    """Writes ``surgery/conflicts`` as an image to TensorBoard, and ``interference.<step>.png``.

    A cell is the share of conflicts among the pairs of domains in the steps since the last map.

    Args:
        folder: The run's folder.
        every_n_steps: A map each time this many updates were made.
    """

    def __init__(self, folder: Path, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.folder, self.every_n_steps = folder, every_n_steps
        self.seen_at, self.drawn_at = 0, 0
        self.conflicts: Tensor | None = None
        self.pairs: Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if not isinstance(pl_module, MGS) or pl_module.interference is None or step == self.seen_at:
            return
        self.seen_at, table = step, pl_module.interference
        self.conflicts = table.conflicts if self.conflicts is None else self.conflicts + table.conflicts
        self.pairs = table.pairs if self.pairs is None else self.pairs + table.pairs
        if step // self.every_n_steps == self.drawn_at // self.every_n_steps:
            return
        self.drawn_at = step
        if trainer.is_global_zero:
            self._draw(trainer, table, (self.conflicts / self.pairs.clamp(min=1)).tolist(), step)
        self.conflicts = self.pairs = None

    def _draw(self, trainer: Trainer, table: ConflictTable, shares: list[float], step: int) -> None:
        figure = heat_map(table, shares, step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("surgery/conflicts", figure, step, close=False)
        with atomic_path(self.folder / f"interference.{step}.png") as temporary:
            figure.savefig(temporary, format="png", bbox_inches="tight", facecolor="white")


def cells(table: ConflictTable, shares: list[float]) -> tuple[list[str], list[str], list[list[float]]]:
    """Names of rows and columns, and a value for each place; NaN where there is no module.

    A row is a layer, the last one what lies outside of layers, by its kind. Modules of one place are averaged.
    """
    found: dict[tuple[int, str], list[float]] = {}
    for part, share in zip(table.parts, shares, strict=True):
        place = (1 << 30, part.kind) if part.layer is None else (part.layer, part.place)
        found.setdefault(place, []).append(share)
    layers = sorted({layer for layer, _ in found})
    places = list(dict.fromkeys(place for _, place in sorted(found, key=lambda key: key[0] == 1 << 30)))
    rows = [
        [sum(values) / len(values) if (values := found.get((layer, place))) else math.nan for place in places]
        for layer in layers
    ]
    return ["outside" if layer == 1 << 30 else f"layer {layer}" for layer in layers], places, rows


def heat_map(table: ConflictTable, shares: list[float], step: int) -> "Figure":
    """Draw the share of conflicts ``(M,)`` of each module."""
    rows, columns, values = cells(table, shares)
    size = (2.4 + 0.55 * len(columns), 2.4 + 0.3 * len(rows))
    subtitle = f"share of the pairs of {', '.join(table.domains)} whose gradients conflict, step {step}"
    with canvas(max(size[0], 4.5), size[1], "Conflicts", subtitle) as (figure, axes):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes)
    return figure
