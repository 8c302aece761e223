"""Where domains get in each other's way: heat maps of conflicts, layer by kind of module."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_core.files import atomic_path, write_json
from lit_core.plots import canvas
from lit_rl.methods.mgs import MGS
from lit_rl.modules.granularity import Part
from lit_rl.modules.surgery import ConflictTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFLICTS = "conflicts.json"
OUTSIDE = 1 << 30  # number of the row for what lies outside of layers


@dataclass(frozen=True)
class ConflictMap:
    """Share of conflicts by layer and place in it.

    Args:
        rows: Names of the layers; the last one is what lies outside of them.
        columns: Names of the places.
        values: A row for each layer, NaN where there is no module.
        domains: Whose gradients they are.
        steps: Updates that were counted.
    """

    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    domains: list[str]
    steps: int

    @classmethod
    def of(
        cls, parts: Sequence[Part], shares: Sequence[float], domains: Sequence[str] = (), steps: int = 0
    ) -> "ConflictMap":
        """Map of modules with a share each; modules of one place are averaged."""
        found: dict[tuple[int, str], list[float]] = {}
        for part, share in zip(parts, shares, strict=True):
            place = (OUTSIDE, part.kind) if part.layer is None else (part.layer, part.place)
            found.setdefault(place, []).append(share)
        layers = sorted({layer for layer, _ in found})
        places = list(dict.fromkeys(place for _, place in sorted(found, key=lambda key: key[0] == OUTSIDE)))
        values = [[fmean(found.get((layer, place), [math.nan])) for place in places] for layer in layers]
        rows = ["outside" if layer == OUTSIDE else f"layer {layer}" for layer in layers]
        return cls(rows, places, values, list(domains), steps)

    @classmethod
    def mean(cls, maps: Sequence[Mapping[str, Any]]) -> "ConflictMap":
        """Mean of maps of one architecture, each as read from ``conflicts.json``, where null is NaN."""
        tables = [[[math.nan if value is None else value for value in row] for row in one["values"]] for one in maps]
        values = [[fmean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
        first = maps[0]
        return cls(first["rows"], first["columns"], values, first["domains"], first["steps"])

    def content(self) -> dict[str, Any]:
        """What ``conflicts.json`` holds."""
        values = [[None if math.isnan(value) else value for value in row] for row in self.values]
        return {**vars(self), "values": values}

    def draw(self, title: str = "Conflicts") -> "Figure":
        """The map as a figure."""
        size = (2.4 + 0.55 * len(self.columns), 2.4 + 0.3 * len(self.rows))
        subtitle = f"share of the pairs of {', '.join(self.domains)} in conflict, {self.steps} updates"
        with canvas(max(size[0], 4.5), size[1], title, subtitle) as (figure, axes):
            image = axes.imshow(self.values, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
            axes.set_xticks(range(len(self.columns)), self.columns, rotation=60, ha="right", fontsize=8)
            axes.set_yticks(range(len(self.rows)), self.rows, fontsize=8)
            axes.grid(visible=False)
            figure.colorbar(image, ax=axes)
        return figure


class InterferenceMap(Callback):
    """Maps of conflicts between the gradients of domains; for MGS, nothing happens with other methods.

    Every ``every_n_steps`` updates and in the end, ``surgery/conflicts`` goes as an image to TensorBoard and
    ``interference.<step>.png`` to the folder: a cell is the share of conflicts among the pairs of domains in the
    updates since the last map. ``conflicts.json`` has the shares of the whole run.

    Args:
        folder: The run's folder.
        every_n_steps: A map each time this many updates were made.
    """

    def __init__(self, folder: Path, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.folder, self.every_n_steps = folder, every_n_steps
        self.seen_at, self.drawn_at = 0, 0
        self.since: Tensor | None = None  # conflicts and pairs ``(2, M)`` since the last map
        self.whole: Tensor | None = None  # the same since the start
        self.steps = 0  # updates that are in ``whole``
        self.steps_since = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if not isinstance(pl_module, MGS) or pl_module.interference is None or step == self.seen_at:
            return
        table = pl_module.interference
        counts = torch.stack([table.conflicts, table.pairs]).double()
        self.seen_at, self.steps, self.steps_since = step, self.steps + 1, self.steps_since + 1
        self.since = counts if self.since is None else self.since.to(counts.device) + counts
        self.whole = counts if self.whole is None else self.whole.to(counts.device) + counts
        if step // self.every_n_steps > self.drawn_at // self.every_n_steps:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.since is not None and isinstance(pl_module, MGS) and pl_module.interference is not None:
            self._draw(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run that is cut off after its last update has its map."""
        if trainer.is_global_zero and isinstance(pl_module, MGS) and pl_module.interference is not None:
            self._write(pl_module.interference)

    def state_dict(self) -> dict[str, Any]:
        names = ("seen_at", "drawn_at", "since", "whole", "steps", "steps_since")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def _draw(self, trainer: Trainer, module: MGS) -> None:
        table, step = module.interference, trainer.global_step
        assert table is not None  # the callers have looked
        assert self.since is not None
        if trainer.is_global_zero:
            figure = _map(table, self.since, self.steps_since).draw(f"Conflicts at step {step}")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("surgery/conflicts", figure, step, close=False)
            with atomic_path(self.folder / f"interference.{step}.png") as temporary:
                figure.savefig(temporary, format="png", bbox_inches="tight", facecolor="white")
            self._write(table)
        self.drawn_at, self.since, self.steps_since = step, None, 0

    def _write(self, table: ConflictTable) -> None:
        if self.whole is not None:
            write_json(self.folder / CONFLICTS, _map(table, self.whole, self.steps).content())


def _map(table: ConflictTable, counts: Tensor, steps: int) -> ConflictMap:
    """Shares of conflicts ``(2, M)`` in the pairs; NaN where no pair had gradients."""
    conflicts, pairs = counts.tolist()
    shares = [one / of if of else math.nan for one, of in zip(conflicts, pairs, strict=True)]
    return ConflictMap.of(table.parts, shares, table.domains, steps)
