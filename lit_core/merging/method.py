"""What a way to merge is: options that are checked, and chunks of the result from chunks of the models."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging.chunks import Stack

OnZero = Literal["linear", "error"]


@dataclass(frozen=True)
class Method(ABC):
    """One way to merge; its fields are its options."""

    name: ClassVar[str]
    needs_base: ClassVar[bool] = False
    weighted: ClassVar[bool] = True  # whether the caller may say how much each model counts
    positive: ClassVar[bool] = False  # whether weights below 0 make no sense
    fewest: ClassVar[int] = 1  # models

    @property
    def averages(self) -> bool:
        """Whether weights are divided by their sum, which then must not be 0."""
        return False

    def check(self, count: int, weights: Sequence[float] | None, has_base: bool) -> list[float]:
        """A weight for each model, 1 where none is given.

        Raises:
            InputError: Weights that do not fit, too few models, or no base.
        """
        if count < self.fewest:
            least = "one model" if self.fewest == 1 else f"{self.fewest} models"
            raise InputError(f"need at least {least} to merge", field="models")
        if weights is not None and not self.weighted:
            raise InputError(f"{self.name} finds its weights itself; leave them away", field="weights")
        factors = [1.0] * count if weights is None else _numbers(weights)
        if len(factors) != count or not all(map(math.isfinite, factors)):
            raise InputError(f"need a finite number for each of {count} models, got {factors}", field="weights")
        if self.positive and min(factors) < 0:
            raise InputError(f"{self.name} takes no weights below 0, got {factors}", field="weights")
        if self.averages and abs(sum(factors)) < 1e-12:
            raise InputError(f"{self.name} divides by the sum of the weights, which is 0: {factors}", field="weights")
        if self.needs_base and not has_base:
            raise InputError(f"{self.name} needs the base that the models were trained from", field="base")
        return factors

    @abstractmethod
    def merge(self, stack: Stack, weights: Sequence[float]) -> Iterator[Tensor]:
        """Merge a tensor.

        Args:
            stack: It in all models.
            weights: One a model, as :meth:`check` returns them.

        Returns:
            Chunks of the merged entries in order, float64; each lasts until the next.
        """


@dataclass(frozen=True)
class Combination(Method):
    """A method whose result is ``sum_i c_i v_i`` with ``c`` from the Gram matrix of the ``v_i`` alone."""

    needs_gram: ClassVar[bool] = True

    def takes_deltas(self, has_base: bool) -> bool:
        """Whether ``v_i`` are differences from the base, to which the sum then is added."""
        return self.needs_base

    @abstractmethod
    def coefficients(self, gram: Tensor, weights: Sequence[float], note: Callable[[str], None]) -> list[float]:
        """The coefficients ``c``.

        Args:
            gram: Dot products ``(models, models)``, float64.
            weights: One a model.
            note: Called with what the caller should know, such as a fallback.

        Raises:
            InputError: A tensor has no direction, and the options forbid to go on.
        """

    def merge(self, stack: Stack, weights: Sequence[float]) -> Iterator[Tensor]:
        """One pass for the Gram matrix where it is needed, and one for the sum."""
        of_deltas = self.takes_deltas(stack.base is not None)
        size = len(stack.models)
        gram = stack.gram(of_deltas) if self.needs_gram else torch.zeros(size, size, dtype=torch.float64)
        try:
            found = self.coefficients(gram, weights, stack.notes.append)
        except InputError as error:
            raise InputError(f"tensor '{stack.name}': {error.message}", field=error.field) from None
        yield from stack.combine(found, of_deltas)


def check_zero(gram: Tensor, on_zero: OnZero, note: Callable[[str], None], done: str) -> None:
    """Refuse vectors that are zero where they are not wanted, or tell of them unless all are.

    Args:
        gram: Dot products ``(models, models)``.
        on_zero: ``error`` refuses them.
        note: Called with which they are.
        done: What is done about them.

    Raises:
        InputError: ``on_zero`` is ``error``, and a dot product of a vector with itself is 0.
    """
    zero = (gram.diagonal() == 0).nonzero().flatten().tolist()
    if zero and on_zero == "error":
        raise InputError(f"is zero in models {zero} (from 0), and so has no direction", field="on_zero")
    if 0 < len(zero) < len(gram):
        note(f"is zero in models {zero} (from 0): {done}")


def check_range(name: str, value: float, low: float, high: float, open_low: bool = True) -> None:
    """Refuse an option outside its range.

    Raises:
        InputError: It is no number, or out of ``(low, high]``, or ``[low, high]``.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (open_low and value == low):
        least = f"above {low:g}" if open_low else f"at least {low:g}"
        most = f" and at most {high:g}" if high < math.inf else ""
        raise InputError(f"must be {least}{most}, got {value!r}", field=name)


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse an option that is none of a literal type.

    Raises:
        InputError: The value is not among them.
    """
    if value not in get_args(choices):
        raise InputError(f"must be one of {', '.join(get_args(choices))}, got {value!r}", field=name)


def check_flag(name: str, value: bool) -> None:
    """Refuse an option that is no truth value.

    Raises:
        InputError: It is not.
    """
    if not isinstance(value, bool):
        raise InputError(f"must be true or false, got {value!r}", field=name)


def _numbers(weights: Sequence[float]) -> list[float]:
    try:
        return [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise InputError(f"need numbers, got {weights!r}", field="weights") from None
