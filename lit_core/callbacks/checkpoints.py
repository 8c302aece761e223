"""Checkpoints that a kill leaves either old or new, a single file or the folder of a sharded one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_core.files import atomic_path


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the checkpoint and renames; lightning writes in the system's temporary folder and copies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint of one process; sharded ones are folders that their strategy writes."""
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)


class Checkpoints(ModelCheckpoint):
    """Lightning's callback; sharded checkpoints are exchanged as a whole too."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with exchanged(trainer, Path(filepath)) as place:
            super()._save_checkpoint(trainer, str(place))
        self._last_checkpoint_saved = filepath


@contextmanager
def exchanged(trainer: Trainer, path: Path) -> Iterator[Path]:
    """Yield where to save; the folder of a sharded checkpoint is written beside the old one and then takes its place.

    All ranks have to come here together.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        yield path
        return
    new, old = (path.with_name(f"{path.name}.{state}") for state in ("new", "old"))
    if trainer.is_global_zero:
        shutil.rmtree(new, ignore_errors=True)  # of a save that was cut off
    trainer.strategy.barrier()
    yield new
    if trainer.is_global_zero:
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    trainer.strategy.barrier()
