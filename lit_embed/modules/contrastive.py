"""InfoNCE over in-batch and hard negatives, on any number of devices."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_core.sharding import gather_rows, maximum, row_offset, share_of_mean, world_size
from lit_embed.functional.losses import candidate_mask, per_query_distillation, per_query_info_nce, similarity
from lit_embed.modules.batches import PairBatch


@dataclass(frozen=True)
class ContrastiveLoss:
    """InfoNCE of a batch (card LLM-QL, section 2.5).

    Args:
        temperature: Divides the cosine similarity.
        symmetric: Average the query-to-passage loss with the passage-to-query loss.
        cross_device: Use the passages of all devices as negatives, with exact gradients.
        matryoshka: Also train these shorter prefixes of the vectors; the loss is the mean over lengths.
        distillation: Follow a teacher's scores of a query's own passages, where the batch has them, from the queries
            to the passages.
    """

    temperature: float
    symmetric: bool = False
    cross_device: bool = True
    matryoshka: tuple[int, ...] = ()
    distillation: bool = False

    def __call__(self, vectors: Tensor, batch: PairBatch) -> Tensor:
        """Loss, shape ``()``.

        Averaged over ranks it is the mean over all queries of all ranks, and so are its gradients, also where ranks
        hold different numbers of queries.

        Args:
            vectors: ``(B + N, D)``: the batch's queries, then its passages.
            batch: Targets and keys.
        """
        queries, passages = vectors[: batch.queries], vectors[batch.queries :]
        keys, targets, own, groups = batch.passage_keys, batch.targets, batch.own, batch.groups
        scale = 1.0
        if self.cross_device and world_size() > 1:
            offset = row_offset(len(passages), passages.device)
            passages, keys, targets = gather_rows(passages), gather_rows(keys), targets + offset
            same = batch.passage_keys[:, None] == keys  # the copy that counts may be on another rank
            own = (own.float() @ same.float()).bool()
            if groups is not None:
                groups = same.int().argmax(1)[groups]  # the first copy, the one that counts
            scale = share_of_mean(batch.queries, queries.device)
        mask = candidate_mask(keys, batch.positive_keys, targets, own, batch.own_only)
        if groups is not None:
            groups = torch.cat(
                [targets[:, None], groups[:, 1:].where(groups[:, 1:] != groups[:, :1], targets[:, None])], 1
            )
        losses = [
            self._directions(queries, passages, targets, mask, batch, groups, size) for size in [None, *self.matryoshka]
        ]
        return torch.stack(losses).mean() * scale

    def _directions(
        self,
        queries: Tensor,
        passages: Tensor,
        targets: Tensor,
        mask: Tensor,
        batch: PairBatch,
        groups: Tensor | None,
        size: int | None,
    ) -> Tensor:
        queries, passages = queries[:, :size], passages[:, :size]
        if self.distillation and batch.teacher is not None and groups is not None:
            logits = similarity(queries, passages) / self.temperature
            forward = per_query_distillation(logits, groups, batch.teacher, mask).mean()
        else:
            forward = per_query_info_nce(queries, passages, self.temperature, targets, mask).mean()
        if not self.symmetric:
            return forward
        everyone, positive_keys = queries, batch.positive_keys
        offset = 0
        if self.cross_device and world_size() > 1:
            widest = maximum(positive_keys.shape[1], queries.device)
            offset = row_offset(len(queries), queries.device)
            everyone = gather_rows(queries)
            positive_keys = gather_rows(F.pad(positive_keys, (0, widest - positive_keys.shape[1]), value=-1))
        own_keys = batch.passage_keys[batch.targets]
        own = torch.arange(len(queries), device=queries.device) + offset
        answers = (positive_keys[None] == own_keys[:, None, None]).any(-1)  # (B, all queries): also answered by it
        answers = answers.scatter(1, own[:, None], False)
        answers |= batch.own_only[:, None] & (own[:, None] != torch.arange(len(everyone), device=own.device))
        backward = per_query_info_nce(passages[targets], everyone, self.temperature, own, answers)
        return (forward + backward.mean()) / 2
