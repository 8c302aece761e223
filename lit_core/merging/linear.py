"""Sums of weights, and of task vectors, the differences between models and the base that they were trained from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_core.merging.method import Combination, check_flag, check_range


def shares(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, which is not 0."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True)
class Linear(Combination):
    """``sum_i w_i model_i / sum_i w_i``; a base has no part in it.

    Args:
        normalize: Divide the weights by their sum.
    """

    normalize: bool = True
    name: ClassVar[str] = "linear"
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_flag("normalize", self.normalize)

    @property
    def averages(self) -> bool:
        """Where weights are divided by their sum."""
        return self.normalize

    def coefficients(self, gram: Tensor, weights: Sequence[float], note: Callable[[str], None]) -> list[float]:
        """The weights."""
        return shares(weights) if self.normalize else list(weights)


@dataclass(frozen=True)
class TaskArithmetic(Combination):
    """``base + lam sum_i w_i (model_i - base)`` (Ilharco et al., arXiv 2212.04089, section 2).

    Args:
        lam: Factor of the sum.
        normalize: Divide the weights by their sum.
    """

    lam: float = 1.0
    normalize: bool = False
    name: ClassVar[str] = "task_arithmetic"
    needs_base: ClassVar[bool] = True
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("lam", self.lam, 0.0, math.inf)
        check_flag("normalize", self.normalize)

    @property
    def averages(self) -> bool:
        """Where weights are divided by their sum."""
        return self.normalize

    def coefficients(self, gram: Tensor, weights: Sequence[float], note: Callable[[str], None]) -> list[float]:
        """The weights times ``lam``."""
        return [self.lam * weight for weight in (shares(weights) if self.normalize else weights)]
