"""Metrics of sampled responses."""

import math
from collections.abc import Sequence


def pass_at_k(count: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k responses is right (Chen et al. 2021).

    ``1 - C(count - correct, k) / C(count, k)``.

    Args:
        count: Responses drawn.
        correct: How many of them are right.
        k: At most ``count``.

    Raises:
        ValueError: Numbers that do not fit together.
    """
    if not 0 <= correct <= count or not 1 <= k <= count:
        raise ValueError(f"need 0 <= correct <= count and 1 <= k <= count, got {correct}, {count}, k = {k}")
    return 1 - math.comb(count - correct, k) / math.comb(count, k)


def majority(answers: Sequence[str | None], rewards: Sequence[float]) -> float:
    """Reward of the answer given most often, the earliest of those equally often; 0 where none answers."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    if not counts:
        return 0.0
    most = max(counts.values())
    winner = next(answer for answer in answers if answer is not None and counts[answer] == most)
    return next(reward for answer, reward in zip(answers, rewards, strict=True) if answer == winner)


def powers_up_to(count: int) -> list[int]:
    """1, 2, 4, ... and the number itself."""
    found = [1 << power for power in range(count.bit_length()) if 1 << power <= count]
    return found if found[-1] == count else [*found, count]
