"""What a reward model has to beat: scores of dialogues that read no meaning."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_rl.functional.preference import pairwise_outcomes

WORD = re.compile(r"[^\W_]+|[?!.]")
MOST_WORDS = 20_000  # the most frequent ones are kept

Dialogue = str | Sequence[Mapping[str, str]]
Rewards = dict[str, tuple[float, float]]  # of the preferred dialogue and of the other, by the pair's id


def score_pairs(pairs: Iterable[Mapping[str, Any]], score: Callable[[Dialogue], float]) -> Rewards:
    """Score both dialogues of pairs that have ``id``, ``chosen`` and ``rejected``."""
    return {pair["id"]: (score(pair["chosen"]), score(pair["rejected"])) for pair in pairs}


def outcomes(rewards: Rewards) -> dict[str, float]:
    """For each pair 1 where the preferred dialogue has the higher reward, half for equal rewards, else 0."""
    chosen, rejected = torch.tensor(list(rewards.values()), dtype=torch.float64).reshape(-1, 2).unbind(1)
    return dict(zip(rewards, pairwise_outcomes(chosen, rejected).tolist(), strict=True))


def dialogue_length(dialogue: Dialogue) -> float:
    """Characters of a dialogue; two replies to one prompt differ by the length of the reply."""
    return float(len(_text(dialogue)))


class WordPreference:
    """Bradley-Terry model whose reward is linear in the counts of words, in lower case.

    What two dialogues share cancels, so that it reads the replies alone, and those without their prompt.

    Args:
        penalty: Half of this times the squared weights is added to the sum of the losses.

    Raises:
        ValueError: The penalty is not above 0.
    """

    def __init__(self, penalty: float = 10.0) -> None:
        if not penalty > 0:
            raise ValueError(f"penalty must be above 0, got {penalty}")
        self.penalty = penalty
        self.weights: dict[str, float] = {}

    def fit(self, chosen: Sequence[Dialogue], rejected: Sequence[Dialogue]) -> "WordPreference":
        """Find the weights of least loss; there is one such set, so no seed matters.

        Args:
            chosen: Preferred dialogues.
            rejected: The other ones, in the same order.
        """
        from scipy.optimize import minimize
        from scipy.sparse import csr_array

        differences = []
        for better, worse in zip(chosen, rejected, strict=True):
            counts = _words(better)
            counts.subtract(_words(worse))
            differences.append({word: count for word, count in counts.items() if count})
        frequent = Counter(word for row in differences for word in row).most_common(MOST_WORDS)
        column = {word: number for number, (word, _) in enumerate(frequent)}
        entries = [(at, column[w], n) for at, row in enumerate(differences) for w, n in row.items() if w in column]
        rows, columns, values = np.array(entries, dtype=np.float64).reshape(-1, 3).T
        matrix = csr_array((values, (rows.astype(int), columns.astype(int))), shape=(len(differences), len(column)))

        def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            margins = matrix @ weights
            wrong = np.exp(-np.logaddexp(0, margins))
            value = np.logaddexp(0, -margins).sum() + self.penalty / 2 * weights @ weights
            return float(value), self.penalty * weights - matrix.T @ wrong

        found = minimize(loss, np.zeros(len(column)), jac=True, method="L-BFGS-B")
        self.weights = dict(zip(column, found.x.tolist(), strict=True))
        return self

    def score(self, dialogue: Dialogue) -> float:
        """Reward of a dialogue; words not met in fitting count nothing."""
        return sum(self.weights.get(word, 0.0) * count for word, count in _words(dialogue).items())


def _text(dialogue: Dialogue) -> str:
    return dialogue if isinstance(dialogue, str) else "\n\n".join(message["content"] for message in dialogue)


def _words(dialogue: Dialogue) -> Counter[str]:
    return Counter(WORD.findall(_text(dialogue).lower()))
