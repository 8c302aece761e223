import importlib.util
from typing import Any

import pytest
import torch

from lit_core.errors import InputError
from lit_embed.retrieval.index import search


def vectors(rows: int, seed: int = 0, width: int = 16) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def test_chunks_of_any_size_equal_one_product() -> None:
    queries, corpus = vectors(7), vectors(101, 1)
    expected = (queries @ corpus.T).topk(10)
    for chunk_size in (1, 9, 100, 500):
        scores, indices = search(queries, corpus, 10, chunk_size=chunk_size)
        assert torch.equal(indices, expected.indices)
        torch.testing.assert_close(scores, expected.values, atol=1e-6, rtol=0)


def test_blocks_of_queries_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = vectors(10), vectors(50, 1)
    expected = search(queries, corpus, 5)[1]
    monkeypatch.setattr("lit_embed.retrieval.index.QUERY_ROWS", 3)
    assert torch.equal(search(queries, corpus, 5, chunk_size=20)[1], expected)


@pytest.mark.parametrize("chunk_size", [2, 5, 100])
@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_ties_follow_tie_rank_at_the_cut_and_the_row_without_it(chunk_size: int, backend: Any) -> None:
    corpus = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(6, 1)  # rows 0, 2, ..., 10 tie for the first query
    queries = torch.eye(2)
    tie_rank = torch.tensor([5, 11, 3, 10, 8, 0, 1, 2, 9, 4, 7, 6])
    _, indices = search(queries, corpus, 4, chunk_size, backend, tie_rank=tie_rank)
    assert indices.tolist() == [[8, 4, 10, 0], [1, 3, 11, 9]]
    assert search(queries, corpus, 4, chunk_size, backend)[1].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_faiss_equals_exact() -> None:
    queries, corpus = vectors(20), vectors(500, 1)
    exact, faiss = (
        search(queries, corpus, 15, backend="exact"),
        search(queries, corpus, 15, backend="faiss", chunk_size=99),
    )
    assert torch.equal(exact[1], faiss[1])
    torch.testing.assert_close(exact[0], faiss[0], atol=1e-6, rtol=0)
    assert torch.equal(search(queries, corpus, 15, faiss_threshold=10)[1], exact[1])


def test_fewer_rows_than_asked_and_no_queries() -> None:
    scores, indices = search(vectors(3), vectors(4, 1), 10)
    assert scores.shape == indices.shape == (3, 4)
    assert search(vectors(3), vectors(4, 1), 10, backend="faiss")[1].equal(indices)
    scores, indices = search(torch.empty(0, 16), vectors(4, 1), 10)
    assert scores.shape == indices.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_float32_for_half_precision_inputs_and_under_autocast(dtype: torch.dtype) -> None:
    queries, corpus = vectors(5).to(dtype), vectors(300, 1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, indices = search(queries, corpus, 50)
    expected = (queries.double() @ corpus.double().T).topk(50)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected.values, atol=1e-6, rtol=0)
    assert torch.equal(indices, expected.indices)


def test_matmul_precision_is_left_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        search(vectors(2), vectors(3, 1), 1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_nan_is_refused(backend: Any) -> None:
    corpus = vectors(30, 1)
    corpus[17, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        search(vectors(2), corpus, 30 if backend == "faiss" else 2, backend=backend)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="corpus is empty"):
        search(vectors(2), torch.empty(0, 16), 5)
    with pytest.raises(InputError, match="field 'top_k'"):
        search(vectors(2), vectors(3), 0)
    with pytest.raises(ValueError, match=r"need \(Q, D\) and \(N, D\)"):
        search(vectors(2), vectors(3, width=8), 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        search(vectors(2), vectors(3), 1, backend="faiss")
    assert search(vectors(2), vectors(3), 1, faiss_threshold=1)[1].shape == (2, 1)
