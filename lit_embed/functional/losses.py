"""Contrastive losses. Scores, softmax and losses are float32 whatever the dtype of the embeddings."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Direction = Literal["query_to_passage", "passage_to_query", "query_to_query", "passage_to_passage"]
Hardness = Literal["in_batch", "own", "all"]


def false_negative_mask(passage_keys: Tensor, positive_keys: Tensor, targets: Tensor) -> Tensor:
    """Candidates that must not count as negatives because they are, by document id, positives of the query.

    Args:
        passage_keys: Long ``(N,)``; equal keys mean the same document.
        positive_keys: Long ``(B, P)``, keys of all known positives of each query, padded with -1.
        targets: Long ``(B,)``, column of each query's own positive, which is never masked.

    Returns:
        Bool ``(B, N)``, True = leave out of the softmax.
    """
    mask = torch.zeros(len(positive_keys), len(passage_keys), dtype=torch.bool, device=passage_keys.device)
    for keys in positive_keys.unbind(1):  # a handful of columns; avoids a (B, N, P) tensor
        mask |= (keys[:, None] == passage_keys[None]) & (keys >= 0)[:, None]
    return mask.scatter_(1, targets[:, None], False)


def own_group_mask(targets: Tensor, group_size: int, passages: int, own_only: Tensor) -> Tensor:
    """Leave only the query's own group of passages, for queries whose dataset forbids in-batch negatives.

    Args:
        targets: Long ``(B,)``, first column of each query's group.
        group_size: Passages a query.
        passages: Number of candidates ``N``.
        own_only: Bool ``(B,)``, True = this query sees its own group alone.

    Returns:
        Bool ``(B, N)``, True = leave out of the softmax.
    """
    column = torch.arange(passages, device=targets.device)
    outside = (column < targets[:, None]) | (column >= targets[:, None] + group_size)
    return outside & own_only[:, None]


def info_nce(
    queries: Tensor,
    passages: Tensor,
    temperature: float = 0.05,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """In-batch InfoNCE: cross-entropy of each query's positive among all passages (LLM-QL, contrastive stage).

    Args:
        queries: Embeddings ``(B, D)``.
        passages: Embeddings ``(N, D)``.
        temperature: Divides the similarity.
        targets: Long ``(B,)``, row of each query's positive in ``passages``; by default row ``i`` for query ``i``.
        mask: Bool ``(B, N)``, True = leave this candidate out of the softmax.
        normalize: Use cosine similarity; False for embeddings that are normalised already.

    Returns:
        Mean negative log-likelihood in nats, shape ``()``, float32.

    Raises:
        ValueError: Fewer passages than queries without ``targets``, or a temperature that is not positive.
    """
    return per_query_info_nce(queries, passages, temperature, targets, mask, normalize).mean()


def per_query_info_nce(
    queries: Tensor,
    passages: Tensor,
    temperature: float = 0.05,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Loss of each query, ``(B,)``; arguments as in :func:`info_nce`."""
    if targets is None:
        if len(passages) < len(queries):
            raise ValueError(f"need one positive per query, got {len(passages)} passages for {len(queries)} queries")
        targets = torch.arange(len(queries), device=queries.device)
    logits = similarity(queries, passages, normalize) / _positive(temperature)
    if mask is not None:
        logits = logits.masked_fill(mask, -torch.inf)
    return F.cross_entropy(logits, targets, reduction="none")


def symmetric_info_nce(
    queries: Tensor, passages: Tensor, temperature: float = 0.05, mask: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """Mean of the query-to-passage and the passage-to-query loss.

    The backward direction asks each query's positive (passage ``i`` for query ``i``) for its query among all queries;
    extra negative passages take part in the forward direction only. Arguments and result as in :func:`info_nce`; of
    ``mask`` the backward direction uses the transposed square of the positives.
    """
    count = len(queries)
    forward = info_nce(queries, passages, temperature, mask=mask, normalize=normalize)
    square = None if mask is None else mask[:, :count].T
    return (forward + info_nce(passages[:count], queries, temperature, mask=square, normalize=normalize)) / 2


def multiple_negatives_ranking(
    queries: Tensor,
    passages: Tensor,
    scale: float = 20.0,
    directions: tuple[Direction, ...] = ("query_to_passage",),
    joint: bool = False,
    hardness: float = 0.0,
    hardness_on: Hardness = "all",
) -> Tensor:
    """The multiple-negatives-ranking family: several directions, one or many softmaxes, hardness weighting.

    The candidates of row ``i`` are, by direction: ``query_to_passage`` all passages; ``passage_to_query`` all queries
    against positive ``i``; ``query_to_query`` the other queries; ``passage_to_passage`` the passages of other queries
    against positive ``i``. With ``joint`` one log-partition runs over the candidates of all directions, otherwise
    the log-partitions of the directions are averaged; the positive's logit is subtracted once.

    Args:
        queries: Embeddings ``(B, D)``.
        passages: Embeddings ``((1 + K) * B, D)``: the ``B`` positives, then ``K`` blocks of ``B`` hard negatives.
        scale: Multiplies the cosine similarity (1 / temperature).
        directions: Which similarities compete with the positive pair; must contain ``query_to_passage``.
        joint: One softmax over all directions instead of one each.
        hardness: Adds ``hardness * cosine`` (without gradient) to the chosen negatives of ``query_to_passage``.
        hardness_on: ``in_batch`` other queries' passages, ``own`` the query's own hard negatives, or ``all``.

    Returns:
        Mean loss in nats, shape ``()``, float32.

    Raises:
        ValueError: ``query_to_passage`` is missing, or the passages are no whole number of blocks.
    """
    count = len(queries)
    if "query_to_passage" not in directions:
        raise ValueError(f"directions must contain 'query_to_passage', got {directions}")
    if len(passages) < count or len(passages) % count:
        raise ValueError(f"passages must be a multiple of the {count} queries, got {len(passages)}")
    own = torch.eye(count, dtype=torch.bool, device=queries.device)
    group = own.repeat(1, len(passages) // count)  # True = passage of the same query, its positive included
    forward = similarity(queries, passages)
    weighted = group.clone() if hardness_on == "own" else ~group
    if hardness_on == "all":
        weighted[:, count:] = True
    weighted[:, :count] &= ~own
    logits = {"query_to_passage": forward * scale + hardness * forward.detach() * weighted}
    if "passage_to_query" in directions:
        logits["passage_to_query"] = similarity(passages[:count], queries) * scale
    if "query_to_query" in directions:
        logits["query_to_query"] = (similarity(queries, queries) * scale).masked_fill(own, -torch.inf)
    if "passage_to_passage" in directions:
        logits["passage_to_passage"] = (similarity(passages[:count], passages) * scale).masked_fill(group, -torch.inf)
    if joint:
        partition = torch.cat(list(logits.values()), dim=1).logsumexp(1)
    else:
        partition = torch.stack([scores.logsumexp(1) for scores in logits.values()]).mean(0)
    return (partition - logits["query_to_passage"].diagonal()).mean()


def similarity(queries: Tensor, passages: Tensor, normalize: bool = True) -> Tensor:
    """Cosine (or dot product) of every pair, float32 ``(B, N)``."""
    queries, passages = queries.float(), passages.float()
    if normalize:
        queries, passages = F.normalize(queries, dim=-1), F.normalize(passages, dim=-1)
    return queries @ passages.T


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return temperature
