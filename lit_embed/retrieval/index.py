"""Exact search over embeddings, in chunks; FAISS above a size."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.progress import track
from lit_embed.retrieval.ranking import sort_keys, to_run, top_k_columns

__all__ = ["search", "to_run"]

QUERY_ROWS = 1024  # queries scored at once against a chunk of the corpus
FAISS_SLACK = 64  # extra neighbours asked of FAISS, so that small groups of ties at the cut can be put in order


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keep matrix products in float32: no autocast, no TF32 or bf16 inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _exact(queries: Tensor, corpus: Tensor, top_k: int, chunk_size: int, ties: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply chunk by chunk and keep a running top k."""
    count, device = len(queries), queries.device
    scores = torch.empty(count, 0, device=device)
    indices = torch.empty(count, 0, dtype=torch.long, device=device)
    for start in track(range(0, len(corpus), chunk_size), "search", unit="chunk"):
        part = corpus[start : start + chunk_size].to(device, torch.float32)
        part_ties = ties[start : start + chunk_size]
        found = [
            top_k_columns(queries[row : row + QUERY_ROWS].float() @ part.T, part_ties, top_k)
            for row in range(0, count, QUERY_ROWS)
        ]
        scores = torch.cat([scores, torch.cat([values for values, _ in found])], dim=1)
        indices = torch.cat([indices, torch.cat([columns for _, columns in found]) + start], dim=1)
        best = sort_keys(scores, ties[indices]).topk(min(top_k, scores.shape[1])).indices
        scores, indices = scores.gather(1, best), indices.gather(1, best)
    return scores, indices


def _faiss(queries: Tensor, corpus: Tensor, top_k: int, chunk_size: int, ties: Tensor) -> tuple[Tensor, Tensor]:
    """Search a flat inner-product index on the CPU."""
    import faiss

    index = faiss.IndexFlatIP(corpus.shape[1])
    for start in track(range(0, len(corpus), chunk_size), "index", unit="chunk"):
        index.add(corpus[start : start + chunk_size].float().cpu().numpy())
    found = []
    for row in track(range(0, len(queries), QUERY_ROWS), "search", unit="chunk"):
        block = queries[row : row + QUERY_ROWS].float().cpu().numpy()
        values, columns = map(torch.from_numpy, index.search(block, min(top_k + FAISS_SLACK, len(corpus))))
        if values.isnan().any() or (columns < 0).any():
            raise ValueError("scores must not be NaN; look for NaN or infinite embeddings")
        best = sort_keys(values, ties.cpu()[columns]).topk(min(top_k, len(corpus))).indices
        found.append((values.gather(1, best).to(queries.device), columns.gather(1, best).to(queries.device)))
    return torch.cat([values for values, _ in found]), torch.cat([columns for _, columns in found])


@torch.no_grad()
def search(
    queries: Tensor,
    corpus: Tensor,
    top_k: int,
    chunk_size: int = 16_384,
    backend: Literal["auto", "exact", "faiss"] = "auto",
    faiss_threshold: int = 1_000_000,
    tie_rank: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the corpus rows with the largest inner product for each query.

    Scores are computed in float32 whatever the dtypes, under autocast too (scores in bf16 would be mostly ties). The
    corpus may live on another device than the queries; it is moved a chunk at a time. Below about a million vectors a
    matrix product is faster than FAISS's flat index on a CPU.

    Args:
        queries: ``(Q, D)``; normalise both sides for cosine similarity.
        corpus: ``(N, D)``, ``N >= 1``.
        top_k: Results per query; all ``N`` where there are fewer.
        chunk_size: Corpus rows multiplied at once.
        backend: ``exact``, ``faiss``, or ``auto``: FAISS from ``faiss_threshold`` rows on where it is installed and
            the queries are on the CPU.
        faiss_threshold: Rows from which ``auto`` takes FAISS.
        tie_rank: int64 ``(N,)``; of equal scores the higher wins. ``ranking.tie_ranks(doc_ids)`` gives the rule of
            trec_eval (document id descending). Without it the earlier row wins. The rule holds at the cut as well;
            with FAISS only as long as no more than 64 rows tie there.

    Returns:
        Scores float32 and row indices int64, both ``(Q, min(top_k, N))`` on the queries' device, best first.

    Raises:
        InputError: The corpus is empty, ``top_k`` or ``chunk_size`` is below 1, or FAISS is asked for and missing.
        ValueError: Shapes do not fit, or a score is NaN.
    """
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"need (Q, D) and (N, D), got {tuple(queries.shape)} and {tuple(corpus.shape)}")
    if len(corpus) == 0:
        raise InputError("the corpus is empty; give at least one document")
    for name, value in (("top_k", top_k), ("chunk_size", chunk_size)):
        if value < 1:
            raise InputError(f"must be at least 1, got {value}", field=name)
    if backend not in ("auto", "exact", "faiss"):
        raise InputError(f"must be 'auto', 'exact' or 'faiss', got {backend!r}", field="backend")
    if tie_rank is not None and tie_rank.shape != corpus.shape[:1]:
        raise ValueError(f"need one tie rank per row ({len(corpus)}), got shape {tuple(tie_rank.shape)}")
    if len(queries) == 0:
        shape = (0, min(top_k, len(corpus)))
        return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.long)
    ties = torch.arange(len(corpus) - 1, -1, -1) if tie_rank is None else tie_rank
    ties = ties.to(queries.device)
    installed = importlib.util.find_spec("faiss") is not None
    if backend == "faiss" and not installed:
        raise InputError("FAISS is not installed; run `pip install faiss-cpu` or choose 'exact'", field="backend")
    large = backend == "auto" and len(corpus) >= faiss_threshold and queries.device.type == "cpu"
    if backend == "faiss" or (large and installed):
        return _faiss(queries, corpus, top_k, chunk_size, ties)
    with _full_precision(queries.device):
        return _exact(queries, corpus, top_k, chunk_size, ties)
