"""Contrastive losses. Scores, softmax and losses are float32 whatever the dtype of the embeddings."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Direction = Literal["query_to_passage", "passage_to_query", "query_to_query", "passage_to_passage"]
Hardness = Literal["in_batch", "own", "all"]


def candidate_mask(
    passage_keys: Tensor,
    positive_keys: Tensor,
    targets: Tensor,
    own: Tensor | None = None,
    own_only: Tensor | None = None,
) -> Tensor:
    """Candidates that take no part in a query's softmax.

    Left out are, by document id: known positives of the query other than its target (false negatives), second and
    later occurrences of a document, and, for queries of datasets that forbid in-batch negatives, everything outside
    the query's own group. The target always stays.

    Args:
        passage_keys: Long ``(N,)``; equal keys mean the same document.
        positive_keys: Long ``(B, P)``, keys of all known positives of each query, padded with -1.
        targets: Long ``(B,)``, column of each query's own positive.
        own: Bool ``(B, N)``, True = the passage belongs to the query's own group.
        own_only: Bool ``(B,)``, True = this query sees its own group alone.

    Returns:
        Bool ``(B, N)``, True = leave out of the softmax.
    """
    distinct, first = passage_keys.unique(return_inverse=True)
    column = torch.arange(len(passage_keys), device=passage_keys.device)
    earliest = torch.full_like(distinct, len(passage_keys)).scatter_reduce(0, first, column, "amin")
    mask = (earliest[first] < column).expand(len(positive_keys), -1).clone()
    for keys in positive_keys.unbind(1):  # a handful of columns; avoids a (B, N, P) tensor
        mask |= (keys[:, None] == passage_keys[None]) & (keys >= 0)[:, None]
    if own is not None and own_only is not None:
        mask |= ~own & own_only[:, None]
    return mask.scatter_(1, targets[:, None], False)


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


def per_query_distillation(logits: Tensor, groups: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Contrastive distillation (BOOM, card section 2.4): every passage of a query is in turn the one to be found.

    Member ``i`` of the group has the weight that the teacher's softmax over the group gives it; its cross-entropy is
    that among all candidates but the members before it. With all the weight on member 0 it is InfoNCE.

    Args:
        logits: Scores divided by the temperature, ``(B, N)``.
        groups: Long ``(B, G)``, columns of each query's own passages; a repeated one counts once, as the first.
        teacher: Scores of the group's members ``(B, G)``, -inf = has no weight; the first of each row is finite.
        mask: Bool ``(B, N)``, True = leave this candidate out; the group's own always stay.

    Returns:
        ``(B,)``, nats, float32.
    """
    logits = logits.float()
    repeated = (groups[:, :, None] == groups[:, None, :]).tril(-1).any(2)
    weights = teacher.float().masked_fill(repeated, -torch.inf).softmax(1)
    removed = torch.zeros_like(logits, dtype=torch.bool) if mask is None else mask.scatter(1, groups, False)
    losses = torch.zeros_like(logits[:, 0])
    for columns, weight in zip(groups.split(1, dim=1), weights.unbind(1), strict=True):
        candidates = logits.masked_fill(removed.scatter(1, columns, False), -torch.inf)
        losses = losses + weight * F.cross_entropy(candidates, columns[:, 0], reduction="none")
        removed = removed.scatter(1, columns, True)
    return losses


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
