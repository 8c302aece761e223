"""Fits of policies for the tests beside it: in one process, and on two as a program that `torchrun` starts."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lit_core.callbacks.step_seed import StepSeed
from lit_core.optim import Schedule
from lit_rl.data.prompts import PromptDataModule
from lit_rl.modules.config import EvaluationConfig, RolloutConfig
from lit_rl.modules.layout import Sequences
from lit_rl.modules.rollouts import Rollout
from lit_rl.rewards.tasks import TASKS, Task

FLAT = Schedule("constant")
STOPS = ["a", "e"]  # responses of an untrained policy end early, and differ in length
ROLLOUT = RolloutConfig(samples=4, max_tokens=7, stop_strings=STOPS)
EVALUATION = EvaluationConfig(samples=2)
TASK = "letters"  # a reward that untrained policies get now and then
TASKS[TASK] = Task(
    lambda row: str(row["prompt"]),
    lambda row, response: float(sum(map(ord, response)) % 3) / 2,
    lambda row, response: response.strip() or None,
)


def sgd(params: Any) -> torch.optim.Optimizer:
    """Its steps are linear in the gradient, so that rounding is not blown up as by Adam's first steps."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def build(method: Any, **settings: Any) -> Any:
    """A method that trains a tiny policy."""
    common = {"backbone": "nano-qwen3", "rollout": ROLLOUT, "evaluation": EVALUATION, "optimizer": sgd,
              "schedule": FLAT, "max_grad_norm": 0.5, "reward_workers": 0}  # fmt: skip
    return method(**{**common, **settings})


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def problems(folder: Path, count: int = 26) -> Path:
    """A file of problems."""
    path = folder / "problems.jsonl"
    if not path.exists():
        rows = [{"prompt": f"{'what follows ' * (number % 3)}{number}"} for number in range(count)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def data(folder: Path, batch_size: int = 4, **settings: Any) -> PromptDataModule:
    """The same global batches on any number of processes."""
    size = batch_size // processes()
    return PromptDataModule(str(problems(folder)), TASK, batch_size=size, eval_batch_size=8, **settings)


def trainer(folder: Path, steps: int, *callbacks: Callback, strategy: str = "auto", **settings: Any) -> Trainer:
    kind: Any = strategy if processes() > 1 else "auto"
    if kind == "fsdp":
        kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    common: dict[str, Any] = {
        "accelerator": "cpu", "devices": processes(), "use_distributed_sampler": False, "num_sanity_val_steps": 0,
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "limit_val_batches": 0, "default_root_dir": folder,
    }  # fmt: skip
    return Trainer(**{**common, **settings}, max_steps=steps, strategy=kind, callbacks=[StepSeed(0), *callbacks])


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Trained weights, whole on every rank."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            whole = getattr(parameter, "full_tensor", None)
            found[name] = (parameter if whole is None else whole()).detach().clone()
    return found


class SaveAt(Callback):
    """Writes a checkpoint after a step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Logged(Callback):
    """Keeps what is logged at every training batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    module: LightningModule,
    folder: Path,
    steps: int,
    *callbacks: Callback,
    strategy: str = "auto",
    ckpt: Path | None = None,
    **settings: Any,
) -> Trainer:
    run = trainer(folder, steps, *callbacks, strategy=strategy, **settings)
    run.fit(module, datamodule=data(folder), ckpt_path=ckpt, weights_only=True)
    return run


class Recorder(torch.optim.SGD):
    """Keeps the weights before each step and the gradients that it takes."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, lr=lr)
        self.records: list[list[tuple[torch.nn.Parameter, Tensor, Tensor]]] = []

    def step(self, closure: Any = None) -> Any:
        taken = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.records.append([(p, p.detach().clone(), p.grad.clone()) for p in taken if p.grad is not None])
        return super().step(closure)


def fixed_rollout(sequences: Sequences, scores: Sequence[float], log_probs: Sequence[Sequence[float]]) -> Rollout:
    """A rollout of given responses."""
    count, width = len(scores), max(map(len, sequences.responses))
    responses, rolled = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width)
    for row, response in enumerate(sequences.responses):
        responses[row, : len(response)] = torch.tensor(response, dtype=torch.long)
        rolled[row, : len(response)] = torch.tensor(log_probs[row])
    mask = torch.arange(width) < torch.tensor([len(response) for response in sequences.responses])[:, None]
    truncated = torch.zeros(count, dtype=torch.bool)
    return Rollout([], [""] * count, sequences, list(scores), responses, mask, rolled, truncated, torch.tensor(scores))


def fit_fixed(module: Any, rollout: Rollout, folder: Path, **settings: Any) -> Trainer:
    """One update from a given rollout; ``module.dealt`` then has the rows of each optimizer step."""
    module.configure_model()
    module.dealt, step = [], module._step
    module._draw = lambda batch: rollout

    def recorded(experience: Any, rows: list[int], *rest: Any) -> None:
        module.dealt.append(rows)
        module.experience = experience
        step(experience, rows, *rest)

    module._step = recorded
    run = trainer(folder, 1, **settings)
    loader: Any = torch.utils.data.DataLoader([0])  # type: ignore[arg-type]
    run.fit(module, loader, loader)
    return run
