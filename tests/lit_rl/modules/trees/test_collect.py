"""Scored responses of trees and chains: lineage, shared prefixes, credit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lit_core.backbones import BackboneConfig, Lora
from lit_core.errors import InputError
from lit_rl.functional.branching import branching_scores
from lit_rl.modules.config import RolloutConfig
from lit_rl.modules.policy import Policy
from lit_rl.modules.rollouts import Rollout, informative, joined
from lit_rl.modules.scoring import Scorer
from lit_rl.modules.trees.chains import collect_chains, collect_fr3e
from lit_rl.modules.trees.collect import collect_trees, grow
from lit_rl.modules.trees.config import TreeConfig
from lit_rl.modules.trees.scores import ScoreHook, check_table, unit_embeddings
from lit_rl.modules.trees.selection import selected
from lit_rl.modules.trees.statistics import branch_statistics, entropy_percentiles
from lit_rl.problems import Problem, ProblemBatch, PromptCollator, PromptConfig

CPU = torch.device("cpu")
PROBLEMS = [Problem(number, "preference", f"say {number}") for number in (4, 9, 2)]
ROLLOUT = RolloutConfig(samples=8, max_tokens=12, stop_strings=["z", "ing"])  # some responses end early
SHAPES: dict[str, dict[str, Any]] = {
    "branching": {},
    "tree_rl": {},
    "tree_grpo": {},
    "tree_po": {"segment": 3},
    "spo_tree": {"segment": 3, "factors": (2, 2, 2)},
}


class Even(Scorer):
    """1 for a text with an even number of characters."""

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        return [float(len(response) % 2 == 0) for response in responses]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy("nano-qwen3", BackboneConfig(seed=1), Lora())


def batch(policy: Policy, problems: Sequence[Problem] = PROBLEMS) -> ProblemBatch:
    return PromptCollator(policy.tokenizer, PromptConfig())(problems)


def collected(policy: Policy, problems: Sequence[Problem] = PROBLEMS, **tree: Any) -> tuple[Rollout, Any]:
    table = unit_embeddings(policy.model)
    return collect_trees(policy, batch(policy, problems), TreeConfig(**tree), ROLLOUT, 3, Even(), CPU, table)


@pytest.mark.parametrize("sampler", SHAPES)
def test_rows_share_what_their_lineage_says(policy: Policy, sampler: str) -> None:
    found, trees = collected(policy, sampler=sampler, **SHAPES[sampler])
    forest = found.forest
    assert found.parents is not None
    assert found.branches is not None
    for row, (parent, branch) in enumerate(zip(found.parents.tolist(), found.branches.tolist(), strict=True)):
        assert found.texts[row] == policy.tokenizer.decode(found.sequences.responses[row])
        if parent >= 0:
            assert found.responses[row, :branch].tolist() == found.responses[parent, :branch].tolist()
            assert torch.equal(found.log_probs[row, :branch], found.log_probs[parent, :branch])
    assert (found.parents >= 0).any()
    assert forest.lengths.tolist() == [len(response) for response in found.sequences.responses]
    assert found.new_tokens == sum(len(r.tokens) - r.position for tree in trees for r in tree)
    distinct = int((forest.lengths - forest.branches).sum())
    assert distinct == found.new_tokens  # a leaf's own tokens are those that were drawn for it
    if sampler != "spo_tree":  # which has fewer leaves where segments end early
        assert len(found) == 24


def test_a_problems_tree_depends_on_seed_and_id_alone(policy: Policy) -> None:
    found, turned = collected(policy)[0], collected(policy, PROBLEMS[::-1])[0]
    assert found.texts[:8] == turned.texts[16:]
    assert found.texts[16:] == collected(policy, PROBLEMS[2:])[0].texts


def test_log_probs_and_scores_are_those_of_a_forward_pass(policy: Policy) -> None:
    config = TreeConfig(variant="rao", entropy_support="topk", top_k=5)
    table = unit_embeddings(policy.model)
    problems = batch(policy)
    trees = grow(policy, problems, config, ROLLOUT, 0, ScoreHook(table, config))
    for prompt, tree in zip(problems.prompts, trees, strict=True):
        for response in tree:
            with torch.no_grad():
                logits = policy.model(torch.tensor([[*prompt, *response.tokens]])).logits[0, len(prompt) - 1 : -1]
            tokens = torch.tensor(response.tokens)
            expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(response.log_probs, expected, atol=1e-5, rtol=0)
            scores = branching_scores(logits, policy.model.get_input_embeddings().weight, 5, "rao", "topk", tokens)
            for name, values in scores._asdict().items():
                torch.testing.assert_close(response.scalars[name], values, atol=1e-4, rtol=0)


def test_rows_are_taken_and_joined_with_their_lineage(policy: Policy) -> None:
    found, _ = collected(policy)
    assert found.parents is not None
    rows = informative(found)
    part = found.take(range(8, 16))
    assert part.parents is not None
    assert part.parents.tolist() == [p - 8 if p >= 0 else -1 for p in found.parents[8:16].tolist()]
    whole = joined([found.take(range(8)), part])
    assert whole.parents is not None
    assert torch.equal(whole.parents, found.parents[:16])
    again = Rollout.from_state(whole.state(), CPU)
    assert again.parents is not None
    assert torch.equal(again.parents, whole.parents)
    assert again.problems == whole.problems
    assert set(rows) <= set(range(24))
    with pytest.raises(ValueError, match="needs its parent"):
        found.take([int(found.parents.argmax())])


def test_the_table_of_another_model_is_refused(policy: Policy) -> None:
    with pytest.raises(InputError, match=r"the embedding table is not the policy's: \(7, 64\), the policy has"):
        check_table(torch.zeros(7, 64), policy.model)
    table = unit_embeddings(policy.model)
    check_table(table, policy.model)
    norms = table.norm(dim=1)
    torch.testing.assert_close(norms, (norms > 0).float())
    assert (norms == 0).sum() <= 1  # the padding's


def test_statistics_of_branches(policy: Policy) -> None:
    _, trees = collected(policy, epsilon=0.0)
    found = branch_statistics(trees)
    assert found["tree/branched"] == (21, 24)
    responses = [r for tree in trees for r in tree]
    drawn = sum(r.position for r in responses), sum(len(r.tokens) for r in responses)
    assert found["tree/reused_tokens"] == drawn
    places = [[(r.parent, r.position) for r in tree[1:]] for tree in trees]
    assert found["tree/distinct_places"] == (sum(len(set(tree)) for tree in places), 21)
    _, highest = collected(policy, epsilon=0.0, score="entropy")
    first = highest[0]
    own = torch.cat([r.scalars["entropy"][r.position :] for r in first])
    at = [first[r.parent].scalars["entropy"][r.position] for r in first if r.parent is not None]
    assert entropy_percentiles(first) == pytest.approx([float((own < value).float().mean()) for value in at])


def test_chains_are_credited_with_what_their_segments_add(policy: Policy) -> None:
    config = TreeConfig(sampler="spo_chain", every=2, children=3, certain=1.0)
    rollout = RolloutConfig(samples=2, max_tokens=12, stop_strings=["a", "e"])
    found = collect_chains(policy, batch(policy), config, rollout, 5, Even(), CPU)
    assert len(found) == 6
    assert found.credit is not None
    assert found.new_tokens > int(found.mask.sum())
    again = collect_chains(policy, batch(policy, PROBLEMS[1:2]), config, rollout, 5, Even(), CPU)
    assert again.credit is not None
    width = again.credit.shape[1]
    assert torch.equal(found.credit[2:4, :width], again.credit)
    for row in range(6):  # the credits of the segments add up to the reward less the value of the prompt
        length = int(found.mask[row].sum())
        values = found.credit[row, :length]
        ends = [*range(1, length, 2), length - 1] if length > 1 else [0]  # just before every second token
        changes = (values[1:] != values[:-1]).nonzero().flatten().tolist()
        assert all((place + 1) % 2 == 1 for place in changes), (values, ends)
        assert (values.abs() <= 1).all()


def test_certain_tokens_are_not_learned_from(policy: Policy) -> None:
    config = TreeConfig(sampler="spo_chain", every=2, children=3, certain=0.002)
    rollout = RolloutConfig(samples=2, max_tokens=12, stop_strings=["a", "e"])
    found = collect_chains(policy, batch(policy), config, rollout, 5, Even(), CPU)
    assert found.credit is not None
    assert (found.credit[found.log_probs.exp() >= 0.002] == 0).all()


def test_fr3e_continues_a_right_and_a_wrong_response(policy: Policy) -> None:
    config = TreeConfig(sampler="fr3e", chains=4, points=2, children=4)
    found = collect_fr3e(policy, batch(policy), config, ROLLOUT, 1, Even(), CPU)
    assert found.credit is not None
    assert len(found) % 4 == 0
    assert len(found) > 0
    groups = found.group_ids
    for group in set(groups.tolist()):
        rows = (groups == group).nonzero().flatten().tolist()
        assert len(rows) == 4
        assert len({found.rewards[row] for row in rows}) == 2  # states with equal rewards are left out
        assert len({tuple(found.sequences.prompts[row]) for row in rows}) == 1
        right = found.scores[rows] > found.scores[rows].mean()
        assert (found.credit[rows][right][:, 0] > 0).all()
        assert (found.credit[rows][~right][:, 0] < 0).all()
        first = found.credit[rows][:, 0] * found.mask[rows].float()[:, 0]
        assert float(first.sum()) == pytest.approx(0, abs=1e-6)  # centred, times one factor


def test_responses_to_learn_from_include_a_right_one(policy: Policy) -> None:
    found, _ = collected(policy)
    rewards = torch.zeros(24)
    rewards[torch.tensor([3, 17])] = 1.0
    for seed in range(30):
        chosen = selected(found.forest, rewards, 3, seed)
        assert [int(chosen[start : start + 8].sum()) for start in (0, 8, 16)] == [3, 3, 3]
        assert chosen[3]
        assert chosen[17]
    assert not torch.equal(selected(found.forest, rewards, 3, 0), selected(found.forest, rewards, 3, 1))
    assert selected(found.forest, rewards, 9, 0).all()
