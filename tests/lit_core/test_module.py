from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_core.errors import InputError
from lit_core.module import Method
from lit_core.optim import Schedule

ROWS = torch.arange(12.0).view(6, 2)


class Line(Method):
    """A linear map with one frozen and one shared weight."""

    def __init__(self, manual: bool = False, max_grad_norm: float | None = 0.5, lr: float = 1.0) -> None:
        super().__init__(
            lambda params: torch.optim.SGD(params, lr=lr), Schedule("linear", warmup_steps=1), max_grad_norm
        )
        self.automatic_optimization = not manual
        self.rates: list[float] = []

    def configure_model(self) -> None:
        if "line" not in dict(self.named_children()):
            self.line = nn.Linear(2, 1)
            nn.init.ones_(self.line.weight)
            self.frozen = nn.Linear(2, 1).requires_grad_(False)
            self.alias = self.frozen  # as two modules that hold one backbone

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.line(batch) + self.frozen(batch)).sum()
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            scheduler: Any = self.lr_schedulers()
            scheduler.step()
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


class Other(Line):
    pass


def _trainer(folder: Path, steps: int) -> Trainer:
    return Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
                   enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder)  # fmt: skip


def _fit(module: Method, folder: Path, steps: int = 6, ckpt_path: Path | None = None) -> Trainer:
    trainer = _trainer(folder, steps)
    trainer.fit(module, DataLoader(ROWS, batch_size=1), ckpt_path=ckpt_path, weights_only=True)  # type: ignore[arg-type]
    return trainer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    trainer = _fit(Line(), tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "line.ckpt")
    return tmp_path / "line.ckpt"


@pytest.mark.parametrize("manual", [False, True])
def test_the_schedule_moves_once_an_optimizer_step(manual: bool, tmp_path: Path) -> None:
    module = Line(manual)
    _fit(module, tmp_path)
    # the rate of the step before it is taken: 0 (warm-up), 1, 4/5, 3/5, 2/5, 1/5; then 0
    assert module.rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.mark.parametrize("manual", [False, True])
def test_gradients_are_clipped_under_both_kinds_of_optimisation(manual: bool, tmp_path: Path) -> None:
    clipped, free = Line(manual), Line(manual, max_grad_norm=None)
    norms = [float(_fit(module, tmp_path, 2).callback_metrics["train/grad_norm"]) for module in (clipped, free)]
    assert norms == pytest.approx([(4 + 9 + 1) ** 0.5] * 2)  # of the row (2, 3) and the bias, before clipping
    torch.testing.assert_close(free.line.weight.detach(), torch.tensor([[1.0 - 2, 1 - 3]]))
    expected = torch.tensor([[1.0 - 2 * 0.5 / 14**0.5, 1 - 3 * 0.5 / 14**0.5]])
    torch.testing.assert_close(clipped.line.weight.detach(), expected)


def test_frozen_weights_stay_out_of_checkpoints_under_all_their_names(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    assert state["state_dict"].keys() == {"line.weight", "line.bias"}
    assert state["lit_method"] == "Line"


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")  # rates alone count
def test_a_checkpoint_restores_what_was_trained(checkpoint: Path, tmp_path: Path) -> None:
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    loaded = Line.load_from_checkpoint(checkpoint, weights_only=True)
    torch.testing.assert_close(loaded.line.weight.detach(), trained["line.weight"], rtol=0, atol=0)
    whole, resumed = Line(), Line()
    _fit(whole, tmp_path, 6)
    _fit(resumed, tmp_path, 6, checkpoint)
    assert resumed.rates == whole.rates[2:]


def test_a_checkpoint_of_another_method_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="checkpoint was written by Line, not by Other"):
        Other.load_from_checkpoint(checkpoint, weights_only=True)
    with pytest.raises(InputError, match="checkpoint was written by Line, not by Other"):
        _fit(Other(), tmp_path, 6, checkpoint)
    stranger = torch.load(checkpoint, weights_only=True)
    del stranger["lit_method"]
    torch.save(stranger, checkpoint)
    with pytest.raises(InputError, match="checkpoint was written by an unknown program, not by Line"):
        Line.load_from_checkpoint(checkpoint, weights_only=True)


def test_a_checkpoint_without_a_trained_weight_is_refused(checkpoint: Path) -> None:
    broken = torch.load(checkpoint, weights_only=True)
    del broken["state_dict"]["line.bias"]
    torch.save(broken, checkpoint)
    with pytest.raises(InputError, match=r"the checkpoint lacks 1 trained weights, such as 'line\.bias'"):
        Line.load_from_checkpoint(checkpoint, weights_only=True)


def test_training_starts_in_training_mode(tmp_path: Path) -> None:
    module = Line()
    module.configure_model()
    module.eval()  # transformers loads models so
    _fit(module, tmp_path, 1)
    assert module.line.training


def test_bad_settings_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_grad_norm must be above 0, got 0"):
        Line(max_grad_norm=0)
    with pytest.raises(InputError, match="Line has nothing to export"):
        Line().export(tmp_path)
