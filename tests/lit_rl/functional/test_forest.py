import random

import pytest
import torch
from torch import Tensor

from lit_rl.functional.forest import Forest
from lit_rl.functional.segments import by_token, segments


def forest(parents: list[int], branches: list[int], lengths: list[int], groups: list[int] | None = None) -> Forest:
    columns = parents, branches, lengths, groups or [0] * len(parents)
    return Forest(*(torch.tensor(column, dtype=torch.long) for column in columns))


ONE_TREE = forest([-1, 0, 0, 1], [0, 4, 7, 6], [10, 8, 12, 11])  # example B
TWO_ROOTS = forest([-1, -1, 0, 1], [0, 0, 3, 3], [6, 6, 6, 9])  # example D


def cuts(grown: Forest) -> list[list[int]]:
    found = segments(grown)
    return [row[valid].tolist() for row, valid in zip(found.cuts, found.valid, strict=True)]


def random_forest(generator: random.Random, first_group: int = 0) -> Forest:
    """Interleaved groups of short responses that branch anywhere: at 0, where the parent did, before it, at its end."""
    rows: list[tuple[int, int, int, int]] = []
    for group in range(first_group, first_group + generator.randint(1, 3)):
        first = len(rows)
        for _ in range(generator.randint(1, 6)):
            parent, branch = -1, 0
            if len(rows) > first and generator.random() < 0.7:
                parent = generator.randrange(first, len(rows))
                _, own, length, _ = rows[parent]
                branch = own if generator.random() < 0.2 else generator.randint(0, length)
                if generator.random() < 0.3:
                    branch = min(3, length)  # the same position in many trees
            rows.append((parent, branch, generator.randint(max(1, branch), 16), group))
    order = list(range(len(rows)))
    generator.shuffle(order)
    place = {row: number for number, row in enumerate(order)}
    moved = [rows[row] for row in order]
    columns = list(zip(*moved, strict=True))
    return forest([-1 if p < 0 else place[p] for p in columns[0]], *map(list, columns[1:]))


def walk(grown: Forest, row: int, prefix_length: int) -> tuple[int, int]:
    """A node, as the card words it; the prompt of a group is its negative number."""
    if prefix_length == 0:
        return -1 - int(grown.group_ids[row]), 0
    while int(grown.parents[row]) >= 0 and prefix_length <= int(grown.branches[row]):
        row = int(grown.parents[row])
    return row, prefix_length


def test_cuts_and_nodes_of_the_card() -> None:
    assert cuts(ONE_TREE) == [[0, 4, 7, 10], [0, 4, 6, 8], [0, 4, 7, 12], [0, 4, 6, 11]]
    assert [ONE_TREE.leaves(*node).tolist() for node in ((3, 0), (3, 4), (0, 7), (2, 7), (1, 6))] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 2],
        [0, 2],
        [1, 3],
    ]
    assert ONE_TREE.leaves(2, 12).tolist() == [2]
    assert TWO_ROOTS.leaves(2, 3).tolist() == [0, 2]
    assert TWO_ROOTS.leaves(1, 3).tolist() == [1, 3]
    assert ONE_TREE.trees().tolist() == [0, 0, 0, 0]
    assert TWO_ROOTS.trees().tolist() == [0, 1, 0, 1]
    values = segments(ONE_TREE).values(torch.tensor([1.0, 1, 0, 1]))
    assert values[segments(ONE_TREE).nodes[3]].tolist() == [0.75, 0.75, 1, 1, 1]


def test_deepest_common_nodes_of_the_card() -> None:
    rows = torch.arange(4)
    found = ONE_TREE.deepest_common(rows.repeat_interleave(4), rows.repeat(4)).view(4, 4)
    assert found.tolist() == [[10, 4, 7, 4], [4, 8, 4, 6], [7, 4, 12, 4], [4, 6, 4, 11]]
    assert TWO_ROOTS.deepest_common(rows, torch.tensor([1, 3, 0, 2])).tolist() == [0, 3, 3, 0]


def test_a_branch_at_the_childs_own_branch_is_the_parents_node() -> None:
    grown = forest([-1, 0, 1], [0, 4, 4], [9, 9, 9])
    direct = forest([-1, 0, 0], [0, 4, 4], [9, 9, 9])
    for each in (grown, direct):
        assert cuts(each) == [[0, 4, 9]] * 3
        assert each.leaves(2, 4).tolist() == [0, 1, 2]
    assert grown.owners(torch.tensor([2, 2]), torch.tensor([4, 5])).tolist() == [0, 2]


def test_branches_at_the_prompt_and_at_ends() -> None:
    grown = forest([-1, 0, 0, 0], [0, 0, 5, 2], [5, 4, 8, 2])  # a new tree, one behind the end, one cut off at once
    assert cuts(grown) == [[0, 2, 5], [0, 4], [0, 2, 5, 8], [0, 2]]
    assert grown.trees().tolist() == [0, 1, 0, 0]
    assert grown.leaves(0, 2).tolist() == [0, 2, 3]
    assert grown.leaves(0, 5).tolist() == [0, 2]
    found = segments(grown)
    values = found.values(torch.tensor([1.0, 0, 0, 0]))[found.nodes]
    torch.testing.assert_close(values[0], torch.tensor([0.25, 1 / 3, 1, 1, 1]))  # the leaf is the response's own
    torch.testing.assert_close(values[2], torch.tensor([0.25, 1 / 3, 0.5, 0, 0]))


@pytest.mark.parametrize("seed", range(5))
def test_nodes_against_the_walk(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(8):
        grown = random_forest(generator)
        lengths = grown.lengths.tolist()
        nodes = [[walk(grown, row, k) for k in range(length + 1)] for row, length in enumerate(lengths)]
        for row, length in enumerate(lengths):
            prefixes = torch.arange(length + 1)
            owners = grown.owners(torch.tensor(row), prefixes).tolist()
            assert owners[1:] == [owner for owner, _ in nodes[row][1:]]
            assert int(grown.group_ids[owners[0]]) == int(grown.group_ids[row])
            k = generator.randint(0, length)
            assert grown.leaves(row, k).tolist() == [j for j, path in enumerate(nodes) if nodes[row][k] in path]
            common = [sum(node in nodes[row] for node in path) - 1 for path in nodes]
            found = grown.deepest_common(torch.full((len(grown),), row), torch.arange(len(grown)))
            assert found.tolist() == [max(value, 0) for value in common]
            made = {walk(grown, j, int(grown.branches[j])) for j in range(len(grown)) if int(grown.parents[j]) >= 0}
            inner = [k for k in range(1, length) if nodes[row][k] in made]
            assert cuts(grown)[row] == [0, *inner, length]


def test_a_part_and_the_whole() -> None:
    generator = random.Random(0)
    for _ in range(20):
        first, second = random_forest(generator), random_forest(generator, 10)
        whole = Forest.concatenate([first, second])
        assert cuts(whole) == cuts(first) + cuts(second)
        rows = torch.randperm(len(first), generator=torch.Generator().manual_seed(len(first)))
        rows = rows[first.group_ids[rows] == first.group_ids[0]]
        part = first.take(rows)
        assert cuts(part) == [cuts(first)[row] for row in rows.tolist()]
    same_prompt = Forest.concatenate([ONE_TREE, TWO_ROOTS])
    assert same_prompt.leaves(5, 0).tolist() == list(range(8))
    assert len(Forest.independent(torch.tensor([3, 1]), torch.tensor([4, 4]))) == 2
    assert cuts(Forest.independent(torch.tensor([3, 1]), torch.tensor([4, 4]))) == [[0, 3], [0, 1]]
    with pytest.raises(ValueError, match="got row 3 without row 1"):
        ONE_TREE.take(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="got row 2 twice"):
        ONE_TREE.take(torch.tensor([0, 2, 2]))
    with pytest.raises(ValueError, match="at least one forest"):
        Forest.concatenate([])


def test_merging_equal_prefixes() -> None:
    tokens = torch.tensor([[7, 7, 1, 2], [7, 7, 3, 0], [5, 7, 1, 2], [7, 7, 1, 9], [7, 7, 1, 2], [7, 7, 1, 2]])
    lengths, groups = torch.tensor([4, 3, 4, 4, 4, 2]), torch.tensor([1, 1, 1, 1, 0, 1])
    merged = Forest.independent(lengths, groups).merged(tokens)
    assert merged.leaves(0, 2).tolist() == [0, 1, 3, 5]  # the last has only these two tokens
    assert merged.leaves(0, 3).tolist() == [0, 3]
    assert merged.leaves(0, 4).tolist() == [0]
    assert merged.leaves(4, 1).tolist() == [4]
    assert cuts(merged) == [[0, 2, 3, 4], [0, 2, 3], [0, 4], [0, 2, 3, 4], [0, 4], [0, 2]]
    one_token = forest([-1, -1], [0, 0], [1, 1]).merged(torch.tensor([[3], [3]]))
    assert one_token.leaves(0, 1).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_merged_forests_against_the_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (24, 7), generator=generator)
    lengths = torch.randint(1, 8, (24,), generator=generator)
    groups = torch.randint(0, 4, (24,), generator=generator)
    merged = Forest.independent(lengths, groups).merged(tokens)
    prefixes = [tokens[row, : lengths[row]].tolist() for row in range(24)]
    for row in range(24):
        for k in range(1, len(prefixes[row]) + 1):
            same = [
                j
                for j in range(24)
                if groups[j] == groups[row] and prefixes[j][:k] == prefixes[row][:k] and k <= len(prefixes[j])
            ]
            assert merged.leaves(row, k).tolist() == same


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([-1, 5], [0, 0], [2, 2], [0, 0]), "a parent is a row, or -1, got 5 in row 1"),
        (([-1, -2], [0, 0], [2, 2], [0, 0]), "a parent is a row, or -1, got -2 in row 1"),
        (([-1, 0], [0, 1], [2, 2], [0, 1]), "of the same group, got 0 in row 1"),
        (([-1, 0], [0, 3], [2, 4], [0, 0]), "within the parent and the response, got 3 in row 1"),
        (([-1, 0], [0, 3], [4, 2], [0, 0]), "within the parent and the response, got 3 in row 1"),
        (([-1, 0], [0, -1], [2, 2], [0, 0]), "within the parent and the response, got -1 in row 1"),
        (([-1, -1], [0, 1], [2, 2], [0, 0]), "without a parent the branch is 0, got 1 in row 1"),
        (([-1, 2, 1], [0, 1, 1], [2, 2, 2], [0, 0, 0]), "in a circle, got 2 in row 1"),
        (([0], [0], [2], [0]), "in a circle, got 0 in row 0"),
        (([-1], [0], [-2], [0]), "a length is at least 0, got -2 in row 0"),
        (([-1], [0, 0], [2], [0]), "branches must be Long and as long as parents"),
    ],
)
def test_rows_that_cannot_be(columns: tuple[list[int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forest(*map(torch.tensor, columns))


def test_values_of_tokens() -> None:
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    values, places = torch.tensor([[1.0, 2], [3, 9]]), torch.tensor([[0, 1, 4], [0, 1, 1]])
    assert by_token(values, places, mask).tolist() == [[1, 2, 0, 2, 0], [3, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="a mask of 2 rows and 4 tokens"):
        by_token(values, places, mask[:, :3])
    nothing = Forest(*[torch.zeros(0, dtype=torch.long)] * 4)
    empty: Tensor = segments(nothing).by_token(torch.zeros(0, 1), torch.ones(0, 3, dtype=torch.bool))
    assert empty.shape == (0, 3)
    with pytest.raises(ValueError, match="must be Long"):
        Forest(*[torch.zeros(1)] * 4)
