"""PPO on a table of logits, with or without an exploration bonus, for many seeds at once.

The table ``(R, T, V)`` holds one policy for each of R seeds. Adam works element by element and every seed has its own
generator, so that a seed's result does not depend on which others are run with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rl.functional.exploration import Scale, entropy, trust_region_entropy
from lit_rl.functional.losses import policy_loss
from lit_rl.functional.masking import whiten
from lit_rl.tabular.problem import TabularProblem


@dataclass(frozen=True)
class Term:
    """An exploration bonus: the full entropy, or with a region its trust-region entropy.

    Args:
        top_k: See :func:`lit_rl.functional.exploration.trust_region_entropy`.
        top_p: See there.
        scale: See there.
        mass_preserving: See there.
    """

    top_k: int | None = None
    top_p: float | None = None
    scale: Scale = "logV_over_logS"
    mass_preserving: bool = False

    def bonus(self, logits: Tensor) -> Tensor:
        """Mean over positions in nats, float32 ``(R,)`` from ``(R, T, V)``."""
        if self.top_k is None and self.top_p is None:
            return entropy(logits).mean(1)
        found = trust_region_entropy(
            logits, self.top_k, self.top_p, scale=self.scale, mass_preserving=self.mass_preserving
        )
        return found.mean(1)


@dataclass(frozen=True)
class TabularSettings:
    """How a table is trained.

    The card leaves some of it open. What reproduces its table: one pass over the samples, advantages whitened over all
    samples of an iteration, log-probabilities of its start as the old ones, the loss a mean over tokens, one state of
    Adam for the whole run. Centring without the division, whitening in the mini-batch or two passes do not.

    Args:
        iterations: Times that samples are drawn.
        samples: Sequences an iteration.
        mini_batches: Optimizer steps an iteration, each on its share of the samples.
        clip: Range of the ratio on both sides.
        lr: Adam's learning rate.
        adam_eps: Adam's epsilon. It decides how far the tail follows the full entropy, whose gradient on a single tail
            token is about 1e-8: with 1e-5 most of the leak is gone.
        record_every: Iterations between two points of the curves; the last iteration is always one.

    Raises:
        ValueError: Samples that cannot be shared out evenly.
    """

    iterations: int = 200
    samples: int = 256
    mini_batches: int = 2
    clip: float = 0.2
    lr: float = 0.02
    adam_eps: float = 1e-8
    record_every: int = 10

    def __post_init__(self) -> None:
        if self.samples % self.mini_batches or self.samples < 2:
            raise ValueError(f"need samples for {self.mini_batches} equal mini-batches, got {self.samples}")


class Rollout(NamedTuple):
    """Samples of an iteration: tokens and their log-probabilities ``(R, N, T)``, advantages ``(R, N)``."""

    tokens: Tensor
    log_probs: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class TabularRun:
    """A seed's result.

    Args:
        seed: The seed.
        iterations: Iterations done at each point of the curves.
        curves: For ``reward``, ``valid``, ``tail_mass`` (exact expectations under the policy) and ``entropy`` (nats,
            mean over positions) the value at each of these points; the last one is the final policy's.
    """

    seed: int
    iterations: list[int]
    curves: dict[str, list[float]]


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token, ``(R, N, T)`` from logits ``(R, T, V)`` and tokens ``(R, N, T)``."""
    return logits.log_softmax(-1).gather(2, tokens.transpose(1, 2)).transpose(1, 2)


@torch.no_grad()
def draw(problem: TabularProblem, logits: Tensor, generators: Sequence[torch.Generator], samples: int) -> Rollout:
    """Sample sequences from each policy ``(R, T, V)`` with its own generator."""
    pairs = zip(logits.softmax(-1), generators, strict=True)
    drawn = [torch.multinomial(policy, samples, replacement=True, generator=generator) for policy, generator in pairs]
    tokens = torch.stack(drawn).transpose(1, 2)
    every = torch.ones(1, samples, dtype=torch.bool)
    advantages = [whiten(rewards[None], every)[0] for rewards in problem.rewards(tokens)]
    return Rollout(tokens, token_log_probs(logits, tokens), torch.stack(advantages))


def objective(logits: Tensor, rollout: Rollout, term: Term | None, coefficient: float, clip: float) -> Tensor:
    """Loss of one mini-batch, summed over the policies, of which each gets only the gradient of its own.

    Args:
        logits: ``(R, T, V)``.
        rollout: The mini-batch's samples.
        term: Exploration bonus, if any.
        coefficient: Weight of the bonus, which is subtracted.
        clip: Range of the ratio.

    Returns:
        Float32 ``()``: each policy's mean over tokens of the clipped surrogate, minus its bonus.
    """
    rows, _, positions = rollout.tokens.shape
    log_probs = token_log_probs(logits, rollout.tokens).reshape(-1, positions)
    old_log_probs = rollout.log_probs.reshape(-1, positions)
    advantages = rollout.advantages.reshape(-1, 1)
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    losses = policy_loss(log_probs, old_log_probs, advantages, mask, clip).losses
    loss = losses.reshape(rows, -1).mean(1).sum()
    return loss if term is None else loss - coefficient * term.bonus(logits).sum()


def run(
    problem: TabularProblem, term: Term | None, coefficient: float, seeds: Sequence[int], settings: TabularSettings
) -> list[TabularRun]:
    """Train one policy for each seed and return their results in the order of the seeds.

    Args:
        problem: The task.
        term: Exploration bonus; None for plain PPO.
        coefficient: Weight of the bonus.
        seeds: Seeds of the samples; nothing else is random.
        settings: How to train.
    """
    logits = problem.logits().repeat(len(seeds), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=settings.lr, eps=settings.adam_eps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    iterations, points = [0], [_measure(problem, logits)]
    for iteration in range(1, settings.iterations + 1):
        rollout = draw(problem, logits, generators, settings.samples)
        for parts in zip(*(values.chunk(settings.mini_batches, dim=1) for values in rollout), strict=True):
            optimizer.zero_grad()
            objective(logits, Rollout(*parts), term, coefficient, settings.clip).backward()
            optimizer.step()
        if iteration % settings.record_every == 0 or iteration == settings.iterations:
            iterations.append(iteration)
            points.append(_measure(problem, logits))
    return [
        TabularRun(seed, iterations, {name: [float(point[name][row]) for point in points] for name in points[0]})
        for row, seed in enumerate(seeds)
    ]


@torch.no_grad()
def _measure(problem: TabularProblem, logits: Tensor) -> dict[str, Tensor]:
    """Values of the curves for each policy, ``(R,)`` each."""
    return {**problem.expected(logits)._asdict(), "entropy": entropy(logits).mean(1)}
