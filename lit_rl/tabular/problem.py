"""A task with one good habit and a better answer behind it, for a policy whose positions are independent.

Of a large vocabulary only the first tokens are of use, in the order of their probability at the start: token 0 is the
habit. A sequence earns a safe reward if it keeps to them and the full one if at least half of it is the better token,
which a policy that follows its habit hardly ever sees. Any other token ruins the sequence: the longer it is, the more
a small leak of probability costs (TRE card, sections 1 and 7.1).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Expected(NamedTuple):
    """What a policy earns on average, float64 ``(...)`` each.

    Args:
        reward: Of a sampled sequence.
        valid: Share of sequences without a token from the tail.
        tail_mass: Probability of the tail, mean over positions.
    """

    reward: Tensor
    valid: Tensor
    tail_mass: Tensor


@dataclass(frozen=True)
class TabularProblem:
    """The task and the policy that it starts from, by default those of the TRE card.

    Args:
        positions: T, length of every sequence.
        vocabulary: V.
        plausible: Probabilities of the useful tokens at the start, largest first, token 0 the habit; the rest of the
            mass is spread evenly over the tail.
        better_rank: Which of them is the better token, counted from 1 by probability.
        safe_reward: Of a valid sequence.
        full_reward: Of a valid sequence of which at least half is the better token.

    Raises:
        ValueError: A size or probability that makes no such task.
    """

    positions: int = 12
    vocabulary: int = 2000
    plausible: tuple[float, ...] = (0.7056, 0.1176, 0.0784, 0.0784)
    better_rank: int = 2
    safe_reward: float = 0.4
    full_reward: float = 1.0

    def __post_init__(self) -> None:
        if self.positions < 1 or self.vocabulary <= len(self.plausible):
            raise ValueError(f"need a position and a tail, got T={self.positions} and V={self.vocabulary}")
        if min(self.plausible) <= 0 or math.fsum(self.plausible) >= 1:
            raise ValueError(f"probabilities must be above 0 and leave some to the tail, got {self.plausible}")
        if list(self.plausible) != sorted(self.plausible, reverse=True):
            raise ValueError(f"probabilities must be in order, largest first, got {self.plausible}")
        if not 2 <= self.better_rank <= len(self.plausible):
            raise ValueError(f"the better token's rank must be 2 to {len(self.plausible)}, got {self.better_rank}")

    def logits(self) -> Tensor:
        """Log-probabilities of the policy at the start, float32 ``(T, V)``."""
        tail = self.vocabulary - len(self.plausible)
        row = [*self.plausible, *[(1 - math.fsum(self.plausible)) / tail] * tail]
        return torch.tensor(row, dtype=torch.float64).log().float().repeat(self.positions, 1)

    def rewards(self, tokens: Tensor) -> Tensor:
        """Reward of each sequence, float32 ``(...)`` from Long ``(..., T)``."""
        valid = (tokens < len(self.plausible)).all(-1)
        full = 2 * (tokens == self.better_rank - 1).sum(-1) >= self.positions
        return torch.where(valid, torch.where(full, self.full_reward, self.safe_reward), 0.0)

    def expected(self, logits: Tensor) -> Expected:
        """Exact expectations under a policy: the number of better tokens is Poisson-binomial.

        Args:
            logits: ``(..., T, V)``.
        """
        probabilities = logits.detach().double().softmax(-1)
        plausible = probabilities[..., : len(self.plausible)].sum(-1)  # (..., T)
        better = probabilities[..., self.better_rank - 1]
        counts = torch.zeros(*plausible.shape[:-1], self.positions + 1, dtype=torch.float64, device=logits.device)
        counts[..., 0] = 1.0  # P(valid so far and this many better tokens)
        for position in range(self.positions):
            more = torch.nn.functional.pad(counts[..., :-1], (1, 0)) * better[..., position, None]
            counts = counts * (plausible - better)[..., position, None] + more
        valid = counts.sum(-1)
        full = counts[..., (self.positions + 1) // 2 :].sum(-1)
        reward = self.safe_reward * valid + (self.full_reward - self.safe_reward) * full
        tail = probabilities[..., len(self.plausible) :].sum(-1)
        return Expected(reward, valid, tail.mean(-1))
