"""Responses for the eye: a table in TensorBoard, and a file with all that were shown."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_core.files import write_text
from lit_rl.methods.policy_gradient import PolicyGradient
from lit_rl.methods.policy_method import PolicyMethod

SHOWN = 8  # responses of a table
MOST_CHARACTERS = 2000  # of a prompt or response in it


class SampleTable(Callback):
    """Writes ``samples/rollout`` and ``samples/val`` as text to TensorBoard, and ``samples.jsonl``.

    Args:
        folder: The run's folder.
        every_n_steps: Rollouts are shown each time this many updates were made; validation always.
    """

    def __init__(self, folder: Path, every_n_steps: int = 10) -> None:
        self.path, self.every_n_steps = folder / "samples.jsonl", every_n_steps
        self.shown_at = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if not isinstance(pl_module, PolicyGradient) or pl_module.latest is None or step == self.shown_at:
            return
        if step == 1 or step % self.every_n_steps == 0:
            rollout = pl_module.latest
            rows = [
                (problem.prompt, text, reward)
                for problem, text, reward in zip(rollout.problems, rollout.texts, rollout.rewards, strict=True)
            ]
            self._show(trainer, "rollout", rows[:SHOWN])
            self.shown_at = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PolicyMethod) or trainer.sanity_checking:
            return
        rows = [
            (f"problem {result.id}", text, reward)
            for result in pl_module.results
            for text, reward in zip(result.texts[:1], result.rewards[:1], strict=True)
        ]
        self._show(trainer, "val", rows[:SHOWN])

    def _show(self, trainer: Trainer, name: str, rows: list[tuple[str, str, float]]) -> None:
        if not trainer.is_global_zero or not rows:
            return
        step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(f"samples/{name}", _table(rows), step)
        lines = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for prompt, response, reward in rows:
            entry = {"step": step, "split": name, "prompt": prompt, "response": response, "reward": reward}
            lines += json.dumps(entry, ensure_ascii=False) + "\n"
        write_text(self.path, lines)


def _table(rows: list[tuple[str, str, float]]) -> str:
    """Markdown; every cell is one line of code, so that what a policy writes is shown and not interpreted."""
    lines = ["| prompt | response | reward |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {_cell(prompt)} | {_cell(text)} | {reward:.3f} |" for prompt, text, reward in rows)]
    )


def _cell(text: str) -> str:
    shown = text[:MOST_CHARACTERS].replace("|", "\\|").replace("`", "'").replace("\n", " ⏎ ")
    return f"`{shown}`" if shown else "(empty)"
