import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl.functional.advantages import (
    dr_grpo,
    grpo,
    rloo,
    rose,
    spo_tree,
    tree_grpo,
    tree_po,
    tree_rl,
)
from lit_rl.functional.forest import Forest
from lit_rl.functional.masking import whiten


def forest(parents: list[int], branches: list[int], lengths: list[int], groups: list[int] | None = None) -> Forest:
    columns = parents, branches, lengths, groups or [0] * len(parents)
    return Forest(*(torch.tensor(column, dtype=torch.long) for column in columns))


ONE_TREE, REWARDS = forest([-1, 0, 0, 1], [0, 4, 7, 6], [10, 8, 12, 11]), torch.tensor([1.0, 1, 0, 1])  # example B
TWO_ROOTS, ITS_REWARDS = forest([-1, -1, 0, 1], [0, 0, 3, 3], [6, 6, 6, 9]), torch.tensor([1.0, 0, 1, 1])  # example D
SHARED, T_REWARDS = forest([-1, 0, -1, 2], [0, 2, 0, 2], [4, 4, 4, 4]), torch.tensor([1.0, 0, 1, 1])  # example T


def mask_of(grown: Forest, more: int = 0) -> Tensor:
    return torch.arange(int(grown.lengths.max()) + more) < grown.lengths[:, None]


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=2e-6, rtol=0)


def by_segments(found: Tensor, runs: list[list[tuple[int, float]]]) -> None:
    """Runs of equal values, then zeros."""
    rows = [[value for count, value in row for _ in range(count)] for row in runs]
    close(found, [row + [0.0] * (found.shape[1] - len(row)) for row in rows])


@pytest.mark.parametrize(
    ("alpha", "negative", "positive"),
    [(0.0, -0.25, 0.5), (0.5, -0.295876, 0.408248), (1.0, -0.333333, 0.333333), (2.0, -0.388889, 0.222222)],
)
def test_rose_on_the_tree_of_the_card(alpha: float, negative: float, positive: float) -> None:
    found = rose(ONE_TREE, REWARDS, mask_of(ONE_TREE, 2), alpha)
    by_segments(
        found,
        [
            [(4, 0), (3, negative), (3, positive)],
            [(4, 0), (2, 0.25), (2, 0)],
            [(4, 0), (3, -0.25), (5, -0.5)],
            [(4, 0), (2, 0.25), (5, 0)],
        ],
    )


def test_rose_with_a_token_counted_once() -> None:
    found = rose(ONE_TREE, REWARDS, mask_of(ONE_TREE), 0.0, share=True)
    by_segments(
        found,
        [
            [(4, 0), (3, -0.125), (3, 0.5)],
            [(4, 0), (2, 0.125), (2, 0)],
            [(4, 0), (3, -0.125), (5, -0.5)],
            [(4, 0), (2, 0.125), (5, 0)],
        ],
    )
    twice = torch.tensor([[3, 4], [3, 4], [5, 6]])  # the same response drawn twice
    merged = forest([-1] * 3, [0] * 3, [2] * 3).merged(twice)
    by_segments(
        rose(merged, torch.tensor([1.0, 1, 0]), mask_of(merged), 0.0, share=True),
        [[(2, 1 / 6)], [(2, 1 / 6)], [(2, -2 / 3)]],
    )


def test_rose_of_independent_responses_is_dr_grpo() -> None:
    grown = Forest.independent(torch.tensor([4, 3, 5, 2]), torch.zeros(4, dtype=torch.long))
    rewards, mask = torch.tensor([1.0, 0, 1, 0]), mask_of(grown)
    found = rose(grown, rewards, mask, 0.0)
    by_segments(found, [[(4, 0.5)], [(3, -0.5)], [(5, 0.5)], [(2, -0.5)]])
    assert torch.equal(found, dr_grpo(rewards, grown.group_ids, mask))
    by_segments(rose(grown, rewards, mask), [[(4, 0.5)], [(3, -0.5)], [(5, 0.4)], [(2, -0.5)]])


def test_rose_tells_nodes_of_different_trees_apart() -> None:
    mask = mask_of(TWO_ROOTS)
    first = [[(3, 0.25), (3, 0)], [(3, -0.25), (3, -0.5)], [(3, 0.25), (3, 0)]]
    by_segments(rose(TWO_ROOTS, ITS_REWARDS, mask, 0.0), [*first, [(3, -0.25), (6, 0.5)]])
    by_segments(rose(TWO_ROOTS, ITS_REWARDS, mask), [*first, [(3, -0.333333), (6, 0.333333)]])


def test_flat_estimators_on_the_shared_example() -> None:
    groups, mask = SHARED.group_ids, mask_of(SHARED)
    close(grpo(T_REWARDS, groups, mask)[:, 0], [0.499999, -1.499997, 0.499999, 0.499999])
    close(dr_grpo(T_REWARDS, groups, mask)[:, 0], [0.25, -0.75, 0.25, 0.25])
    close(rloo(T_REWARDS, groups, mask)[:, 0], [0.333333, -1, 0.333333, 0.333333])


def edges(found: Tensor, inner: list[float], leaves: list[float]) -> None:
    """On the shared example: the values of u and v, and those of the leaves."""
    rows = zip([inner[0]] * 2 + [inner[1]] * 2, leaves, strict=True)
    by_segments(found, [[(2, node), (2, leaf)] for node, leaf in rows])


def test_tree_estimators_on_the_shared_example() -> None:
    mask = mask_of(SHARED, 1)
    edges(rose(SHARED, T_REWARDS, mask, 0.0), [-0.25, 0.25], [0.5, -0.5, 0, 0])
    spo = spo_tree(SHARED, T_REWARDS, mask)
    edges(spo.advantages, [-0.25, 0.25], [0.5, -0.5, 0, 0])
    assert spo.mask[:, :4].tolist() == [[True] * 4, [True] * 4, [True, True, False, False], [True, True, False, False]]
    assert not spo.mask[:, 4].any()
    edges(spo_tree(SHARED, T_REWARDS, mask, "grpo").advantages, [-1, 1], [1, -1, 0, 0])
    leaves = [1, -1.666667, 0.333333, 0.333333]
    edges(tree_rl(SHARED, T_REWARDS, mask, "none"), [-0.666667, 0.666667], leaves)
    edges(tree_rl(SHARED, T_REWARDS, mask), [-0.471405, 0.471405], leaves)
    code = tree_rl(SHARED, T_REWARDS, mask, "code")
    close(code[:2, 0], [-0.471405] * 2)
    close(code[0, 2], 0.902369)
    close(tree_po(SHARED, T_REWARDS, mask, whitened=False)[:, 3], [0.375, -0.625, 0.125, 0.125])
    sized = tree_po(SHARED, T_REWARDS, mask, "group_size", whitened=False)
    close(sized[:, 0], [0.333333, -0.666667, 0.166667, 0.166667])
    assert torch.equal(tree_po(SHARED, T_REWARDS, mask, "group_size"), whiten(sized, mask))
    dropped = tree_po(SHARED, T_REWARDS, mask, drop_equal=True, whitened=False)
    close(dropped[:, 0], [0.375, -0.625, 0.25, 0.25])  # v's responses are all right, so only the prompt is left
    close(tree_grpo(SHARED, T_REWARDS, mask, "code")[:, 0], [0.707106, -0.707106, 0, 0])
    close(tree_grpo(SHARED, T_REWARDS, mask)[:, 1], [1.207105, -2.207103, 0.499999, 0.499999])


def test_only_selected_leaves_count_in_the_root() -> None:
    selected = torch.tensor([True, False, True, True])
    found = tree_rl(SHARED, T_REWARDS, mask_of(SHARED), selected=selected)
    by_segments(found, [[(2, -0.666667), (2, 1)], [], [(2, 0.471405), (2, 0.333333)], [(2, 0.471405), (2, 0.333333)]])


def test_values_of_spo_are_those_of_the_children() -> None:
    grown = forest([-1, 0, 0, -1], [0, 2, 2, 0], [4, 4, 4, 4])
    found = spo_tree(grown, torch.tensor([1.0, 1, 1, 0]), mask_of(grown))
    by_segments(found.advantages, [[(2, 0.5), (2, 0)]] * 3 + [[(4, -0.5)]])  # ROSE has 0.25 and -0.75
    assert found.mask.sum(1).tolist() == [2, 2, 2, 4]


def test_tree_grpo_of_trees_of_one_response() -> None:
    grown = forest([-1, 0, 0], [0, 2, 0], [3, 3, 3])  # the last branched at the prompt
    rewards, mask = torch.tensor([1.0, 0, 1]), mask_of(grown)
    close(tree_grpo(grown, rewards, mask)[2], [0.577349] * 3)
    close(tree_grpo(grown, rewards, mask, "code")[:, 0], [0.707106, -0.707106, 0.577349])


def test_ties_for_the_shortest_go_to_the_lowest_row() -> None:
    grown = forest([-1, -1, 1, -1], [0, 0, 2, 0], [4, 4, 8, 2])
    rewards = torch.tensor([1.0, 1, 1, 0])
    found = rose(grown, rewards, mask_of(grown))  # the third is compared with the first, so from its first token on
    by_segments(found, [[(4, 0.25)], [(2, 0.25), (2, 0)], [(2, 0.125), (6, 0)], [(2, -0.75)]])


def test_what_does_not_fit() -> None:
    mask = mask_of(ONE_TREE)
    with pytest.raises(ValueError, match="length_penalty must be at least 0, got -1"):
        rose(ONE_TREE, REWARDS, mask, -1.0)
    for rewards in (REWARDS - 1, REWARDS * 2, REWARDS * math.nan):
        with pytest.raises(ValueError, match=r"rewards in \[0, 1\]"):
            rose(ONE_TREE, rewards, mask)
    by_segments(rose(ONE_TREE, REWARDS * 2, mask, 0.0)[1:2], [[(4, 0), (2, 0.5), (2, 0)]])
    with pytest.raises(ValueError, match="one reward for each of 4 responses"):
        tree_rl(ONE_TREE, REWARDS[:3], mask)
    with pytest.raises(ValueError, match="a mask of 4 rows and 12 tokens"):
        spo_tree(ONE_TREE, REWARDS, mask[:, :11])
