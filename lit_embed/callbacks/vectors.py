"""Vectors of ``predict`` as files."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file

from lit_core.files import atomic_path, write_json


class VectorWriter(Callback):
    """Writes ``<folder>/queries.safetensors`` and ``corpus.safetensors`` (tensor ``vectors``) with their ids beside.

    Every rank writes its own part, named ``<kind>.<rank>`` where there are several.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, dict[str, torch.Tensor]] = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        vectors = outputs["vectors"].float().cpu()
        self.rows.setdefault(outputs["kind"], {}).update(zip(outputs["ids"], vectors, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        for kind, rows in self.rows.items():
            with atomic_path(self.folder / f"{kind}{part}.safetensors") as path:
                save_file({"vectors": torch.stack(list(rows.values()))}, path)
            write_json(self.folder / f"{kind}{part}.ids.json", list(rows))
