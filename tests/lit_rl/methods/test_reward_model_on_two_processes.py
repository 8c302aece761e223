"""Two CPU processes (gloo) against one; this file is the program that they run."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from two_ranks import become_two_ranks, run_program

from lit_core.backbones import Lora
from lit_core.callbacks.step_seed import StepSeed
from lit_core.optim import Schedule
from lit_core.presets import preset_config, preset_tokenizer
from lit_core.sharding import rank
from lit_rl.data.preference_tasks import PreferenceTaskConfig
from lit_rl.data.preferences import PreferenceDataModule
from lit_rl.methods.reward_model import RewardModelling
from lit_rl.modules import reward_model

pytestmark = pytest.mark.slow

STRATEGIES = {"ddp": "ddp", "ddp adapters": "ddp", "ddp bidirectional": "ddp", "fsdp": "fsdp", "fsdp adapters": "fsdp"}


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def sgd(params: Any) -> torch.optim.Optimizer:
    """Its steps are linear in the gradient, so that rounding is not blown up as by Adam's first steps."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def trainer(folder: Path, strategy: str, **settings: Any) -> Trainer:
    kind: Any = "auto"
    if processes() > 1:
        kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp" else strategy
    return Trainer(
        accelerator="cpu", devices=processes(), strategy=kind, max_steps=3, use_distributed_sampler=False,
        num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=[StepSeed(0)], **settings,
    )  # fmt: skip


def run(name: str, folder: Path, still: str) -> dict[str, Any]:
    """Three steps on the same global batches, validated after the last one, and tested."""
    backbone = still if name == "ddp bidirectional" else "tiny-qwen3"
    lora = Lora(r=4, dropout=0.0) if "adapters" in name or backbone == still else Lora()
    settings: dict[str, Any] = {"optimizer": sgd, "schedule": Schedule("constant"), "max_grad_norm": 0.5}
    module = RewardModelling(backbone, 64, lora=lora, **settings)
    data = PreferenceDataModule(
        batch_size=8 // processes(), tasks=PreferenceTaskConfig(count=70), val_share=0.2, token_budget=100
    )
    reward_model.CPU_CHUNK_TOKENS = 60  # chunks of a text or two: ranks differ
    runner = trainer(folder, STRATEGIES[name], val_check_interval=3)
    runner.fit(module, datamodule=data)
    logged = {
        key: value.detach() for key, value in runner.callback_metrics.items() if key.startswith(("val", "train/g"))
    }
    weights = {}
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            whole = getattr(parameter, "full_tensor", None)
            weights[key] = (parameter if whole is None else whole()).detach().clone()
    trainer(folder, STRATEGIES[name]).test(module, datamodule=data, verbose=False)
    return {"logged": logged, "weights": weights, "rewards": module.rewards}


class Runs:
    """What two processes have written, and the same done here."""

    def __init__(self, folder: Path) -> None:
        from transformers import BertModel

        self.folder, self.still = folder, folder / "still"
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # ranks draw their own dropout
        torch.manual_seed(0)
        BertModel(preset_config("tiny-bert", **without)).save_pretrained(self.still)
        preset_tokenizer("tiny-bert").save_pretrained(self.still)
        found = run_program(__file__, folder, self.still, timeout=300)
        self.log = found.stdout + found.stderr

    def __call__(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            pytest.fail(f"'{name}' did not end on two processes:\n{self.log[-5000:]}")
        return torch.load(path, weights_only=True), run(name, self.folder, str(self.still))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("two"))


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_model, "CPU_CHUNK_TOKENS", 60)  # restored after the test


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_do_what_one_does(runs: Runs, name: str) -> None:
    two, one = runs(name)
    for part in ("weights", "logged"):
        assert two[part].keys() == one[part].keys()
        for key, value in one[part].items():
            tolerance = 0.04 if key == "val/accuracy" else 2e-6  # a pair of equal rewards may fall either way
            torch.testing.assert_close(two[part][key], value, atol=tolerance, rtol=1e-5)
    assert {"val/loss", "val/accuracy", "train/grad_norm"} <= one["logged"].keys()
    assert two["rewards"].keys() == one["rewards"].keys()
    for key, both in one["rewards"].items():
        assert two["rewards"][key] == pytest.approx(both, abs=1e-5)


def main(folder: str, still: str) -> None:
    warnings.filterwarnings("ignore")  # advice of torch and lightning on tiny runs; the one-process runs have errors
    torch.set_num_threads(1)
    trainer(Path(folder), "ddp").strategy.setup_environment()  # the process group that all runs share
    for name in STRATEGIES:
        found = run(name, Path(folder), still)
        if rank() == 0:
            torch.save(found, Path(folder) / f"{name}.pt")


if __name__ == "__main__":
    become_two_ranks(main, *sys.argv[1:])
