import pytest
import torch

from lit_embed.functional.metrics import (
    average_precision,
    dcg,
    hit_rate,
    ndcg,
    precision,
    ranked_gains,
    recall,
    reciprocal_rank,
)

# three queries: grades 3, 1, 0, 2 ranked as 1, 0, 3, unjudged, 2; one relevant document at rank 3; one of two at rank 2
GAINS = torch.tensor([[1, 0, 3, 0, 2], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
ALL_GAINS = torch.tensor([[3, 1, 0, 2], [1, 0, 0, 0], [2, 1, 0, 0]])


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_values_worked_out_by_hand() -> None:
    close(dcg(GAINS, 3), [1 + 3 / 2, 0.5, 0.630930])
    close(ndcg(GAINS, ALL_GAINS, 3), [0.525005, 0.5, 0.239813])
    close(ndcg(GAINS, ALL_GAINS, 10), [0.687485, 0.5, 0.239813])
    close(reciprocal_rank(GAINS), [1, 1 / 3, 1 / 2])
    close(reciprocal_rank(GAINS, 2), [1, 0, 1 / 2])
    close(recall(GAINS, ALL_GAINS, 3), [2 / 3, 1, 1 / 2])
    close(precision(GAINS, 10), [0.3, 0.1, 0.1])
    close(hit_rate(GAINS, 1), [1, 0, 0])
    close(average_precision(GAINS, ALL_GAINS), [0.755556, 1 / 3, 1 / 4])


def test_query_without_relevant_documents_or_ranking_gets_zero() -> None:
    gains, none = torch.tensor([[0, -1, 0]]), torch.tensor([[0, -2]])
    for values in (ndcg(gains, none), reciprocal_rank(gains), recall(gains, none), average_precision(gains, none)):
        close(values, [0.0])
    empty, one = torch.zeros(1, 0), torch.ones(1, 1)
    for values in (ndcg(empty, one, 10), reciprocal_rank(empty), recall(empty, one), average_precision(empty, one)):
        close(values, [0.0])


def test_negative_relevance_counts_as_none() -> None:
    close(ndcg(torch.tensor([[-1, 2, 0]]), torch.tensor([[2, -1]])), [0.630930])


def test_padding_and_order_of_judgements_change_nothing() -> None:
    shuffled = torch.cat([ALL_GAINS.flip(1), torch.zeros(3, 4, dtype=torch.long)], dim=1)
    assert torch.equal(ndcg(GAINS, shuffled, 10), ndcg(GAINS, ALL_GAINS, 10))
    assert torch.equal(average_precision(GAINS, shuffled), average_precision(GAINS, ALL_GAINS))


def test_ranked_gains_looks_up_judged_rows() -> None:
    indices = torch.tensor([[7, 2, 5], [0, -1, 3]])
    judged, judged_gains = torch.tensor([[5, 7, -1], [3, -1, -1]]), torch.tensor([[2, 1, 9], [3, 0, 9]])
    assert ranked_gains(indices, judged, judged_gains).tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_values_are_float32_whatever_the_gains(dtype: torch.dtype) -> None:
    assert ndcg(GAINS.to(dtype), ALL_GAINS.to(dtype)).dtype == torch.float32
