"""Checkpoint files that a kill leaves either old or new."""

from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_core.files import atomic_path


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the checkpoint and renames; lightning writes in the system's temporary folder and copies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint of one process; sharded ones are folders that their strategy writes."""
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
