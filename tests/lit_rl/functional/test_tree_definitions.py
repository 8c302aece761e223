"""The tree estimators against their definitions, token by token over dictionaries, in float64."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl.functional.forest import Forest
from lit_rl.functional.tree_advantages import rose, spo_tree, tree_grpo, tree_po, tree_rl

Node = tuple[int, int]


def forest(parents: list[int], branches: list[int], lengths: list[int], groups: list[int] | None = None) -> Forest:
    columns = parents, branches, lengths, groups or [0] * len(parents)
    return Forest(*(torch.tensor(column, dtype=torch.long) for column in columns))


def mask_of(grown: Forest, more: int = 0) -> Tensor:
    return torch.arange(int(grown.lengths.max()) + more) < grown.lengths[:, None]


class Plain:
    """A forest as lists, with the nodes of the card found by walking."""

    def __init__(self, grown: Forest, rewards: Tensor) -> None:
        columns = grown.parents, grown.branches, grown.lengths, grown.group_ids
        self.parents, self.branches, self.lengths, self.groups = (column.tolist() for column in columns)
        self.rewards = rewards.double().tolist()
        self.rows = range(len(self.parents))
        self.path = [[self.node(i, k) for k in range(self.lengths[i] + 1)] for i in self.rows]
        self.through: dict[Node, list[int]] = {}
        for i in self.rows:
            for node in self.path[i]:
                self.through.setdefault(node, []).append(i)
        branched = {self.node(i, self.branches[i]) for i in self.rows if self.parents[i] >= 0}
        self.cuts = [
            [0, *(k for k in range(1, self.lengths[i]) if self.path[i][k] in branched), self.lengths[i]]
            for i in self.rows
        ]

    def node(self, i: int, k: int) -> Node:
        if k == 0:
            return -1 - self.groups[i], 0
        while self.parents[i] >= 0 and k <= self.branches[i]:
            i = self.parents[i]
        return i, k

    def is_leaf(self, i: int, k: int) -> bool:
        return k > 0 and k == self.lengths[i]

    def value(self, i: int, k: int, rewards: list[float]) -> float:
        below = [i] if self.is_leaf(i, k) else self.through[self.path[i][k]]
        return sum(rewards[j] for j in below) / len(below)

    def group(self, i: int) -> list[int]:
        return [j for j in self.rows if self.groups[j] == self.groups[i]]

    def segment(self, i: int, t: int) -> tuple[int, int]:
        return next((a, b) for a, b in zip(self.cuts[i], self.cuts[i][1:], strict=False) if a <= t < b)

    def by_token(self, value: Callable[[int, int], float], width: int) -> Tensor:
        rows = [[value(i, t) if t < self.lengths[i] else 0.0 for t in range(width)] for i in self.rows]
        return torch.tensor(rows, dtype=torch.float64)


def plain_rose(plain: Plain, width: int, alpha: float, share: bool) -> Tensor:
    def value(i: int, t: int) -> float:
        a, b = plain.segment(i, t)
        found = plain.value(i, b, plain.rewards) - plain.value(i, a, plain.rewards)
        correct = [j for j in plain.group(i) if plain.rewards[j] > 0.5]
        if alpha > 0 and i in correct:
            s = min(correct, key=lambda j: (plain.lengths[j], j))
            common = max(k for k in range(plain.lengths[i] + 1) if plain.path[i][k] in plain.path[s])
            if i != s and t >= common:
                eta = (plain.lengths[s] - common) / (plain.lengths[i] - common)
                found -= abs(found) * (1 - eta**alpha)
        return found / len(plain.through[plain.path[i][t + 1]]) if share else found

    return plain.by_token(value, width)


def plain_tree_rl(plain: Plain, width: int, reweight: str) -> Tensor:
    rewards = []
    for i in plain.rows:
        others = [plain.rewards[j] for j in plain.group(i) if j != i]
        rewards.append(plain.rewards[i] - sum(others) / max(len(others), 1))

    def weight(i: int, k: int) -> float:
        return 1 if plain.is_leaf(i, k) else len(plain.through[plain.path[i][k]]) ** -0.5

    def accumulated(i: int, k: int) -> float:
        return plain.value(i, k, rewards) * (weight(i, k) if reweight == "code" else 1)

    def value(i: int, t: int) -> float:
        a, b = plain.segment(i, t)
        credit = 2 * accumulated(i, b) - accumulated(i, 0) - accumulated(i, a)
        return credit * (weight(i, b) if reweight == "leaves" else 1)

    return plain.by_token(value, width)


def plain_tree_po(plain: Plain, width: int, weights: str, drop_equal: bool) -> Tensor:
    found = []
    for i in plain.rows:
        total = divisor = 0.0
        for k in plain.cuts[i][:-1]:
            below = plain.through[plain.path[i][k]]
            if drop_equal and len({plain.rewards[j] for j in below}) == 1:
                continue
            weight = len(below) if weights == "group_size" else 1
            total += weight * (plain.rewards[i] - plain.value(i, k, plain.rewards))
            divisor += weight
        found.append(total / divisor if divisor else 0.0)
    return plain.by_token(lambda i, t: found[i], width)


def plain_spo_tree(plain: Plain, width: int, scale: str) -> Tensor:
    children: dict[
        Node, dict[Node, tuple[int, int]]
    ] = {}  # node: its children, each with a row and a length to name it
    for i in plain.rows:
        names = [plain.path[i][k] for k in plain.cuts[i][:-1]] + [(i, 10**6)]
        for number in range(1, len(names)):
            children.setdefault(names[number - 1], {})[names[number]] = i, plain.cuts[i][number]

    def of(node: Node) -> float:
        if node[1] == 10**6:
            return plain.rewards[node[0]]
        values = [of(child) for child in children[node]]
        return sum(values) / len(values)

    def value(i: int, t: int) -> float:
        a, b = plain.segment(i, t)
        above = plain.path[i][a]
        found = of((i, 10**6) if plain.is_leaf(i, b) else plain.path[i][b]) - of(above)
        if scale == "grpo":
            values = [of(child) for child in children[above]]
            spread = math.sqrt(sum((x - of(above)) ** 2 for x in values) / len(values))
            return found / spread if spread > 1e-9 else 0.0
        return found

    return plain.by_token(value, width)


def random_case(seed: int) -> tuple[Forest, Tensor]:
    """Interleaved groups of 1 to 6 responses of 1 to 16 tokens that branch anywhere, and binary rewards."""
    generator = random.Random(seed)
    rows: list[tuple[int, int, int, int]] = []
    for group in generator.sample(range(9), generator.randint(1, 3)):
        first = len(rows)
        for _ in range(generator.randint(1, 6)):
            parent, branch = -1, 0
            if len(rows) > first and generator.random() < 0.7:
                parent = generator.randrange(first, len(rows))
                _, own, length, _ = rows[parent]
                draws = [own, 0, min(3, length), generator.randint(0, own), generator.randint(0, length)]
                branch = generator.choices(draws, [1, 1, 2, 1, 5])[0]
            rows.append((parent, branch, generator.randint(max(1, branch), 16), group))
    order = generator.sample(range(len(rows)), len(rows))
    place = {row: number for number, row in enumerate(order)}
    columns = [list(column) for column in zip(*(rows[row] for row in order), strict=True)]
    columns[0] = [-1 if parent < 0 else place[parent] for parent in columns[0]]
    return forest(*columns), torch.tensor([float(generator.random() < 0.6) for _ in rows])


def agree(estimator: Callable[..., Tensor], plain: Callable[..., Tensor], seeds: range, *settings: Any) -> None:
    """Compare on many forests, which the estimator sees as one batch and the definition one by one."""
    cases = [random_case(seed) for seed in seeds]
    whole = Forest.concatenate(
        [Forest(f.parents, f.branches, f.lengths, f.group_ids + 10 * number) for number, (f, _) in enumerate(cases)]
    )
    mask = mask_of(whole, 1)
    found = estimator(whole, torch.cat([rewards for _, rewards in cases]), mask, *settings)
    expected = torch.cat([plain(Plain(*case), mask.shape[1], *settings) for case in cases])
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("part", range(10))
def test_rose_against_the_definition(part: int) -> None:  # 1,000 forests, of which each has 1 to 3 groups
    alpha = (0.0, 0.5, 1.0, 2.0)[part % 4]
    agree(rose, plain_rose, range(100 * part, 100 * part + 100), alpha, part % 3 == 0)


def test_other_estimators_against_their_definitions() -> None:
    for reweight in ("none", "leaves", "code"):
        agree(tree_rl, plain_tree_rl, range(30), reweight)
    for settings in (("average", False), ("group_size", False), ("average", True), ("group_size", True)):
        agree(lambda *case: tree_po(*case, whitened=False), plain_tree_po, range(30), *settings)
    for scale in ("rloo", "grpo"):
        agree(lambda *case: spo_tree(*case).advantages, plain_spo_tree, range(30), scale)


ESTIMATORS: dict[str, Callable[[Forest, Tensor, Tensor], Tensor]] = {
    "rose": rose,
    "rose, no penalty": lambda *case: rose(*case, length_penalty=0.0),
    "spo_tree": lambda *case: spo_tree(*case, "grpo").advantages,
    "tree_rl": tree_rl,
    "tree_rl, code": lambda *case: tree_rl(*case, "code"),
    "tree_po": lambda *case: tree_po(*case, whitened=False),
    "tree_grpo": tree_grpo,
    "tree_grpo, code": lambda *case: tree_grpo(*case, "code"),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_properties_of_all(name: str) -> None:
    estimator = ESTIMATORS[name]
    for seed in range(20):
        grown, rewards = random_case(seed)
        mask = mask_of(grown, 3)
        found = estimator(grown, rewards, mask)
        assert torch.equal(found[~mask], torch.zeros(int((~mask).sum())))
        if name not in ("tree_grpo", "tree_grpo, code"):  # a group of one keeps its reward there, as in GRPO
            assert torch.equal(estimator(grown, torch.full_like(rewards, 0.3), mask), torch.zeros_like(found))
        holes = mask & (torch.arange(mask.shape[1]) % 3 != 1)
        assert torch.equal(estimator(grown, rewards, holes), found * holes)
        order = torch.arange(len(grown))  # groups change places, and other groups are added
        order = torch.cat([order[grown.group_ids == group] for group in grown.group_ids.unique().flip(0)])
        more = Forest.concatenate([grown.take(order), forest([-1, 0], [0, 2], [3, 3], [99, 99])])
        wider = mask_of(more)
        again = estimator(more, torch.cat([rewards[order], torch.tensor([0.0, 1])]), wider)[:-2]
        width = min(mask.shape[1], wider.shape[1])
        torch.testing.assert_close(again[:, :width], found[order][:, :width])


def test_properties_of_rose() -> None:
    for seed in range(50):
        grown, rewards = random_case(seed)
        mask, plain = mask_of(grown), Plain(grown, rewards)
        found = rose(grown, rewards, mask, 0.0)
        values: dict[tuple[Node, Node], float] = {}
        for i in plain.rows:
            starts = [found[i, a] for a in plain.cuts[i][:-1]]
            group = [plain.rewards[j] for j in plain.group(i)]
            assert float(sum(starts)) == pytest.approx(plain.rewards[i] - sum(group) / len(group), abs=1e-6)
            for a, b in zip(plain.cuts[i][:-2], plain.cuts[i][1:-1], strict=True):
                name = plain.path[i][a], plain.path[i][b]
                assert float(found[i, a]) == values.setdefault(name, float(found[i, a]))
