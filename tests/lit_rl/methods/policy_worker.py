"""Fits of policies for the tests beside it: in one process, and on two as a program."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from two_ranks import become_two_ranks

from lit_core.backbones import Lora
from lit_core.callbacks.step_seed import StepSeed
from lit_core.optim import Schedule
from lit_core.samplers import permutation
from lit_core.sharding import rank
from lit_rl.data.prompts import PromptDataModule
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.mgs import MGS
from lit_rl.methods.ppo import PPO
from lit_rl.methods.rose import ROSE
from lit_rl.methods.sft import SFT
from lit_rl.methods.tre import TRE
from lit_rl.modules.config import (
    CriticConfig,
    EvaluationConfig,
    ExplorationConfig,
    LossConfig,
    RolloutConfig,
    SurgeryConfig,
    UpdateConfig,
)
from lit_rl.modules.layout import Sequences
from lit_rl.modules.rollouts import Rollout
from lit_rl.modules.trees.config import TreeConfig
from lit_rl.rewards.tasks import TASKS, Task

FLAT = Schedule("constant")
STOPS = ["a", "e"]  # responses of an untrained policy end early, and differ in length
ROLLOUT = RolloutConfig(samples=4, max_tokens=7, stop_strings=STOPS)
EVALUATION = EvaluationConfig(samples=2)
DOMAINS = ("chat", "if", "math")
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


def problems(folder: Path) -> Path:
    """A folder with files of problems: 26 for training, six each for validation and test."""
    path = folder / "problems"
    path.mkdir(exist_ok=True)
    for name, first, count in (("train", 0, 26), ("val", 30, 6), ("test", 40, 6)):
        if (path / f"{name}.jsonl").exists():
            continue
        rows = [
            {"prompt": f"{'what follows ' * (number % 3)}{number}", "solution": f"a {number * number}"}
            for number in range(first, first + count)
        ]
        (path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


class DomainData(PromptDataModule):
    """Problems of three domains, so few that ranks often lack one."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for split, found in self.splits.items():
            self.splits[split] = [replace(problem, domain=DOMAINS[problem.id % 5 % 3]) for problem in found]


def data(folder: Path, batch_size: int = 4) -> PromptDataModule:
    """The same global batches on any number of processes."""
    sizes = {"batch_size": batch_size // processes(), "eval_batch_size": batch_size // processes()}
    return DomainData(str(problems(folder)), TASK, **sizes)


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
        self.path, self.step, self.written = path, step, False

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.written:  # a batch may be drawn without a step
            trainer.save_checkpoint(self.path)
            self.written = True


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


FINE = UpdateConfig(epochs=2, micro_tokens=40)  # chunks of a row or two: ranks have different numbers of them
WARM = CriticConfig(lr=0.05, warmup=1)
KL = {"kl_coef": 0.05}
FITS: dict[str, tuple[str, Callable[..., Any]]] = {
    "ddp grpo": ("ddp", lambda: build(GRPO, loss=LossConfig(reduction="seq_mean_token_mean", **KL), update=FINE)),
    "ddp dr grpo": ("ddp", lambda: build(GRPO, scale="none", loss=LossConfig(reduction="const_norm"), update=FINE)),
    "ddp batch deviation": ("ddp", lambda: build(GRPO, scale="batch", loss=LossConfig(), update=FINE)),
    "ddp reinforce++": (
        "ddp",
        lambda: build(
            GRPO,
            estimator="reinforce_pp",
            loss=LossConfig(kl="k1", kl_in="reward", kl_target=0.001, kl_horizon=50, **KL),
            update=FINE,
        ),
    ),
    "ddp adapters": ("ddp", lambda: build(GRPO, lora=Lora(r=4), loss=LossConfig(**KL), update=FINE)),
    "ddp ppo": ("ddp", lambda: build(PPO, critic=WARM, decay=0.9, update=FINE)),
    "ddp untied ppo": ("ddp", lambda: build(PPO, backbone="untied", critic=WARM, update=FINE)),
    "ddp tre": ("ddp", lambda: build(TRE, critic=CriticConfig(kind="head", lr=0.05), update=FINE)),
    "ddp adaptive entropy": (
        "ddp",
        lambda: build(
            GRPO, loss=LossConfig(), update=FINE, exploration=ExplorationConfig(kind="adaptive_entropy", target=7.0)
        ),
    ),
    "ddp rose": (
        "ddp",
        lambda: build(
            ROSE,
            tree=TreeConfig(score="random"),  # near ties of other scores would be turned over by rounding
            rollout=replace(ROLLOUT, stop_strings=["z", "ing"]),  # longer responses, which branch inside
            loss=LossConfig(reduction="const_norm", **KL),
            update=FINE,
        ),
    ),
    "ddp sft": ("ddp", lambda: sft(micro_tokens=20)),
    "fsdp grpo": ("fsdp", lambda: build(GRPO, loss=LossConfig(**KL), update=FINE)),
    "fsdp untied grpo": ("fsdp", lambda: build(GRPO, backbone="untied", loss=LossConfig(**KL), update=FINE)),
    "fsdp adapters": ("fsdp", lambda: build(GRPO, lora=Lora(r=4), loss=LossConfig(**KL), update=FINE)),
    "fsdp ppo": ("fsdp", lambda: build(PPO, critic=WARM, update=FINE)),
    "fsdp ppo, head": ("fsdp", lambda: build(PPO, critic=CriticConfig(kind="head", lr=0.05), update=FINE)),
    "fsdp rose": (
        "fsdp",
        lambda: build(
            ROSE, tree=TreeConfig(score="random"), loss=LossConfig(reduction="const_norm", **KL), update=FINE
        ),
    ),
    "fsdp sft": ("fsdp", lambda: sft(micro_tokens=20)),
    "ddp mgs": ("ddp", lambda: build(MGS, loss=LossConfig(**KL), update=FINE)),
    "ddp mgs, adapters": ("ddp", lambda: build(MGS, lora=Lora(r=4), surgery=SurgeryConfig("linear"), update=FINE)),
    "ddp mgs, equal domains": (
        "ddp",
        lambda: build(
            MGS,
            loss=LossConfig(reduction="const_norm", **KL),
            surgery=SurgeryConfig("block", "gradvac", weighting="per_domain_mean"),
            normalisation="domain",
            update=FINE,
        ),
    ),
    "fsdp mgs": ("fsdp", lambda: build(MGS, loss=LossConfig(**KL), update=FINE)),
    "fsdp mgs, untied": ("fsdp", lambda: build(MGS, backbone="untied", surgery=SurgeryConfig("global"), update=FINE)),
}


def sft(**settings: Any) -> Any:
    return SFT("nano-qwen3", evaluation=EVALUATION, optimizer=sgd, schedule=FLAT, reward_workers=0, **settings)


def fitted(build_one: Callable[..., Any], folder: Path, strategy: str, untied: str, steps: int = 3) -> dict[str, Any]:
    """Weights after a fit, and what was logged."""
    module = build_one()
    module.backbone = untied if module.backbone == "untied" else module.backbone
    run = fit(module, folder, steps, strategy=strategy)
    of_a_rank = ("policy/ratio_max", "train/loss", "value/explained_variance")
    by_rounding = ("value/clip_fraction",)  # at the first step of a batch values stand where they stood
    logged = {
        name: value.detach()
        for name, value in run.callback_metrics.items()
        if not name.startswith("time") and name not in (*of_a_rank, *by_rounding)
    }
    return {"weights": weights(module), "logged": logged, "steps": run.global_step}


def resumed(name: str, folder: Path) -> dict[str, Any]:
    """A fit of four steps, and its last two again from the checkpoint after the second."""
    path = folder / f"{name}.ckpt"
    strategy, build_one = FITS[name]
    whole, again = build_one(), build_one()
    fit(whole, folder, 4, SaveAt(path, 2), strategy=strategy)
    fit(again, folder, 4, strategy=strategy, ckpt=path)
    return {"weights": weights(whole), "resumed": weights(again)}


def evaluated(folder: Path, strategy: str) -> dict[str, Any]:
    """Metrics of an untrained policy, inside the loop and behind it, and its responses."""
    module = build(GRPO, loss=LossConfig())
    run = trainer(folder, 1, strategy=strategy, limit_val_batches=1.0)
    metrics = {}
    for verb in (run.validate, run.test):
        verb(module, datamodule=data(folder), verbose=False)
        metrics |= {name: value.detach() for name, value in run.callback_metrics.items()}
    return {"metrics": metrics, "texts": {result.id: result.texts for result in module.results}}


class Chosen:
    """Different rewards for the responses to the problems at some places of the first epoch."""

    def __init__(self, folder: Path, *places: int) -> None:
        source = data(folder)
        source.setup("fit")
        order = permutation(26, 0, 0, 0)
        self.ids = {source.splits["train"][order[place]].id for place in places}

    def rewards(self, problems: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [float(problem.id in self.ids and at % 2 == 0) for at, problem in enumerate(problems)]

    def close(self) -> None:
        """Nothing is open."""


def uneven(folder: Path, mini_batches: int) -> dict[str, Any]:
    """Dynamic sampling that gives up with different numbers of groups on the ranks."""
    module = build(
        GRPO,
        scale="none",
        loss=LossConfig(reduction="const_norm"),
        rollout=replace(ROLLOUT, dynamic=True, most_draws=2),
        update=replace(FINE, mini_batches=mini_batches),
    )
    module.scorer = Chosen(folder, 0, 2, 7)  # of two batches of four: one on rank 0, two on rank 1
    run = fit(module, folder, 1, strategy="ddp")
    return {"weights": weights(module), "steps": run.global_step}


def dull(folder: Path) -> dict[str, Any]:
    """Batches without a signal between others: on one rank, on both."""
    module = build(GRPO, loss=LossConfig(), update=FINE, optimizer=adam)
    module.scorer = Chosen(folder, 0, 2, 4, 12)
    run = fit(module, folder, 4, strategy="ddp")
    return {"weights": weights(module), "steps": run.global_step}


def scenarios(folder: Path, untied: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that two processes must do as one does."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda one=one, strategy=strategy: fitted(one, folder, strategy, untied)
        for name, (strategy, one) in FITS.items()
    }
    return found | {
        "fsdp grpo resumed": lambda: resumed("fsdp grpo", folder),
        "fsdp ppo resumed": lambda: resumed("fsdp ppo", folder),
        "fsdp mgs resumed": lambda: resumed("fsdp mgs", folder),
        "fsdp adapters resumed": lambda: resumed("fsdp adapters", folder),
        "ddp ppo resumed": lambda: resumed("ddp ppo", folder),
        "ddp evaluated": lambda: evaluated(folder, "ddp"),
        "fsdp evaluated": lambda: evaluated(folder, "fsdp"),
        "ddp dull": lambda: dull(folder),
        "ddp uneven": lambda: uneven(folder, 1),
        "ddp uneven, three steps": lambda: uneven(folder, 3),
    }


def main(folder: str, untied: str, *names: str) -> None:
    """Run scenarios on this rank; the first one writes what came out."""
    warnings.filterwarnings("ignore")  # advice of torch and lightning on tiny runs; the one-process runs have errors
    torch.set_num_threads(1)
    out = Path(folder)
    known = scenarios(out, untied)
    trainer(out, 1, strategy="ddp").strategy.setup_environment()  # the process group that all runs share
    for name in names or known:
        found = known[name]()
        if rank() == 0:
            torch.save(found, out / f"{name}.pt")
            print("done", name, flush=True)


if __name__ == "__main__":
    become_two_ranks(main, *sys.argv[1:])
