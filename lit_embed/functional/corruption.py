"""Input corruption of LLM-QL: a share of a document's words is hidden from the model (card section 2.3)."""

from typing import Literal

import torch
from torch import Generator, Tensor

Unit = Literal["word", "token"]


def corrupt_words(
    text: str, rate: float, generator: Generator | None = None, draws: Tensor | None = None, mask: str = "_"
) -> str:
    """Replace each whitespace-separated word by ``mask`` with probability ``rate``.

    Args:
        text: Raw text, before any prompt is put around it.
        rate: Probability of hiding a word; 0 returns the text untouched.
        generator: Source of the draws.
        draws: The draws themselves, uniform in [0, 1), one a word; a word is hidden where its draw is below ``rate``.
        mask: What stands for a hidden word.

    Returns:
        The words joined by single spaces.

    Raises:
        ValueError: ``rate`` is no probability.
    """
    _check(rate)
    if rate == 0:
        return text
    words = text.split()
    hidden = torch.rand(len(words), generator=generator) if draws is None else draws
    return " ".join(mask if hide else word for word, hide in zip(words, (hidden < rate).tolist(), strict=True))


def corrupt_tokens(ids: list[int], rate: float, mask_id: int, generator: Generator | None = None) -> list[int]:
    """Replace each token by ``mask_id`` with probability ``rate``; the caller leaves prompt and end tokens out."""
    _check(rate)
    if rate == 0:
        return ids
    hidden = (torch.rand(len(ids), generator=generator) < rate).tolist()
    return [mask_id if hide else token for token, hide in zip(ids, hidden, strict=True)]


def _check(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"corruption rate must be a probability, got {rate}")
