"""The one order of documents used everywhere: score in float32 first, then the larger document id."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Run: TypeAlias = dict[str, dict[str, float]]  # query id -> document id -> score
Qrels: TypeAlias = dict[str, dict[str, int]]  # query id -> document id -> relevance


def as_float32(scores: Mapping[str, float]) -> list[float]:
    """Return the scores rounded to float32, in the mapping's order; what does not fit becomes infinite."""
    with np.errstate(over="ignore"):
        return np.fromiter(scores.values(), np.float64, len(scores)).astype(np.float32).tolist()


def rank_documents(scores: Mapping[str, float]) -> list[str]:
    """Order one query's documents, best first, as trec_eval does.

    Scores are compared in float32; equal ones are ordered by document id, descending by Unicode code point.

    Args:
        scores: Score of each document id; no NaN.
    """
    return [doc_id for _, doc_id in sorted(zip(as_float32(scores), scores, strict=True), reverse=True)]


def tie_ranks(doc_ids: Sequence[str]) -> Tensor:
    """Return the place of each document id in ascending order, int64 ``(N,)``; among equal scores the higher wins."""
    order = torch.tensor(sorted(range(len(doc_ids)), key=doc_ids.__getitem__), dtype=torch.long)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(doc_ids))
    return ranks


def sort_keys(scores: Tensor, ties: Tensor) -> Tensor:
    """Pack score and tie rank into one integer that sorts as the pair does.

    Args:
        scores: float32 ``(Q, N)``, no NaN.
        ties: int64, ``(N,)`` or ``(Q, N)``, from 0 to 2^32 - 1.

    Returns:
        int64 ``(Q, N)``; larger is better.
    """
    bits = (scores + 0.0).view(torch.int32)  # adding zero turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards by their bits
    return (ordered.long() << 32) + ties


def top_k_columns(scores: Tensor, ties: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Take the best columns of each row; ties are resolved by tie rank, at the cut too.

    Args:
        scores: float32 ``(Q, N)``.
        ties: Tie rank of each column, int64 ``(N,)``; the higher wins.
        top_k: Columns to keep; all where there are fewer.

    Returns:
        Scores float32 and column indices int64, both ``(Q, min(top_k, N))``, best first.

    Raises:
        ValueError: A score among the best is NaN (NaN counts as largest here, so none goes unseen).
    """
    count = scores.shape[1]
    kept = min(top_k, count)
    if kept < count:
        values, columns = scores.topk(kept + 1)
        tied = values[:, kept - 1] == values[:, kept]
        columns = columns[:, :kept].contiguous()
        if tied.any():  # rare, so only these rows pay for the 64-bit keys
            columns[tied] = sort_keys(scores[tied], ties).topk(kept).indices
    else:
        columns = torch.arange(count, device=scores.device).expand(scores.shape[0], -1)
    best = scores.gather(1, columns)
    if best.isnan().any():
        row = int(best.isnan().any(1).nonzero()[0])
        raise ValueError(f"scores must not be NaN, got one in row {row}; look for NaN or infinite embeddings")
    order = sort_keys(best, ties[columns]).argsort(dim=1, descending=True)
    return best.gather(1, order), columns.gather(1, order)


def to_run(scores: Tensor, indices: Tensor, query_ids: Sequence[str], doc_ids: Sequence[str]) -> Run:
    """Turn search results into a run.

    Args:
        scores: ``(Q, k)``.
        indices: Row of the corpus for each score, int ``(Q, k)``; negative ones are left out.
        query_ids: ``Q`` ids, in the order of the rows.
        doc_ids: ``N`` ids, in the order of the corpus.

    Raises:
        ValueError: Shapes and ids do not fit together, or a query id occurs twice.
    """
    if scores.shape != indices.shape or len(query_ids) != len(scores):
        raise ValueError(
            f"need scores and indices of one shape with a row per query id, got {tuple(scores.shape)}, "
            f"{tuple(indices.shape)} and {len(query_ids)} ids"
        )
    if len(set(query_ids)) != len(query_ids):
        raise ValueError("query ids must be unique")
    rows = zip(query_ids, indices.tolist(), scores.float().tolist(), strict=True)
    return {
        query_id: {doc_ids[i]: score for i, score in zip(row, values, strict=True) if i >= 0}
        for query_id, row, values in rows
    }
