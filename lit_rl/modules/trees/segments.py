"""Trees that branch at the ends of segments (TreePO, SPO-tree), and their leaves as whole responses."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_core.generation import Branch, Response
from lit_core.samplers import mix_seed
from lit_rl.modules.trees.branching import PLACE
from lit_rl.modules.trees.config import TreeConfig


class SegmentTree:
    """Segments of a number of tokens; at the end of each the tree branches.

    SPO-tree branches by fixed factors, the last segment goes on to the end. TreePO gives every live path a second
    child as long as there are fewer paths than ``samples``; where none is live and some are missing, it goes on from a
    random segment end of a finished path.

    Args:
        config: Segment and factors.
        samples: Leaves.
        max_tokens: Most tokens of a response.
        seed: Of this rollout.
        ids: Of each prompt's problem.
    """

    def __init__(self, config: TreeConfig, samples: int, max_tokens: int, seed: int, ids: Sequence[int]) -> None:
        self.config, self.width, self.max_tokens, self.seed, self.ids = config, samples, max_tokens, seed, ids
        self.by_factors = config.sampler == "spo_tree"
        depth = len(config.factors) if self.by_factors else -(-max_tokens // config.segment)
        self.responses = samples * depth  # a path has a segment of its own at each depth at most

    def __call__(self, prompt: int, responses: Sequence[Response]) -> list[Branch]:
        live = self._live(responses) if responses else []
        if self.by_factors:
            plan = self._by_factors(responses, live)
        else:
            plan = self._by_budget(self.ids[prompt], responses, live)
        first = len(responses)
        return [
            Branch(mix_seed(self.seed, self.ids[prompt], first + number), parent, position, limit)
            for number, (parent, position, limit) in enumerate(plan)
        ]

    def _live(self, responses: Sequence[Response]) -> list[int]:
        """Segments that have ended without an end, and that nothing goes on from."""
        return [
            number
            for number in leaves(responses)
            if responses[number].finish_reason == "length" and len(responses[number].tokens) < self.max_tokens
        ]

    def _by_factors(self, responses: Sequence[Response], live: list[int]) -> list[tuple[int | None, int, int]]:
        factors = self.config.factors
        if not responses:
            return [(None, 0, self._limit(0, len(factors) == 1))] * factors[0]
        plan: list[tuple[int | None, int, int]] = []
        for number in live:
            length = len(responses[number].tokens)
            level = length // self.config.segment
            if level < len(factors):
                plan += [(number, length, self._limit(length, level + 1 == len(factors)))] * factors[level]
        return plan

    def _by_budget(
        self, problem: int, responses: Sequence[Response], live: list[int]
    ) -> list[tuple[int | None, int, int]]:
        if not responses:
            return [(None, 0, self._limit(0, False))] * min(2, self.width)
        missing = self.width - len(leaves(responses))
        if live:
            plan: list[tuple[int | None, int, int]] = []
            for number in live:
                length = len(responses[number].tokens)
                count = 1 + (missing > 0)
                missing -= count - 1
                plan += [(number, length, self._limit(length, False))] * count
            return plan
        if missing <= 0:
            return []
        generator = random.Random(mix_seed(self.seed, problem, len(responses), PLACE))
        plan = []
        finished = leaves(responses)
        for _ in range(missing):
            number = finished[generator.randrange(len(finished))]
            ends = range(0, len(responses[number].tokens), self.config.segment)
            end = generator.choice(ends)
            plan.append((number if end else None, end, self._limit(end, False)))
        return plan

    def _limit(self, length: int, last: bool) -> int:
        return self.max_tokens if last else min(length + self.config.segment, self.max_tokens)


def leaves(responses: Sequence[Response]) -> list[int]:
    """Responses that nothing goes on from at their ends."""
    continued = {r.parent for r in responses if r.parent is not None and r.position == len(responses[r.parent].tokens)}
    return [number for number in range(len(responses)) if number not in continued]


def leaf_lineage(responses: Sequence[Response]) -> tuple[list[int], Tensor, Tensor]:
    """Leaves of a tree of segments, with their parents (places among the leaves, -1 for none) and branches.

    The first leaf that goes through a segment stands for it: the others left that leaf where the segment ends.
    """
    numbers = leaves(responses)
    stands: dict[int, int] = {}  # place of the leaf that stands for a segment's end
    for place, leaf in enumerate(numbers):
        for number in _upwards(responses, leaf):
            stands.setdefault(number, place)
    parents, branches = [], []
    for place, leaf in enumerate(numbers):
        parent, branch = -1, 0
        number = leaf
        while responses[number].parent is not None:
            above, position = responses[number].parent, responses[number].position
            assert above is not None  # the loop's condition
            if stands[above] != place:
                parent, branch = stands[above], position
                break
            number = above
        parents.append(parent)
        branches.append(branch)
    return numbers, torch.tensor(parents), torch.tensor(branches)


def _upwards(responses: Sequence[Response], number: int) -> list[int]:
    """Segments whose ends lie on a leaf's path."""
    found = [number]
    while True:
        response = responses[number]
        if response.parent is None or response.position != len(responses[response.parent].tokens):
            return found
        number = response.parent
        found.append(number)
