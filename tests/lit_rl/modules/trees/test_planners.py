"""Where trees branch: planners on hand-made responses, and against a literal reading of the algorithms."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lit_core.errors import InputError
from lit_core.generation import Branch, Response
from lit_core.generation.requests import FinishReason
from lit_core.samplers import mix_seed
from lit_rl.functional.forest import Forest
from lit_rl.modules.trees.branching import COIN, Branching, Rounds, lineage
from lit_rl.modules.trees.config import TreeConfig
from lit_rl.modules.trees.segments import SegmentTree, leaf_lineage, leaves


def response(
    scores: Sequence[float],
    parent: int | None = None,
    position: int = 0,
    reason: FinishReason = "stop",
    log_probs: Sequence[float] | None = None,
) -> Response:
    values = torch.tensor(scores)
    logs = torch.tensor(log_probs) if log_probs is not None else -torch.ones(len(scores))
    return Response(parent, position, list(range(len(scores))), logs, reason, {"semantic_entropy": values})


def planner(samples: int = 8, seed: int = 0, ids: Sequence[int] = (0,), **settings: Any) -> Branching:
    return Branching(TreeConfig(**{"epsilon": 0.0, **settings}), samples, seed, ids)


def test_the_best_position_of_all_responses_is_drawn_anew() -> None:
    plan = planner()
    first = response([0.1, 0.7, 0.2])
    assert plan(0, []) == [Branch(mix_seed(0, 0, 0))]
    assert plan(0, [first]) == [Branch(mix_seed(0, 0, 1), 0, 1)]
    second = response([0.1, 0.7, 0.9, 0.3], 0, 1)
    assert plan(0, [first, second]) == [Branch(mix_seed(0, 0, 2), 1, 2)]
    third = response([0.1, 0.7, 0.9, 0.9], 1, 2)  # equal scores: the first response, the first position
    assert plan(0, [first, second, third]) == [Branch(mix_seed(0, 0, 3), 1, 2)]


def test_what_a_branch_has_from_its_parent_is_the_parents() -> None:
    """A copy that rounding has made larger does not win against the original."""
    plan = planner()
    first = response([0.1, 0.7])
    plan(0, [first])
    copy = response([0.1, 0.7000002, 0.2], 0, 2)
    assert plan(0, [first, copy]) == [Branch(mix_seed(0, 0, 2), 0, 1)]


def test_positions_can_be_left_out() -> None:
    first = response([0.1, 0.2, 0.9])
    assert planner()(0, [first])[0].position == 2
    assert planner(skip_end=True)(0, [first])[0].position == 1
    assert planner(skip_last=2)(0, [first])[0].position == 0
    assert planner(skip_last=3)(0, [first]) == [Branch(mix_seed(0, 0, 1))]  # nothing is left: the prompt
    truncated = response([0.1, 0.2, 0.9], reason="length")
    assert planner(skip_end=True)(0, [truncated])[0].position == 2


def test_nodes_can_be_used_once() -> None:
    plan = planner(unique_positions=True)
    first = response([0.1, 0.7, 0.4])
    assert plan(0, [first])[0].position == 1
    second = response([0.1, 0.7, 0.3], 0, 1)  # its first own position is the node that was used
    assert plan(0, [first, second]) == [Branch(mix_seed(0, 0, 2), 0, 2)]


def test_no_position_beats_the_ordinary_arg_max() -> None:
    """Against the card's loop over all responses and positions, on random scores with ties."""
    generator = random.Random(0)
    for trial in range(200):
        plan = planner(samples=8, seed=trial, ids=[trial], epsilon=0.3)
        responses: list[Response] = []
        while branches := plan(0, responses):
            (branch,) = branches
            best, expected = float("-inf"), None
            for number, other in enumerate(responses):
                for position, value in enumerate(other.scalars["semantic_entropy"].tolist()):
                    if value > best:
                        best, expected = value, (number, position)
            coin = random.Random(mix_seed(trial, trial, len(responses), COIN)).random()
            if not responses or coin < 0.3:
                assert (branch.parent, branch.position) == (None, 0)
            else:
                assert (branch.parent, branch.position) == expected
            prefix = [] if branch.parent is None else responses[branch.parent].scalars["semantic_entropy"].tolist()
            own = [generator.randint(-5, 5) / 4 for _ in range(generator.randint(1, 6))]
            responses.append(response([*prefix[: branch.position], *own], branch.parent, branch.position))
        assert len(responses) == 8


@pytest.mark.parametrize(("epsilon", "low", "high"), [(0.0, 0, 0), (0.5, 0.46, 0.54), (1.0, 1, 1)])
def test_restarts_come_with_probability_epsilon(epsilon: float, low: float, high: float) -> None:
    count, restarts = 4000, 0
    for problem in range(count):
        (branch,) = planner(ids=[problem], epsilon=epsilon)(0, [response([0.5])])
        restarts += branch.parent is None
    assert low <= restarts / count <= high


def test_random_positions_are_equally_likely() -> None:
    places = []
    tree = [response([1.0, 0.0, 0.0]), response([1.0, 0.0, 0.0, 0.0], 0, 2)]
    for problem in range(4000):
        (branch,) = planner(ids=[problem], score="random")(0, tree)
        places.append((branch.parent, branch.position))
    counts = {place: places.count(place) for place in set(places)}
    assert set(counts) == {(0, 0), (0, 1), (0, 2), (1, 2), (1, 3)}
    assert all(700 < count < 900 for count in counts.values())


def test_the_least_probable_token_can_be_drawn_anew() -> None:
    first = response([0.0, 0.0, 0.0], log_probs=[-0.1, -3.0, -0.2])
    assert planner(score="min_probability")(0, [first])[0].position == 1


def grow(plan: Any, draw: Any) -> list[Response]:
    """Responses to all that a planner asks for."""
    responses: list[Response] = []
    while branches := plan(0, responses):
        responses += [draw(branch, responses) for branch in branches]
    return responses


def test_eptree_has_its_shape() -> None:
    """(M, N, L, T) = (6, 2, 1, 2) makes 30 leaves; the first token of a branch is not drawn anew."""
    generator = random.Random(1)

    def draw(branch: Branch, responses: Sequence[Response]) -> Response:
        kept = [] if branch.parent is None else responses[branch.parent].log_probs[: branch.position].tolist()
        own = [-generator.random() - 5 * (not number and bool(kept)) for number in range(5)]
        return response([0.0] * (len(kept) + 5), branch.parent, branch.position, log_probs=[*kept, *own])

    plan = Rounds(TreeConfig(sampler="tree_rl", chains=6, points=2, rounds=1, children=2), 0, [0])
    responses = grow(plan, draw)
    assert len(responses) == plan.responses == 30
    for chain in range(6):
        order = responses[chain].log_probs.argsort()[:2].tolist()
        mine = [r.position for r in responses[6:] if r.parent == chain]
        assert sorted(mine) == sorted([*order, *order])
    more = Rounds(TreeConfig(sampler="tree_rl", chains=2, points=1, rounds=2, children=2), 0, [0])
    responses = grow(more, draw)
    assert len(responses) == 2 * (1 + 1 * 2 * 2)
    for late in responses[6:]:
        assert late.parent is not None
        parent = responses[late.parent]
        assert parent.parent is None or late.position > parent.position


def test_tree_grpo_branches_at_random_once() -> None:
    config = TreeConfig(sampler="tree_grpo", chains=2, points=2, children=1)
    responses = grow(Rounds(config, 3, [0]), lambda b, rs: response([0.0] * 6, b.parent, b.position))
    assert [r.parent for r in responses] == [None, None, 0, 0, 1, 1]
    assert len({(r.parent, r.position) for r in responses[2:]}) == 4


def segmented(lengths: Any, segment: int, most: int) -> Any:
    """Draws up to a branch's limit, or to an end token at a length of its own."""

    def draw(branch: Branch, responses: Sequence[Response]) -> Response:
        limit = branch.max_tokens or most
        end = lengths(branch)
        assert branch.position < limit <= most
        assert limit % segment == 0 or limit == most
        length, reason = (end, "stop") if branch.position < end <= limit else (limit, "length")
        kept = [] if branch.parent is None else responses[branch.parent].tokens[: branch.position]
        own = [branch.seed % 1000 + place for place in range(length - branch.position)]
        made = response([0.0] * length, branch.parent, branch.position, reason)  # type: ignore[arg-type]
        made.tokens = [*kept, *own]
        return made

    return draw


def test_spo_tree_has_its_factors() -> None:
    config = TreeConfig(sampler="spo_tree", segment=3, factors=(2, 3, 2))
    plan = SegmentTree(config, 12, 10, 0, [0])
    responses = grow(plan, segmented(lambda branch: 10, 3, 10))
    assert [len(r.tokens) for r in responses] == [3] * 2 + [6] * 6 + [10] * 12
    numbers, parents, branches = leaf_lineage(responses)
    assert numbers == list(range(8, 20)) == leaves(responses)
    assert parents.tolist() == [-1, 0, 0, 2, 0, 4, -1, 6, 6, 8, 6, 10]
    assert branches.tolist() == [0, 6, 3, 6, 3, 6, 0, 6, 3, 6, 3, 6]


def test_treepo_fills_its_width_and_falls_back() -> None:
    generator = random.Random(0)
    for trial in range(100):
        width = generator.randint(2, 9)
        config = TreeConfig(sampler="tree_po", segment=4)
        plan = SegmentTree(config, width, 14, trial, [0])
        responses = grow(plan, segmented(lambda branch: generator.randint(1, 20), 4, 14))
        numbers, parents, branches = leaf_lineage(responses)
        assert len(numbers) == width
        assert len(responses) <= plan.responses
        for number in numbers:
            assert responses[number].finish_reason == "stop" or len(responses[number].tokens) == 14
        lengths = torch.tensor([len(responses[number].tokens) for number in numbers])
        Forest(parents, branches, lengths, torch.zeros_like(lengths))  # a lineage that can be
        for number, parent, branch in zip(numbers, parents.tolist(), branches.tolist(), strict=True):
            if parent >= 0:
                assert responses[number].tokens[:branch] == responses[numbers[parent]].tokens[:branch]
                assert branch % 4 == 0


def test_a_live_path_gets_a_second_child_while_there_is_room() -> None:
    config = TreeConfig(sampler="tree_po", segment=4)
    responses = grow(SegmentTree(config, 5, 12, 0, [0]), segmented(lambda branch: 12, 4, 12))
    assert [len(r.tokens) for r in responses] == [4] * 2 + [8] * 4 + [12] * 5
    assert [r.parent for r in responses] == [None, None, 0, 0, 1, 1, 2, 2, 3, 4, 5]


def test_a_branch_at_the_prompt_has_no_parent() -> None:
    parents, branches = lineage([response([0.0] * 3), response([0.0] * 3, 0, 0), response([0.0] * 3, 1, 2)])
    assert (parents.tolist(), branches.tolist()) == ([-1, -1, 1], [0, 0, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 1.5}, r"tree.epsilon': is a probability, in \[0, 1\], got 1.5"),
        ({"epsilon": -0.1}, r"tree.epsilon"),
        ({"top_k": 0}, r"tree.top_k': must be at least 1, got 0"),
        ({"factors": ()}, r"tree.factors"),
        ({"certain": 0.0}, r"tree.certain"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TreeConfig(**settings)


def test_groups_that_a_sampler_does_not_make() -> None:
    with pytest.raises(InputError, match=r"rollout.samples': a tree needs at least 2 responses a prompt, got 1"):
        TreeConfig().check_group(1)
    with pytest.raises(InputError, match=r"rollout.samples': tree_rl makes 8 responses a prompt, got 6"):
        TreeConfig(sampler="tree_rl").check_group(6)
    TreeConfig(sampler="tree_rl").check_group(8)
    TreeConfig(sampler="spo_tree", factors=(2, 2, 2)).check_group(8)


def test_trees_branch_again_at_the_same_nodes() -> None:
    """Random scores, 8 responses, epsilon 1/2: 3.5 of them branch (7 coins), from 1.7 different nodes (card, 2.2)."""
    generator = torch.Generator().manual_seed(0)
    groups, length = 1000, 64
    plan = planner(epsilon=0.5, ids=range(groups))
    branched = nodes = 0
    for group in range(groups):
        tree: list[Response] = []
        for _ in range(8):
            (branch,) = plan(group, tree)
            before = [] if branch.parent is None else tree[branch.parent].scalars["semantic_entropy"][: branch.position]
            fresh = torch.rand(length - len(before), generator=generator)
            tree.append(response([*before, *fresh.tolist()], branch.parent, branch.position))
        found = [(r.parent, r.position) for r in tree if r.parent is not None]
        branched, nodes = branched + len(found), nodes + len(set(found))
    assert branched / groups == pytest.approx(3.5, abs=0.1)  # standard error .04; the card's sample has 3.45
    assert nodes / groups == pytest.approx(1.73, abs=0.08)
