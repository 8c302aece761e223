import math

import pytest
import torch
from torch import Tensor

from lit_rl.tabular.ppo import Rollout, TabularRun, TabularSettings, Term, draw, objective, run
from lit_rl.tabular.problem import TabularProblem

SMALL = TabularProblem(positions=3, vocabulary=16)
SHORT = TabularSettings(iterations=6, samples=32, record_every=4)


def final(runs: list[TabularRun], name: str = "reward") -> float:
    (found,) = runs
    return found.curves[name][-1]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def bonus_gradient(row: list[float], term: Term) -> list[float]:
    """Gradient of the entropy of the most probable tokens, by its formula ``-q (log q + h)``, times the scale."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    total = math.fsum(math.exp(logit) for logit in row)
    size = term.top_k or len(row)
    if term.top_p is not None:
        masses = [math.exp(row[token]) / total for token in order]
        size = next(n for n in range(1, len(row) + 1) if math.fsum(masses[:n]) >= term.top_p)
    inside = math.fsum(math.exp(row[token]) for token in order[:size])
    q = {token: math.exp(row[token]) / inside for token in order[:size]}
    value = -math.fsum(share * math.log(share) for share in q.values())
    scale = math.log(len(row)) / math.log(size) if term.scale == "logV_over_logS" else 1.0
    return [-scale * q[token] * (math.log(q[token]) + value) if token in q else 0.0 for token in range(len(row))]


def plain_gradient(logits: Tensor, rollout: Rollout, term: Term, coefficient: float, clip: float) -> Tensor:
    """Gradient of one policy's objective with loops in float64: ``logits`` is ``(T, V)``."""
    samples, positions = rollout.tokens.shape
    table = logits.tolist()
    gradient = [[0.0] * len(row) for row in table]
    for position, row in enumerate(table):
        total = math.fsum(math.exp(logit) for logit in row)
        for sample in range(samples):
            token, advantage = int(rollout.tokens[sample, position]), float(rollout.advantages[sample])
            ratio = math.exp(row[token]) / total / math.exp(float(rollout.log_probs[sample, position]))
            if (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip):
                continue
            for other, logit in enumerate(row):
                slope = float(other == token) - math.exp(logit) / total
                gradient[position][other] -= advantage * ratio * slope / (samples * positions)
        for token, slope in enumerate(bonus_gradient(row, term)):
            gradient[position][token] -= coefficient * slope / positions
    return torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.parametrize("term", [Term(), Term(top_k=2), Term(top_k=3, scale="none"), Term(top_p=0.9)])
def test_gradients_against_plain_loops(term: Term) -> None:
    start = SMALL.logits().repeat(2, 1, 1)
    rollout = draw(SMALL, start, generators(0, 1), 32)
    moved = start + 0.5 * torch.randn(start.shape, generator=torch.Generator().manual_seed(2))  # so that some are held
    moved.requires_grad_()
    objective(moved, rollout, term, 0.05, 0.2).backward()
    assert moved.grad is not None
    for row in range(2):
        own = Rollout(*(values[row].double() for values in rollout))
        expected = plain_gradient(moved[row].detach().double(), own, term, 0.05, 0.2)
        torch.testing.assert_close(moved.grad[row].double(), expected, atol=1e-7, rtol=1e-5)


def test_the_first_step_is_adams() -> None:  # of size lr against the gradient's sign, less where eps counts
    settings = TabularSettings(iterations=1, samples=32, mini_batches=1, lr=0.1, adam_eps=1e-3)
    start = SMALL.logits()[None].requires_grad_()
    objective(start, draw(SMALL, start, generators(3), 32), Term(top_k=2), 0.05, 0.2).backward()
    assert start.grad is not None
    expected = SMALL.expected(start.detach() - 0.1 * start.grad / (start.grad.abs() + 1e-3))
    found = run(SMALL, Term(top_k=2), 0.05, [3], settings)
    assert final(found) == pytest.approx(float(expected.reward), abs=1e-6)
    assert final(found, "tail_mass") == pytest.approx(float(expected.tail_mass), abs=1e-7)


def test_samples_follow_the_policy_and_advantages_are_whitened() -> None:
    logits = SMALL.logits().repeat(2, 1, 1)
    rollout = draw(SMALL, logits, generators(0, 1), 4096)
    assert rollout.tokens.shape == rollout.log_probs.shape == (2, 4096, 3)
    shares = torch.stack([(rollout.tokens == token).float().mean(1) for token in range(4)], dim=-1)  # (2, T, 4)
    torch.testing.assert_close(shares, logits.softmax(-1)[..., :4], atol=0.03, rtol=0)
    torch.testing.assert_close(rollout.log_probs[1, 5, 2], logits[1, 2, rollout.tokens[1, 5, 2]], atol=1e-6, rtol=0)
    torch.testing.assert_close(rollout.advantages.mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(rollout.advantages.std(1), torch.ones(2), atol=1e-5, rtol=0)


def test_a_bonus_is_the_mean_over_positions() -> None:
    logits = torch.tensor([[[2.0, 1, 0, -1]], [[0.0, 0, 0, 0]]]).repeat(1, 3, 1)
    assert Term().bonus(logits).tolist() == pytest.approx([0.947537, math.log(4)], abs=1e-5)
    assert Term(top_k=2).bonus(logits).tolist() == pytest.approx([1.164406, math.log(4)], abs=1e-5)
    assert Term(top_k=2, scale="none").bonus(logits).tolist() == pytest.approx([0.582203, math.log(2)], abs=1e-5)


@pytest.mark.parametrize("term", [None, Term(), Term(top_k=2), Term(top_p=0.9)])
def test_a_seed_does_not_depend_on_the_others(term: Term | None) -> None:
    together = run(SMALL, term, 0.01, [5, 0, 9], SHORT)
    assert [found.seed for found in together] == [5, 0, 9]
    for found in together:
        (alone,) = run(SMALL, term, 0.01, [found.seed], SHORT)
        for name, values in found.curves.items():
            assert values == pytest.approx(alone.curves[name], rel=1e-6), name
    assert together[0].curves["reward"][-1] != together[1].curves["reward"][-1]


def test_curves_start_before_the_first_step_and_end_after_the_last() -> None:
    (found,) = run(SMALL, None, 0.0, [0], SHORT)
    assert found.iterations == [0, 4, 6]
    assert {len(values) for values in found.curves.values()} == {3}
    assert found.curves["reward"][0] == pytest.approx(float(SMALL.expected(SMALL.logits()).reward))
    plausible = [0.7056, 0.1176, 0.0784, 0.0784]
    by_hand = -math.fsum(p * math.log(p) for p in [*plausible, *[0.02 / 12] * 12])
    assert found.curves["entropy"][0] == pytest.approx(by_hand, abs=1e-5)


def test_nothing_else_is_random() -> None:
    state = torch.random.get_rng_state()
    first, again = (run(SMALL, Term(), 0.01, [4], SHORT) for _ in range(2))
    assert first == again
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mini_batches_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="3 equal mini-batches, got 256"):
        TabularSettings(mini_batches=3)


@pytest.mark.slow
def test_the_table_of_the_card() -> None:
    """Section 7.1: the habit holds plain PPO, the full entropy leaks, the region's entropy finds the better token."""
    problem, settings = TabularProblem(), TabularSettings()
    plain = run(problem, None, 0.0, [0], settings)
    assert final(plain) == pytest.approx(0.396, abs=0.01)
    assert final(plain, "tail_mass") == pytest.approx(0.0013, abs=0.0005)
    region = run(problem, Term(top_k=2), 0.003, [0], settings)
    assert final(region) == pytest.approx(0.967, abs=0.01)
    assert final(region, "tail_mass") == pytest.approx(0.0029, abs=0.0006)
    entropy = run(problem, Term(), 0.003, [0], settings)
    assert final(entropy) == pytest.approx(0.384, abs=0.01)
    assert final(entropy, "valid") < final(plain, "valid") - 0.01
    flooded = run(problem, Term(), 0.03, [0], settings)
    assert final(flooded, "tail_mass") == pytest.approx(0.868, abs=0.03)
    assert final(flooded) < 1e-3
