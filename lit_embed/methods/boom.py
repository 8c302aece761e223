"""BOOM (arXiv 2602.05787): members of one base, each trained on a bag of every dataset, are merged into one model.

This is the training of a member: contrastive learning on datasets of several task types. Which rows and in which order
is the data module's; members start from one folder (``backbone``), and ``lit_core.merging`` merges what they export.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_core.sharding import gather_objects, rank, world_size
from lit_embed.methods.cached_step import cached_step
from lit_embed.methods.retriever import Retriever
from lit_embed.modules.batches import PairBatch, TextBatch
from lit_embed.modules.contrastive import ContrastiveLoss
from lit_embed.modules.evaluation import Vectors
from lit_embed.modules.tokenization import EncoderConfig
from lit_embed.retrieval.tasks import EvalTask, mean_scores

DEFAULT_ENCODER = EncoderConfig(pooling="last", query_length=512, passage_length=512)


class Boom(Retriever):
    """A member of BOOM (Zhang et al. 2026), or any encoder of several tasks.

    Args:
        backbone: Preset, local folder or hub id; all members start from the same one.
        temperature: Divides the cosine similarity.
        cross_device: Use the passages of all devices as negatives, with exact gradients.
        grad_cache: Bound the memory by one chunk at the price of a second forward pass (GradCache).
        distillation: Follow a teacher's scores where the data has them.
        encoder: Pooling, prompts, lengths.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule, over each member's own steps.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    def __init__(
        self,
        backbone: str,
        temperature: float = 0.02,
        cross_device: bool = True,
        grad_cache: bool = False,
        distillation: bool = False,
        encoder: EncoderConfig = DEFAULT_ENCODER,
        loading: BackboneConfig = BackboneConfig(),  # noqa: B008  read only
        lora: Lora = Lora(),  # noqa: B008
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-5, weight_decay=0.0),
        schedule: Schedule = Schedule("linear", warmup_ratio=0.1),  # noqa: B008
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(backbone, encoder, loading, lora, quantization, 0, optimizer, schedule, max_grad_norm)
        if not temperature > 0:
            raise InputError(f"temperature must be above 0, got {temperature}")
        self.save_hyperparameters()
        self.loss = ContrastiveLoss(temperature, cross_device=cross_device, distillation=distillation)
        self.grad_cache = grad_cache
        self.automatic_optimization = not grad_cache
        self.task_scores: dict[str, dict[str, float]] = {}
        self.task_means: dict[str, float] = {}

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        loss = cached_step(self, batch, self.loss) if self.grad_cache else self.pair_loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.queries)
        return loss

    def pair_loss(self, batch: PairBatch) -> Tensor:
        return self.loss(self.encoder(batch.tokens), batch)

    def validation_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.collected[dataloader_idx].add(batch, self(batch))

    def on_validation_epoch_end(self) -> None:
        self._score_tasks("validate", "val")

    def on_test_epoch_end(self) -> None:
        """Score the tasks and log ``test/*``; ``task_scores`` and ``task_means`` keep everything for a report."""
        self._score_tasks("test", "test")

    def _score_tasks(self, stage: str, prefix: str) -> None:
        """Score the tasks, each on one rank, and log main scores and their means."""
        evaluation = self._data().evaluation(stage)
        queries, passages = (_by_key(side) if side.rows else {} for side in self.collected)
        self.collected = (Vectors(), Vectors())
        self.task_scores, self.task_means = score_tasks(evaluation, queries, passages)
        found, tasks = self.task_scores, [task for task, _, _ in evaluation if task.name in self.task_scores]
        logged: dict[str, Any] = {f"{task.name}/{task.main}": found[task.name][task.main] for task in tasks}
        values = {f"{prefix}/{name}": value for name, value in {**logged, **self.task_means}.items()}
        self.log_dict(values, sync_dist=True)


def score_tasks(
    evaluation: Sequence[tuple[EvalTask, Mapping[str, str], Mapping[str, str]]],
    queries: Mapping[str, Tensor],
    passages: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """All scores of every task, and means of the main ones; ranks share the tasks out.

    A task of which a text was not encoded, as under the trainer's ``limit_val_batches``, is left out with a warning.

    Args:
        evaluation: Tasks, and for each the key of every text among the vectors.
        queries: Vectors of one side by key.
        passages: Those of the other.

    Returns:
        Scores by the names of the tasks that are whole, and means over these; both are empty where none is.
    """
    whole = [
        one for one in evaluation
        if queries.keys() >= set(one[1].values()) and passages.keys() >= set(one[2].values())
    ]  # fmt: skip
    tasks = [task for task, _, _ in whole]
    if left_out := {task.name for task, _, _ in evaluation} - {task.name for task in tasks}:
        rank_zero_warn(
            f"{len(left_out)} of {len(evaluation)} tasks are not scored, as some of their texts were not encoded (is "
            f"the number of batches limited?): {', '.join(sorted(left_out))}"
        )
    own = {
        task.name: task.score(
            {text_id: queries[key] for text_id, key in query_keys.items()},
            {text_id: passages[key] for text_id, key in passage_keys.items()},
        )
        for task, query_keys, passage_keys in whole[rank() :: world_size()]
    }
    found = {name: values for part in gather_objects(own) for name, values in part.items()}
    scores = {task.name: found[task.name] for task in tasks}
    return scores, mean_scores(scores, tasks) if tasks else {}


def _by_key(side: Vectors) -> dict[str, Tensor]:
    ids, vectors = side.everywhere()
    return dict(zip(ids, vectors.cpu(), strict=True))
