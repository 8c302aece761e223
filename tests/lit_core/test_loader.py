from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from lit_core.loader import ResumableLoader
from lit_core.samplers import HomogeneousBatchSampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning 2.6 on torch 2.13
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice only
    pytest.mark.filterwarnings("ignore:.*manual optimization"),  # wants the state before the step, too
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # resumed runs write elsewhere
]

Key = tuple[int, int, int]


class Keys(Dataset[Key]):
    def __getitem__(self, key: Key) -> Key:
        return key


def as_list(items: list[Key]) -> list[Key]:
    return items


def make_loader(num_workers: int = 0) -> ResumableLoader:  # 6 + 4 batches an epoch
    return ResumableLoader(Keys(), HomogeneousBatchSampler([24, 16], 4, seed=3), as_list, num_workers)


class Recorder(LightningModule):
    def __init__(self, num_workers: int = 0, manual: bool = False) -> None:
        super().__init__()
        self.layer, self.num_workers, self.seen = torch.nn.Linear(1, 1), num_workers, list[list[Key]]()
        self.automatic_optimization = not manual

    def training_step(self, batch: list[Key], batch_idx: int) -> Tensor | None:
        self.seen.append([tuple(key) for key in batch])  # type: ignore[misc]
        loss: Tensor = self.layer(torch.ones(1, 1)).sum()
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def train_dataloader(self) -> ResumableLoader:
        return make_loader(self.num_workers)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ValidatedRecorder(Recorder):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def val_dataloader(self) -> list[Tensor]:
        return [torch.zeros(1)]


def fit(module: Recorder, folder: Path, resume: Path | None = None, at_epoch_end: bool = False, **limits: int) -> Any:
    checkpoint = ModelCheckpoint(
        folder,
        filename="{step}",
        save_top_k=-1,
        auto_insert_metric_name=False,
        every_n_train_steps=None if at_epoch_end else 1,
        save_on_train_epoch_end=at_epoch_end,
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[checkpoint], enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, **limits,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=resume)
    return module.seen


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fit_stopped_in_mid_epoch_goes_on_with_the_same_batches(tmp_path: Path, num_workers: int) -> None:
    whole = fit(Recorder(num_workers), tmp_path / "whole", max_epochs=2)
    assert len(whole) == 20
    assert whole[:10] != whole[10:]
    for stop in (7, 10, 13):
        part = fit(Recorder(num_workers), tmp_path / f"{stop}", max_epochs=2, max_steps=stop)
        rest = fit(Recorder(num_workers), tmp_path / f"{stop}r", tmp_path / f"{stop}" / f"{stop}.ckpt", max_epochs=2)
        assert part + rest == whole


@pytest.mark.slow
@pytest.mark.parametrize("module", [Recorder, ValidatedRecorder])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("at_epoch_end", [False, True])
@pytest.mark.parametrize("limits", [{"max_steps": 27}, {"max_epochs": 3}])
def test_any_checkpoint_can_be_resumed(
    tmp_path: Path, module: type[Recorder], manual: bool, at_epoch_end: bool, limits: dict[str, int]
) -> None:
    whole = fit(module(manual=manual), tmp_path / "whole", at_epoch_end=at_epoch_end, **limits)
    for step in (10, 20) if at_epoch_end else (1, 9, 10, 11, 20, 25):
        resumed = fit(module(manual=manual), tmp_path / f"{step}", tmp_path / "whole" / f"{step}.ckpt",
                      at_epoch_end, **limits)  # fmt: skip
        assert resumed == whole[step:], step


def test_without_a_trainer() -> None:
    loader = make_loader()
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 10
    assert first != second  # epochs are counted where nobody sets them
    state = loader.state_dict()
    iterator = iter(loader)
    assert loader.state_dict() == state  # nothing begins before the first batch is asked for
    third = [next(iterator) for _ in range(4)]
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert third + list(resumed) == third + list(iterator)
    assert list(resumed) == list(loader)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert len(list(make_loader())) == 10
    torch.testing.assert_close(torch.rand(3), expected)
