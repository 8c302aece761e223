import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_core.callbacks import Throughput

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",  # tiny data
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",  # lightning 2.6 on torch 2.13
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",  # all batches are the same
)


class Silent(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(0.02)
        return (self.weight * batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        time.sleep(0.3)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counting(Silent):
    def batch_tokens(self, batch: torch.Tensor) -> int:
        return batch.numel()


def fit(folder: Path, module: LightningModule, max_steps: int, **options: Any) -> tuple[Throughput, Trainer]:
    throughput = Throughput()
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=4, save_top_k=0)
    trainer = Trainer(default_root_dir=folder, max_steps=max_steps, log_every_n_steps=4, accelerator="cpu",
                      callbacks=[throughput, checkpoint],
                      logger=CSVLogger(folder), enable_progress_bar=False, enable_model_summary=False,
                      val_check_interval=2, check_val_every_n_epoch=None)  # fmt: skip
    data = DataLoader([torch.ones(5)] * 32, batch_size=2)
    trainer.fit(module, data, DataLoader([torch.ones(1)]), weights_only=True, **options)
    return throughput, trainer


def test_ten_tokens_in_twenty_milliseconds(tmp_path: Path) -> None:  # validation of .3 s every second step left out
    throughput, trainer = fit(tmp_path, Counting(), 8)
    step = float(trainer.callback_metrics["time/step_s"])
    assert 0.02 <= step < 0.1
    assert float(trainer.callback_metrics["time/tokens_per_s"]) == pytest.approx(10 / step, rel=1e-3)
    assert throughput.tokens == 80
    assert "time/tokens_per_s" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_token_count_goes_on_after_a_restart(tmp_path: Path) -> None:
    fit(tmp_path, Counting(), 5)  # the checkpoint holds step 4
    throughput, _ = fit(tmp_path, Counting(), 6, ckpt_path=tmp_path / "last.ckpt")
    assert throughput.tokens == 60


def test_a_module_that_cannot_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_tokens\(batch\) in Silent"):
        fit(tmp_path, Silent(), 1)
