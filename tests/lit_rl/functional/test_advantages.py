import math

import pytest
import torch
from torch import Tensor

from lit_rl.functional.advantages import (
    discounted_sums,
    dr_grpo,
    gae,
    grpo,
    grpo_by_domain,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    returns_to_go,
    rloo,
    token_rewards,
)
from lit_rl.functional.masking import response_mask, whiten

ALL = torch.ones(1, 4, dtype=torch.bool)
REWARDS = torch.tensor([[0.0, 0, 0, 1], [-0.1, -0.2, 0.5, 7]])
VALUES = torch.tensor([[0.2, 0.4, 0.5, 0.7], [0.1, 0.3, 0.2, 7]])
MASK = torch.tensor([[True] * 4, [True, True, True, False]])
SCORES = torch.tensor([1.0, 0, 0, 1, 0])
ONE_GROUP = torch.zeros(5, dtype=torch.long)
ONE_TOKEN = torch.ones(5, 1, dtype=torch.bool)


def close(found: Tensor, expected: list[float] | list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=1e-5, rtol=0)


def test_a_response_ends_with_its_first_end_token() -> None:
    responses = torch.tensor([[5, 2, 9, 2], [2, 5, 5, 5], [5, 5, 5, 5], [5, 9, 2, 5]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert torch.equal(response_mask(responses, [2, 9]), expected)


def test_rewards_stand_on_the_last_token_that_counts() -> None:
    kl = torch.tensor([[0.2, -0.1, -0.5]])
    rewards = token_rewards(torch.tensor([1.0]), ALL[:, :3], kl, 0.1)
    close(rewards, [[-0.02, 0.01, 1.05]])
    close(returns_to_go(rewards, ALL[:, :3]), [[1.04, 1.06, 1.05]])
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    close(token_rewards(torch.tensor([2.0, 3.0]), mask), [[0, 0, 2, 0], [0, 0, 0, 0]])


def test_gae_of_the_card() -> None:
    found = gae(REWARDS, VALUES, MASK)
    close(found.advantages, [[0.732713, 0.560750, 0.485, 0.3], [0.085750, -0.015, 0.3, 0]])
    close(found.returns, [[0.932713, 0.960750, 0.985, 1.0], [0.185750, 0.285, 0.5, 0]])
    close(gae(REWARDS, VALUES, MASK, discount=0.99).advantages[0], [0.705637, 0.541879, 0.475150, 0.3])
    close(gae(REWARDS, VALUES, MASK, decay=0.0).advantages[0], [0.2, 0.1, 0.2, 0.3])
    close(gae(REWARDS, VALUES, MASK, decay=1.0).returns[0], [1, 1, 1, 1])


def test_gae_skips_masked_tokens_in_the_middle() -> None:
    values, mask = torch.tensor([[0.2, 9, 0.5, 0.7]]), torch.tensor([[True, False, True, True]])
    close(gae(REWARDS[:1], values, mask).advantages, [[0.760750, 0, 0.485, 0.3]])


def test_where_the_reward_stands_changes_gae() -> None:
    values = torch.tensor([[0.2, 0.4, 0.5, 0.6]])
    behind = gae(torch.tensor([[0.0, 0, 0, 1]]), values, ALL)  # TRL's PPO: a state more, behind the last token
    close(behind.advantages, [[0.728200, 0.556, 0.48, 0.4]])
    ours = gae(torch.tensor([[0.0, 0, 1, 0]]), values, torch.tensor([[True, True, True, False]]))
    close(ours.advantages, [[0.746250, 0.575, 0.5, 0]])


def test_whitening_of_the_card() -> None:
    advantages = gae(REWARDS, VALUES, MASK).advantages
    verl = [[1.451855, 0.799691, 0.512411, -0.189197], [-1.001736, -1.383828, -0.189197, 0]]
    close(whiten(advantages, MASK), verl)
    openrlhf = [[1.568183, 0.863766, 0.553467, -0.204356], [-1.081998, -1.494705, -0.204356, 0]]
    close(whiten(advantages, MASK, unbiased=False), openrlhf)
    close(whiten(torch.tensor([[3.0, math.nan]]), torch.tensor([[True, False]])), [[0, 0]])


def test_group_estimators_of_the_card() -> None:
    close(grpo(SCORES, ONE_GROUP, ONE_TOKEN)[:2, 0], [1.095443, -0.730295])
    close(grpo(SCORES, ONE_GROUP, ONE_TOKEN, epsilon=1e-4)[:2, 0], [1.095245, -0.730163])
    close(grpo(SCORES, ONE_GROUP, ONE_TOKEN, scale="batch")[:2, 0], [1.095443, -0.730295])
    close(dr_grpo(SCORES, ONE_GROUP, ONE_TOKEN)[:2, 0], [0.6, -0.4])
    close(rloo(SCORES, ONE_GROUP, ONE_TOKEN)[:2, 0], [0.75, -0.5])
    close(grpo(SCORES[:2], ONE_GROUP[:2], ONE_TOKEN[:2])[:, 0], [0.707106, -0.707106])
    close(remax(SCORES[:2], torch.tensor([0.5, 0.5]), ONE_TOKEN[:2])[:, 0], [0.5, -0.5])


def test_reinforce_plus_plus_of_the_card() -> None:
    scores, groups = torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 2])[:, None]
    baseline = reinforce_pp_baseline(scores, groups, mask)
    close(baseline[:, 0], [1.060660, -1.767767, -0.353553, -0.353553])
    close(baseline[0], [1.060660] * 3)
    plain = reinforce_pp(token_rewards(scores, mask), mask)
    close(plain.advantages[:, 0], [0.353553, -2.474874, 0.353553, 0.353553])
    close(reinforce_pp(token_rewards(scores, mask), mask, discount=0.9).returns[0], [0.81, 0.9, 1.0])


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, rloo])
def test_equal_rewards_give_exactly_nothing_and_a_group_of_one_keeps_its_score(estimator: object) -> None:
    scores, groups = torch.tensor([0.1, 0.1, 0.1, 0.7]), torch.tensor([3, 3, 3, 8])
    found = estimator(scores, groups, torch.ones(4, 2, dtype=torch.bool))  # type: ignore[operator]
    assert torch.equal(found[:3], torch.zeros(3, 2))
    torch.testing.assert_close(found[3], torch.full((2,), 0.7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, rloo, reinforce_pp_baseline])
def test_groups_may_be_interleaved_and_padding_changes_nothing(estimator: object) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(12, generator=generator)
    groups = torch.arange(12) // 4
    mask = torch.arange(6) < torch.randint(1, 7, (12, 1), generator=generator)
    order = torch.randperm(12, generator=generator)
    found = estimator(scores, groups, mask)  # type: ignore[operator]
    moved = estimator(scores[order], groups[order], mask[order])  # type: ignore[operator]
    torch.testing.assert_close(moved, found[order])
    wider = torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(estimator(scores, groups, wider)[:, :6], found)  # type: ignore[operator]


def loop_gae(rewards: list[float], values: list[float], mask: list[bool], discount: float, decay: float) -> list[float]:
    """The recursion as it is written, in float64."""
    found, following_value, following = [0.0] * len(mask), 0.0, 0.0
    for t in reversed(range(len(mask))):
        if mask[t]:
            delta = rewards[t] + discount * following_value - values[t]
            following = found[t] = delta + discount * decay * following
            following_value = values[t]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_gae_and_returns_against_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 40, (), generator=generator))
    rewards, values = torch.randn(2, 6, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, length, generator=generator) < 0.7
    found = gae(rewards, values, mask, 0.97, 0.9)
    sums = returns_to_go(rewards, mask, 0.97)
    for row in range(6):
        lists = rewards[row].tolist(), values[row].tolist(), mask[row].tolist()
        assert found.advantages[row].tolist() == pytest.approx(loop_gae(*lists, 0.97, 0.9), abs=1e-9)
        zeros = [0.0] * length
        assert sums[row].tolist() == pytest.approx(loop_gae(lists[0], zeros, lists[2], 0.97, 1.0), abs=1e-9)
    whole = gae(rewards, values, mask, 1.0, 1.0).advantages  # return to go minus value
    torch.testing.assert_close(whole, torch.where(mask, returns_to_go(rewards, mask) - values, 0.0))


def test_discounted_sums_of_a_long_row() -> None:
    values = torch.ones(1, 5000, dtype=torch.float64)
    expected = (1 - 0.999 ** torch.arange(5000, 0, -1, dtype=torch.float64)) / (1 - 0.999)
    torch.testing.assert_close(discounted_sums(values, 0.999)[0], expected)


def test_whitening_over_ranks_is_that_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(6, 5, generator=generator), torch.rand(6, 5, generator=generator) < 0.8
    count, mean = mask.sum().float(), values[mask].mean()
    sums = [torch.stack([values[mask].sum(), count]), torch.stack([(values[mask] - mean).square().sum(), count])]
    found = []
    for rows in (slice(2), slice(2, 6)):  # a rank sees its rows, and from the others their sums
        answers = iter(sums)
        found.append(whiten(values[rows], mask[rows], reduce=lambda own, answers=answers: next(answers)))
    torch.testing.assert_close(torch.cat(found), whiten(values, mask))


def test_normalised_by_the_deviation_of_the_domain() -> None:
    """Groups (0, 1), (1, 3) of one domain with deviation sqrt(19 / 12) and (5, 5), (5, 9) of another with 2."""
    scores = torch.tensor([0.0, 1, 5, 5, 1, 3, 5, 9, 4])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    domains = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2])
    mask = torch.ones(9, 2, dtype=torch.bool)
    mask[0, 1] = False
    found = grpo_by_domain(scores, groups, domains, 3, mask, 0.0)
    one = math.sqrt(19 / 12)
    expected = torch.tensor([-0.5 / one, 0.5 / one, 0, 0, -1 / one, 1 / one, -1.0, 1.0, 0])
    torch.testing.assert_close(found, expected[:, None] * mask, atol=1e-6, rtol=0)
