"""Retrieval metrics of ranked gains, one value per query; conventions as in ``retrieval.evaluate``.

``gains`` is ``(Q, K)``: the relevance of each query's ranked documents, best-ranked first, 0 where unjudged or where
the ranking has ended. ``all_gains`` is ``(Q, R)``: the relevance of every judged document of the query in any order,
padded with 0. A document is relevant from relevance 1 on; lower ones count as 0. A query without a relevant document
gets 0. Everything is computed and returned in float32.
"""

import torch
from torch import Tensor

RELEVANT_FROM = 1  # lowest relevance that counts, as in trec_eval and ranx


def ranked_gains(indices: Tensor, judged: Tensor, judged_gains: Tensor) -> Tensor:
    """Look up the relevance of ranked documents.

    Args:
        indices: Ranked document rows, int ``(Q, K)``.
        judged: Judged document rows of each query, int ``(Q, R)``, padded with -1.
        judged_gains: Their relevance, ``(Q, R)``, padded with 0.

    Returns:
        ``(Q, K)``, float32.
    """
    same = indices.unsqueeze(-1) == judged.unsqueeze(1)  # (Q, K, R)
    return torch.where(same & (judged >= 0).unsqueeze(1), judged_gains.float().unsqueeze(1), 0.0).sum(-1)


def _relevant(gains: Tensor, cutoff: int | None) -> Tensor:
    return gains[:, :cutoff] >= RELEVANT_FROM


def dcg(gains: Tensor, cutoff: int | None = None) -> Tensor:
    """Discounted cumulative gain ``sum_i gain_i / log2(i + 1)`` over ranks ``i`` from 1 to the cut-off, ``(Q,)``."""
    counted = gains[:, :cutoff].float() * _relevant(gains, cutoff)
    return (counted / torch.arange(2, counted.shape[1] + 2, device=gains.device).log2()).sum(1)


def ndcg(gains: Tensor, all_gains: Tensor, cutoff: int | None = None) -> Tensor:
    """DCG divided by that of the best possible ranking, ``(Q,)``."""
    ideal = dcg(all_gains.float().sort(dim=1, descending=True).values, cutoff)
    return dcg(gains, cutoff) / ideal.where(ideal > 0, 1.0)


def reciprocal_rank(gains: Tensor, cutoff: int | None = None) -> Tensor:
    """One divided by the rank of the first relevant document, 0 where there is none, ``(Q,)``."""
    relevant = _relevant(gains, cutoff).float()
    return torch.cat([relevant / _ranks(relevant), relevant.new_zeros(len(relevant), 1)], dim=1).amax(1)


def recall(gains: Tensor, all_gains: Tensor, cutoff: int | None = None) -> Tensor:
    """Share of the relevant documents that are ranked, ``(Q,)``."""
    return _relevant(gains, cutoff).float().sum(1) / _relevant(all_gains, None).float().sum(1).clamp(min=1)


def precision(gains: Tensor, cutoff: int) -> Tensor:
    """Relevant documents divided by the cut-off, also where fewer are ranked, ``(Q,)``."""
    return _relevant(gains, cutoff).float().sum(1) / cutoff


def hit_rate(gains: Tensor, cutoff: int | None = None) -> Tensor:
    """1 where at least one relevant document is ranked, else 0, ``(Q,)``."""
    return _relevant(gains, cutoff).any(1).float()


def average_precision(gains: Tensor, all_gains: Tensor, cutoff: int | None = None) -> Tensor:
    """Mean over all relevant documents of the precision at their rank, 0 for those not ranked, ``(Q,)``."""
    relevant = _relevant(gains, cutoff).float()
    precisions = relevant * relevant.cumsum(1) / _ranks(relevant)
    return precisions.sum(1) / _relevant(all_gains, None).float().sum(1).clamp(min=1)


def _ranks(like: Tensor) -> Tensor:
    return torch.arange(1, like.shape[1] + 1, device=like.device)
