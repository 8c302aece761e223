"""Fits of CoCoA's stages for `test_cocoa_on_two_processes.py`: on two processes and on one."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from two_ranks import become_two_ranks

from lit_core.callbacks.step_seed import StepSeed
from lit_core.optim import Schedule
from lit_embed.data.multimodal_datamodule import MultimodalDataModule
from lit_embed.data.scenes import SceneConfig
from lit_embed.methods.cocoa import CoCoA
from lit_embed.modules.multimodal_tokenization import MultimodalConfig

SCENES = SceneConfig(train_scenes=24, eval_scenes=4, candidates=4, family=2)
ENCODER = MultimodalConfig(max_tokens=64, image_size=56, chunk_tokens=150)
STAGES = ("warmup", "reconstruction", "contrastive")
STEPS, BATCH = 2, 8


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def build(stage: Any, **settings: Any) -> CoCoA:
    common: dict[str, Any] = {"backbone": "tiny-qwen2-vl", "encoder": ENCODER, "schedule": Schedule("constant")}
    return CoCoA(stage=stage, **{**common, "optimizer": sgd, "temperature": 0.1, **settings})


class SaveAt(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(
    module: CoCoA, folder: Path, strategy: str, steps: int = STEPS, *callbacks: Callback, ckpt: Path | None = None
) -> dict[str, Tensor]:
    """Trained weights, whole on every rank; the same global batches on any number of processes."""
    kind: Any = "auto"
    if processes() > 1:
        kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp" else strategy
    run = Trainer(
        accelerator="cpu", devices=processes(), strategy=kind, max_steps=steps, use_distributed_sampler=False,
        num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=[StepSeed(0), *callbacks], limit_val_batches=0,
    )  # fmt: skip
    data = MultimodalDataModule(stage=module.stage, scenes=SCENES, batch_size=BATCH // processes())  # type: ignore[arg-type]
    run.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    found = {}
    for name, parameter in module.named_parameters():
        whole = getattr(parameter, "full_tensor", None)
        found[name] = (parameter if whole is None else whole()).detach().clone()
    return found


def scenarios(folder: Path) -> dict[str, dict[str, Tensor]]:
    found = {}
    for strategy in ("ddp", "fsdp") if processes() > 1 else ("auto",):
        for stage in STAGES:
            found[f"{strategy} {stage}"] = fit(build(stage), folder, strategy)
        cached = build("contrastive", grad_cache=True)
        found[f"{strategy} cached"] = fit(cached, folder, strategy)
    if processes() > 1:
        half = folder / "half.ckpt"
        found["fsdp whole"] = fit(build("reconstruction"), folder, "fsdp", 3, SaveAt(half, 2))
        found["fsdp resumed"] = fit(build("reconstruction"), folder, "fsdp", 3, ckpt=half)
    return found


def main(folder: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    target = Path(folder)
    result = scenarios(target)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, target / "weights.pt")


if __name__ == "__main__":
    become_two_ranks(main, *sys.argv[1:])
