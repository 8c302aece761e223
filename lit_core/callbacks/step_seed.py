"""Random draws of a step (dropout) as a function of seed, rank and step, so that a resumed run repeats them."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds torch before every training batch; a checkpoint then needs no random state of any rank.

    Args:
        seed: Base seed; the trainer's ``seed_everything`` value.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        seed = (self.seed * 1_000_003 + trainer.global_rank) * 1_000_003 + step
        if pl_module.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # manual_seed would queue a traceback for a GPU too
        else:
            torch.manual_seed(seed)
