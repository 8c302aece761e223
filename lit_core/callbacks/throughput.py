"""Tokens and seconds of a training step."""

import time
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


@runtime_checkable
class CountsTokens(Protocol):
    """A module that knows how many tokens it processes in a batch."""

    def batch_tokens(self, batch: Any) -> int:
        """Tokens of the batch without padding, on this process, from what the host knows: no copy from a device."""
        ...


class Throughput(Callback):
    """Logs ``time/tokens_per_s`` and ``time/step_s`` (seconds a batch), averaged over ``log_every_n_steps`` batches.

    The clock runs from the end of one batch to the end of the next, loading included; validation in between is left
    out. Nothing waits for the device: the host may run ahead of it by what is queued. The numbers are those of one
    process. ``tokens`` counts all tokens trained on and survives a restart from a checkpoint.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._reset()

    def _reset(self) -> None:
        self.window_tokens, self.window_batches, self.window_start = 0, 0, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, CountsTokens):
            raise ValueError(f"Throughput needs a method batch_tokens(batch) in {type(pl_module).__name__}")
        self.window = max(1, int(vars(trainer)["log_every_n_steps"]))  # Lightning does not declare this attribute
        self.latest: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, CountsTokens)  # setup has refused others
        tokens = pl_module.batch_tokens(batch)
        self.tokens += tokens
        self.window_tokens += tokens
        self.window_batches += 1
        if self.window_batches >= self.window:
            seconds = time.perf_counter() - self.window_start
            values = {"time/tokens_per_s": self.window_tokens / seconds, "time/step_s": seconds / self.window_batches}
            self.latest = {name: torch.tensor(value) for name, value in values.items()}
            self._reset()
        for name, value in self.latest.items():  # every time, as the trainer decides when loggers write
            pl_module.log(name, value)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.window_start += time.perf_counter() - self.paused
