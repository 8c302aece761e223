"""The state after the last step, whatever the checkpoint interval, in a form that a later fit goes on from exactly."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_core.callbacks.checkpoints import exchanged


class FinalCheckpoint(Callback):
    """Writes ``last.ckpt`` after the last step.

    A run stopped by ``max_steps`` is saved inside its last batch: once the loop has ended, lightning counts the epoch
    as over, and a fit with more steps would go on in the next one.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "last.ckpt"
        self.saved_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not vars(trainer)["fast_dev_run"] and trainer.global_step > 0:
            with exchanged(trainer, self.path) as place:
                trainer.save_checkpoint(place)
            self.saved_step = trainer.global_step
