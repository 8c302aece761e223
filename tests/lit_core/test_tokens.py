import pytest
import torch

from lit_core.tokens import Tokens, plan_chunks, plan_equal_chunks

TOKENS = Tokens.from_lists([[1, 2, 3], [4], [5, 6]])


def test_padding_goes_on_the_right_in_the_order_asked_for() -> None:
    ids, mask = TOKENS.pad([2, 0], pad_id=9)
    assert ids.tolist() == [[5, 6, 9], [1, 2, 3]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    ids, mask = TOKENS.pad([1], pad_id=9)  # no wider than its longest row
    assert (ids.tolist(), mask.tolist()) == ([[4]], [[1]])


def test_concatenation_keeps_texts() -> None:
    both = Tokens.concatenate([TOKENS, Tokens.from_lists([[7, 8]])])
    assert both.lengths == [3, 1, 2, 2]
    assert both.pad([3], 0)[0].tolist() == [[7, 8]]
    assert len(Tokens.from_lists([])) == 0
    assert torch.equal(both.to("cpu").ids, both.ids)


@pytest.mark.parametrize(
    ("budget", "chunks"),
    [
        (1, [[1], [3], [4], [0], [2]]),
        (8, [[1], [3, 4], [0, 2]]),  # 9 exceeds the budget; 2 x 4; 2 x 3
        (12, [[1], [3, 4, 0], [2]]),
        (100, [[1, 3, 4, 0, 2]]),
    ],
)
def test_chunks_are_sorted_by_length_and_count_their_padding(budget: int, chunks: list[list[int]]) -> None:
    assert plan_chunks([3, 9, 2, 4, 4], budget) == chunks


def test_more_chunks_are_made_by_halving_the_largest() -> None:
    assert plan_chunks([4, 3, 2, 1], 100, minimum=3) == [[0], [1], [2, 3]]
    assert plan_chunks([4, 3], 100, minimum=5) == [[0], [1]]  # no more chunks than texts
    assert plan_equal_chunks([4, 3], 4) == ([[0], [1]], [])  # one process waits for nobody
