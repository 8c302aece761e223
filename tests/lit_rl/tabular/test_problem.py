import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from lit_rl.tabular.problem import TabularProblem


def some_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_policy_at_the_start() -> None:
    logits = TabularProblem().logits()
    assert logits.shape == (12, 2000)
    assert logits.dtype == torch.float32
    probabilities = logits.double().softmax(-1)
    assert probabilities[7, :4].tolist() == pytest.approx([0.7056, 0.1176, 0.0784, 0.0784], rel=1e-6)
    assert probabilities[7, 4:].tolist() == pytest.approx([0.02 / 1996] * 1996, rel=1e-5)


def test_expected_values_at_the_start() -> None:
    problem = TabularProblem(positions=2, vocabulary=10)
    expected = problem.expected(problem.logits())
    assert float(expected.valid) == pytest.approx(0.98**2, abs=1e-7)
    assert float(expected.tail_mass) == pytest.approx(0.02, abs=1e-7)
    full = 0.98**2 - (0.98 - 0.1176) ** 2  # one of the two is the better token
    assert float(expected.reward) == pytest.approx(0.4 * 0.98**2 + 0.6 * full, abs=1e-7)


def test_rewards_of_sequences() -> None:
    problem = TabularProblem(positions=3, vocabulary=9)
    tokens = torch.tensor([[0, 0, 0], [1, 0, 3], [1, 2, 1], [1, 1, 4], [1, 1, 1]])  # half of three is two
    assert problem.rewards(tokens).tolist() == pytest.approx([0.4, 0.4, 1, 0, 1])
    third = TabularProblem(positions=3, vocabulary=9, better_rank=3)
    assert third.rewards(torch.tensor([[1, 1, 1], [2, 0, 2]])).tolist() == pytest.approx([0.4, 1])


@pytest.mark.parametrize(("positions", "better_rank"), [(1, 2), (3, 2), (4, 3)])
def test_expected_values_by_enumeration(positions: int, better_rank: int) -> None:
    problem = TabularProblem(positions, 6, better_rank=better_rank, safe_reward=0.3, full_reward=2.0)
    logits = some_logits(2, positions, 6)
    found = problem.expected(logits)
    for row, policy in enumerate(logits.double().softmax(-1).tolist()):
        reward = valid = 0.0
        for tokens in itertools.product(range(6), repeat=positions):
            probability = math.prod(policy[position][token] for position, token in enumerate(tokens))
            if max(tokens) < 4:
                valid += probability
                reward += probability * (2.0 if tokens.count(better_rank - 1) >= positions / 2 else 0.3)
        tail = sum(sum(position[4:]) for position in policy) / positions
        assert [float(value[row]) for value in found] == pytest.approx([reward, valid, tail], abs=1e-12)


def test_the_expected_reward_is_the_mean_of_rewards() -> None:
    problem = TabularProblem(positions=5, vocabulary=20)
    logits = problem.logits() + some_logits(5, 20)
    logits[:, 1] += 1.5  # so that all three rewards are common
    generator = torch.Generator().manual_seed(1)
    tokens = torch.multinomial(logits.softmax(-1), 100_000, replacement=True, generator=generator).T
    rewards = problem.rewards(tokens)
    error = float(rewards.std()) / math.sqrt(len(rewards))
    assert {round(value, 1) for value in rewards.unique().tolist()} == {0.0, 0.4, 1.0}
    assert abs(float(rewards.mean()) - float(problem.expected(logits).reward)) < 4 * error


@pytest.mark.parametrize(
    ("plausible", "settings", "message"),
    [
        ((0.6, 0.3), {"vocabulary": 2}, "a tail, got T=12 and V=2"),
        ((0.6, 0.3), {"positions": 0}, "got T=0"),
        ((0.6, 0.4), {}, "leave some to the tail"),
        ((0.3, 0.6), {}, "largest first"),
        ((0.6, 0.3), {"better_rank": 1}, "rank must be 2 to 2, got 1"),
    ],
)
def test_what_is_no_such_task(plausible: Sequence[float], settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabularProblem(plausible=tuple(plausible), **settings)
