import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora
from lit_core.callbacks.step_seed import StepSeed
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_rl.callbacks.preferences import PreferenceReport
from lit_rl.data.preference_tasks import PreferenceTaskConfig
from lit_rl.data.preferences import PreferenceDataModule
from lit_rl.functional.preference import bradley_terry_loss
from lit_rl.methods.reward_model import RewardModelling
from lit_rl.modules.reward_model import RewardModel

TASKS = PreferenceTaskConfig(count=120)
PAIRS = [
    {"id": "x", "chosen": "hi there", "rejected": "go away", "margin": 0.0},
    {"id": "y", "chosen": "yes", "rejected": "a longer reply that is worse", "margin": 1.0},
]


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=2e-3)


def reward_model(backbone: str = "tiny-qwen3", **settings: Any) -> RewardModelling:
    common = {"optimizer": adam, "schedule": Schedule("constant"), "max_length": 64}
    return RewardModelling(backbone, **{**common, **settings})


class SaveAt(Callback):
    """Writes a checkpoint after a step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Logged(Callback):
    """Keeps the training values of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trainer(folder: Path, steps: int, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[StepSeed(0), *callbacks],
        **settings,
    )


def fit(module: RewardModelling, folder: Path, steps: int, *callbacks: Callback, ckpt: Path | None = None) -> Trainer:
    run = trainer(folder, steps, *callbacks, limit_val_batches=0)
    data = PreferenceDataModule(batch_size=16, tasks=TASKS)
    run.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return run


def weights(module: RewardModelling) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_a_batch_holds_preferred_dialogues_first() -> None:
    module = reward_model()
    module.configure_model()
    batch = module.preference_collator()(PAIRS)
    assert (batch.ids, batch.margins.tolist(), len(batch.tokens)) == (["x", "y"], [0.0, 1.0], 4)
    assert module.batch_tokens(batch) == sum(batch.tokens.lengths)
    chosen, rejected = module(batch.to("cpu"))
    expected = module.model.scores(["hi there", "yes", "go away", "a longer reply that is worse"])
    torch.testing.assert_close(torch.cat([chosen, rejected]).detach(), expected, atol=1e-6, rtol=0)
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no trainer
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0]), 0.01))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InputError, match="field 'centre': must be 0 or more, got -1"):
        reward_model(centre=-1)


def test_one_step_logs_what_the_step_gave(tmp_path: Path) -> None:
    module, logged = reward_model(), Logged()
    fit(module, tmp_path, 1, logged)
    (row,) = logged.rows
    assert {"train/loss", "train/accuracy", "train/reward_margin", "train/grad_norm"} <= row.keys()
    assert row["train/loss"] == pytest.approx(0.69, abs=0.1)  # rewards start near zero
    assert row["train/accuracy"] * 16 % 0.5 == 0


@pytest.mark.slow
def test_training_learns_the_training_pairs(tmp_path: Path) -> None:
    module, logged = reward_model(), Logged()
    fit(module, tmp_path, 60, logged)
    first, last = logged.rows[:5], logged.rows[-5:]
    for name, better in (("train/loss", -1), ("train/accuracy", 1), ("train/reward_margin", 1)):
        change = sum(row[name] for row in last) - sum(row[name] for row in first)
        assert better * change / 5 > 0.2, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-bert", "adapters"])
def test_a_fit_resumed_in_mid_epoch_ends_bit_for_bit_alike(name: str, tmp_path: Path) -> None:
    def build() -> RewardModelling:
        return reward_model(lora=Lora(r=4, dropout=0.3)) if name == "adapters" else reward_model(name)

    path = tmp_path / "half.ckpt"
    whole = build()
    fit(whole, tmp_path, 9, SaveAt(path, 3))  # an epoch has 6 steps
    torch.manual_seed(123)
    resumed = build()
    fit(resumed, tmp_path, 9, ckpt=path)
    expected, found = weights(whole), weights(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    halted = torch.load(path, weights_only=True)["state_dict"]
    assert halted.keys() == expected.keys() if name == "adapters" else halted.keys() >= expected.keys()
    assert any(not torch.equal(halted[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 calls what jsonargparse 5 drops
def test_evaluation_is_that_of_the_scores_and_leaves_files(tmp_path: Path) -> None:
    module = reward_model()
    run = fit(module, tmp_path, 3, SaveAt(tmp_path / "last.ckpt", 3))
    report = PreferenceReport(tmp_path)
    run = trainer(tmp_path, 1, report)
    data = PreferenceDataModule(batch_size=16, tasks=TASKS, token_budget=200)
    (validated,) = run.validate(module, datamodule=data, verbose=False)
    (tested,) = run.test(module, datamodule=data, verbose=False)
    predicted = run.predict(module, datamodule=data)
    assert predicted is not None
    chosen, rejected = (module.model.scores([p[side] for p in data.test_pairs]) for side in ("chosen", "rejected"))
    assert tested["test/loss"] == pytest.approx(float(bradley_terry_loss(chosen, rejected, centre=0.01)), abs=1e-5)
    assert tested["test/accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert tested["test/reward_margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    assert json.loads((tmp_path / "validation.json").read_text())["val/loss"] == pytest.approx(validated["val/loss"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"]["accuracy"] == pytest.approx(tested["test/accuracy"])
    assert results["per_item"]["accuracy"].keys() == {pair["id"] for pair in data.test_pairs}
    rows = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    expected = dict(zip((pair["id"] for pair in data.test_pairs), chosen.tolist(), strict=True))
    assert {row["id"]: row["chosen"] for row in rows} == pytest.approx(expected, abs=1e-5)

    loaded = RewardModelling.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    loaded.export(tmp_path / "folder")
    texts = [pair["chosen"] for pair in data.test_pairs]
    found = RewardModel.load(tmp_path / "folder").scores(texts)
    torch.testing.assert_close(found, chosen, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_checkpointing_of_activations_changes_nothing(tmp_path: Path) -> None:
    plain, saving = reward_model(), reward_model(loading=BackboneConfig(gradient_checkpointing=True))
    for module in (plain, saving):
        fit(module, tmp_path, 2)
    found = weights(saving)
    for name, value in weights(plain).items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
