import pytest
import torch

from lit_embed.retrieval.ranking import rank_documents, sort_keys, tie_ranks, to_run, top_k_columns


def test_ties_are_ordered_by_document_id_descending() -> None:
    assert rank_documents({"a": 1.0, "c": 1.0, "b": 1.0, "z": 0.5, "10": 1.0, "9": 1.0}) == [
        "c",
        "b",
        "a",
        "9",
        "10",
        "z",
    ]


def test_scores_that_differ_only_beyond_float32_tie() -> None:
    assert rank_documents({"a": 1.0 + 1e-9, "b": 1.0}) == ["b", "a"]
    assert rank_documents({"a": 1e300, "b": 1e290, "c": -1e300}) == ["b", "a", "c"]


def test_tie_ranks_are_places_in_ascending_order() -> None:
    assert tie_ranks(["b", "a", "é", "B"]).tolist() == [2, 1, 3, 0]


def test_keys_sort_like_pairs_of_score_and_tie_rank() -> None:
    scores = torch.tensor([[0.0, -0.0, 1.5, -1.5, float("inf"), float("-inf"), 1e-40, -1e-40, 1.5]])
    ties = torch.tensor([3, 8, 0, 1, 2, 4, 5, 6, 7])
    pairs = [
        (score, tie, column) for column, (score, tie) in enumerate(zip(scores[0].tolist(), ties.tolist(), strict=True))
    ]
    expected = [column for _, _, column in sorted(pairs, reverse=True)]
    assert sort_keys(scores, ties).argsort(dim=1, descending=True)[0].tolist() == expected


@pytest.mark.parametrize("top_k", [1, 3, 7, 20, 50])
def test_top_k_equals_sorting_pairs_with_many_ties(top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    scores = torch.randint(-3, 4, (30, 20), generator=generator).float()
    ties = torch.randperm(20, generator=generator)
    values, columns = top_k_columns(scores, ties, top_k)
    for row in range(30):
        expected = sorted(range(20), key=lambda column: (scores[row, column], ties[column]), reverse=True)[:top_k]
        assert columns[row].tolist() == expected
        assert values[row].tolist() == scores[row, expected].tolist()


def test_nan_is_refused_wherever_it_stands() -> None:
    scores = torch.randn(4, 100)
    scores[2, 57] = float("nan")
    with pytest.raises(ValueError, match="NaN, got one in row 2"):
        top_k_columns(scores, torch.arange(100), 3)


def test_to_run_names_documents_and_leaves_out_padding() -> None:
    run = to_run(
        torch.tensor([[0.5, 0.25], [1.0, 0.0]]), torch.tensor([[2, 0], [1, -1]]), ["q1", "q2"], ["a", "b", "c"]
    )
    assert run == {"q1": {"c": 0.5, "a": 0.25}, "q2": {"b": 1.0}}
    with pytest.raises(ValueError, match="unique"):
        to_run(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.long), ["q", "q"], ["a"])
