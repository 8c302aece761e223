"""Model Stock: the mean of models, drawn to the base by as much as the models' task vectors disagree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_core.merging.method import Combination, OnZero, check_choice, check_zero


def mean_cosine(gram: Tensor) -> float | None:
    """Mean cosine over the pairs of vectors of which neither is zero; None without a pair.

    Args:
        gram: Dot products ``(models, models)``, float64.
    """
    kept = gram.diagonal() > 0
    gram = gram[kept][:, kept]
    if len(gram) < 2:
        return None
    lengths = gram.diagonal().sqrt()
    cosines = (gram / torch.outer(lengths, lengths)).clamp(-1, 1)
    first, second = torch.triu_indices(len(gram), len(gram), offset=1)
    return float(cosines[first, second].mean())


@dataclass(frozen=True)
class ModelStock(Combination):
    """``t mean_i(model_i) + (1 - t) base`` with ``t = N cos / (1 + (N - 1) cos)`` (Jang et al., arXiv 2403.19522).

    ``cos`` is the mean cosine between the task vectors of ``N`` models. ``t`` is kept within 0 and 1, which it leaves
    for a negative cosine. A task vector that is zero has no cosine; where no two are left, the mean is taken.

    Args:
        on_zero: Where a task vector is zero: ``linear`` leaves it out of the mean cosine, ``error`` refuses it.
    """

    on_zero: OnZero = "linear"
    name: ClassVar[str] = "model_stock"
    needs_base: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    fewest: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_choice("on_zero", self.on_zero, OnZero)

    def coefficients(self, gram: Tensor, weights: Sequence[float], note: Callable[[str], None]) -> list[float]:
        """``t / N`` for each model."""
        check_zero(gram, self.on_zero, note, "they were left out of the mean cosine")
        count, cosine = len(gram), mean_cosine(gram)
        if cosine is None:
            if bool(gram.any()):  # a tensor that no model changed is nothing to speak of
                note("fewer than two task vectors are not zero, and the mean was taken")
            return [1 / count] * count
        if cosine < 0:
            note(f"the mean cosine is {cosine:.3f}, and the base was taken")
        above = max(0.0, cosine)
        return [above / (1 + (count - 1) * above)] * count
