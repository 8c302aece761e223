import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_core.callbacks import CurveRecorder

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",  # tiny data
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",  # lightning 2.6 on torch 2.13
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",  # all batches are the same
)


class Line(LightningModule):
    """Logs the number of batches seen so far as its loss, and ten times that in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(()))
        self.seen: torch.Tensor

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen += 1
        self.log("train/loss", self.seen)
        return (self.weight * batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/ndcg@10", 10 * self.seen)
        self.log("val/undefined", math.nan)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, max_steps: int, ckpt_path: Path | None = None, **options: Any) -> CurveRecorder:
    recorder = CurveRecorder(folder, every_n_steps=2)
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=4, save_top_k=0)
    trainer = Trainer(default_root_dir=folder, max_steps=max_steps, callbacks=[recorder, checkpoint], accelerator="cpu",
                      logger=False, enable_progress_bar=False, enable_model_summary=False, val_check_interval=4,
                      check_val_every_n_epoch=None, **options)  # fmt: skip
    data = DataLoader([torch.ones(1)] * 12)
    trainer.fit(Line(), data, DataLoader([torch.ones(1)]), ckpt_path=ckpt_path, weights_only=True)
    return recorder


def test_points_of_training_and_validation(tmp_path: Path) -> None:
    fit(tmp_path, 8)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves["train/loss"] == [[2, 2.0], [4, 4.0], [6, 6.0], [8, 8.0]]
    assert curves["val/ndcg@10"] == [[4, 40.0], [8, 80.0]]  # without the sanity check's; a NaN is not a point
    assert "val/undefined" not in curves


def test_a_resumed_run_has_no_gap_and_no_step_twice(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 8)
    fit(tmp_path / "cut", 5)  # the checkpoint holds step 4
    resumed = fit(tmp_path / "cut", 8, tmp_path / "cut" / "last.ckpt")
    assert resumed.curves == whole.curves
    assert json.loads((tmp_path / "cut" / "curves.json").read_text())["train/loss"][-1] == [8, 8.0]


def test_every_n_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="got 0"):
        CurveRecorder(every_n_steps=0)
