"""Reward modelling: a scalar head on any backbone, trained on preferences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization, transformer_blocks
from lit_core.errors import InputError
from lit_core.module import Method
from lit_core.optim import Schedule
from lit_core.sharding import gather_objects, shard
from lit_core.tokens import Tokens
from lit_rl.functional.preference import bradley_terry_loss, pairwise_accuracy
from lit_rl.modules.dialogues import DialogueTokenizer
from lit_rl.modules.reward_model import RewardModel, build_reward_model


@dataclass
class PreferenceBatch:
    """Pairs of dialogues.

    Args:
        tokens: The preferred dialogues, then the others in the same order.
        margins: ``(B,)``, by how much each preferred reward should be larger.
        ids: Names of the pairs.
    """

    tokens: Tokens
    margins: Tensor
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PreferenceBatch":
        """Move the tensors; lightning calls this for its batch transfer."""
        margins = self.margins.to(device, non_blocking=non_blocking)
        return PreferenceBatch(self.tokens.to(device, non_blocking), margins, self.ids)

    def pin_memory(self) -> "PreferenceBatch":
        """Copy the tensors into page-locked memory; the data loader calls this."""
        return PreferenceBatch(self.tokens.pin_memory(), self.margins.pin_memory(), self.ids)


class PreferenceCollator:
    """Pairs to tokens."""

    def __init__(self, tokenize: DialogueTokenizer) -> None:
        self.tokenize = tokenize

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> PreferenceBatch:
        tokens = self.tokenize([pair[side] for side in ("chosen", "rejected") for pair in pairs])
        margins = torch.tensor([pair["margin"] for pair in pairs], dtype=torch.float32)
        return PreferenceBatch(tokens, margins, [pair["id"] for pair in pairs])


class RewardModelling(Method):
    """Bradley-Terry reward model (Ouyang et al., arXiv 2203.02155, eq. 1), with the rewards kept around zero.

    Args:
        backbone: Preset, local folder or hub id; a reward model keeps its head, any other backbone gets a new one.
        max_length: Most tokens of a dialogue, whose end is kept; None takes what tokenizer and backbone allow.
        centre: Weight of the squared sum of a pair's rewards.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    model: RewardModel

    def __init__(
        self,
        backbone: str,
        max_length: int | None = None,
        centre: float = 0.01,
        loading: BackboneConfig = BackboneConfig(),  # noqa: B008  read only
        lora: Lora = Lora(),  # noqa: B008
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0),
        schedule: Schedule = Schedule(warmup_ratio=0.1),  # noqa: B008
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(optimizer, schedule, max_grad_norm)
        self.save_hyperparameters()
        if not centre >= 0:
            raise InputError(f"must be 0 or more, got {centre}", field="centre")
        self.backbone, self.max_length, self.centre, self.loading = backbone, max_length, centre, loading
        self.lora, self.quantization = lora, quantization
        self.strict_loading = quantization is None  # quantised layers are not read back from a checkpoint
        self.rewards: dict[str, tuple[float, float]] = {}
        self._collected: list[tuple[list[str], Tensor]] = []

    def configure_model(self) -> None:
        """Build the model once, and shard it where the strategy has a device mesh."""
        if "model" in dict(self.named_children()):
            return
        self.model = build_reward_model(self.backbone, self.max_length, self.loading, self.lora, self.quantization)
        if self.device_mesh is not None:
            classifier = self.model.model
            shard(classifier, self.device_mesh, transformer_blocks(classifier))
            self.model.equal_chunks = True

    def preference_collator(self) -> Callable[[list[Any]], PreferenceBatch]:
        """Turns pairs into a batch; called by the data module."""
        return PreferenceCollator(self.model.tokenize)

    def batch_tokens(self, batch: PreferenceBatch) -> int:
        """Tokens of a training batch, padding not counted."""
        return sum(batch.tokens.lengths)

    def forward(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Rewards of the preferred dialogues and of the others, both float32 ``(B,)``."""
        rewards = self.model(batch.tokens)
        return rewards[: len(batch)], rewards[len(batch) :]

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        chosen, rejected = self(batch)
        loss = bradley_terry_loss(chosen, rejected, batch.margins, self.centre)  # ranks have equally many pairs
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        margin = (chosen - rejected).detach().mean()
        values = {"train/accuracy": pairwise_accuracy(chosen, rejected), "train/reward_margin": margin}
        self.log_dict(values, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._collected = []

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        self._summarise("val")

    def on_test_epoch_start(self) -> None:
        self._collected = []

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/*``; ``self.rewards`` keeps both rewards of each pair for whoever writes them."""
        self.rewards = self._summarise("test")

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        chosen, rejected = self(batch)
        return {"ids": batch.ids, "chosen": chosen, "rejected": rejected}

    def export(self, output: Path, form: str = "merged") -> None:
        """Write a folder for ``AutoModelForSequenceClassification`` (``merged`` weights or the ``adapter``)."""
        self.model.save(output, form, self.backbone)

    def _collect(self, batch: PreferenceBatch) -> None:
        self._collected.append((batch.ids, torch.stack([*self(batch), batch.margins], dim=1)))

    def _summarise(self, stage: str) -> dict[str, tuple[float, float]]:
        """Log loss, accuracy and margin over the pairs of all ranks, each counted once."""
        ids = [pair_id for part, _ in self._collected for pair_id in part]
        rows = torch.cat([part for _, part in self._collected]).cpu() if ids else torch.empty(0, 3)
        found: dict[str, Tensor] = {}
        for some_ids, some_rows in gather_objects((ids, rows)):
            found.update(zip(some_ids, some_rows, strict=True))
        chosen, rejected, margins = torch.stack([found[pair_id] for pair_id in sorted(found)]).unbind(1)
        values = {
            f"{stage}/loss": bradley_terry_loss(chosen, rejected, margins, self.centre),
            f"{stage}/accuracy": pairwise_accuracy(chosen, rejected),
            f"{stage}/reward_margin": (chosen - rejected).mean(),
        }
        self.log_dict({name: float(value) for name, value in values.items()}, prog_bar=True, sync_dist=True)
        pairs = zip(chosen.tolist(), rejected.tolist(), strict=True)
        return dict(zip(sorted(found), pairs, strict=True))
