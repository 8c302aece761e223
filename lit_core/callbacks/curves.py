"""Record logged values over training, for the plots of a report."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_core.files import read_json, write_json

EVALUATION = ("val/", "test/")


class CurveRecorder(Callback):
    """Writes ``curves.json``: for each logged name the points ``[[optimizer step, value], ...]``.

    The curves are part of the checkpoint, so a resumed run's file has no gap and no step twice. The file is written
    with every checkpoint, after every validation and at the end of training.

    Args:
        folder: Where ``curves.json`` goes; the trainer's ``default_root_dir`` if not given.
        every_n_steps: Training values are read each time this many optimizer steps were taken (the only time they are
            copied to the host); validation values after every validation.
    """

    def __init__(self, folder: Path | None = None, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.folder, self.every_n_steps = folder, every_n_steps
        self.curves: dict[str, list[list[float]]] = {}
        self.last_step = 0

    def state_dict(self) -> dict[str, Any]:
        curves = {name: [list(point) for point in points] for name, points in self.curves.items()}
        return {"curves": curves, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: [list(point) for point in points] for name, points in state_dict["curves"].items()}
        self.last_step = state_dict["last_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._path(trainer)
        if trainer.global_step == 0 or not path.exists():
            return
        # a checkpoint saved just before the validation of its step lacks that point, and the validation is not repeated
        for name, points in read_json(path).items():
            known = self.curves.setdefault(name, [])
            if name.startswith("val/"):
                steps = {step for step, _ in known}
                known += [point for point in points if point[0] <= trainer.global_step and point[0] not in steps]
                known.sort()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step // self.every_n_steps > self.last_step // self.every_n_steps:  # manual steps may jump over a multiple
            metrics = trainer.callback_metrics.items()
            self._record(step, {name: value for name, value in metrics if not name.startswith(EVALUATION)})
        self.last_step = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return  # a check before training, or `validate` on its own
        metrics = trainer.callback_metrics.items()
        self._record(trainer.global_step, {name: value for name, value in metrics if name.startswith("val/")})
        self._write(trainer)

    def _record(self, step: int, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            number = float(value)
            points = self.curves.setdefault(name, [])
            if math.isfinite(number) and (not points or points[-1][0] < step):  # JSON has no NaN
                points.append([step, number])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _path(self, trainer: Trainer) -> Path:
        return Path(self.folder or trainer.default_root_dir) / "curves.json"

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            write_json(self._path(trainer), {name: points for name, points in self.curves.items() if points})
