"""Merging directions and lengths apart: SLERP, Multi-SLERP and the Karcher mean.

A tensor is one long vector. All three return a linear combination of the vectors, whose coefficients follow from their
Gram matrix ``G``, so that no vector is held as a whole: with lengths ``n_i = sqrt(G_ii)`` and unit vectors
``u_i = v_i / n_i``, a combination with coefficients ``c`` has the squared length ``c' G c`` and the products ``G c``
with the vectors. A vector that is zero has no direction: it counts in the mean length alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging.linear import shares
from lit_core.merging.method import Combination, OnZero, check_choice, check_range, check_zero

Space = Literal["weight", "delta"]
Tangent = Literal["projection", "log", "karcher"]
PARALLEL = 0.9995  # cosines beyond it, of either sign, are interpolated on the line
LEAST = 1e-6  # length of the mean of unit vectors below which it is rounding, and no direction
TOLERANCE, ITERATIONS = 1e-5, 10  # where the Karcher mean ends


def slerp_coefficients(gram: Tensor, weights: Sequence[float]) -> Tensor:
    """Coefficients of spherical linear interpolation, one model after the other.

    Model ``i`` is met with ``t = w_i / (w_0 + ... + w_i)``, so that two models are interpolated at the second's share:
    ``(sin((1 - t) theta) v_0 + sin(t theta) v_1) / sin theta`` of vectors of any length, with ``theta`` the angle
    between them (Shoemake, 1985); ``(1 - t) v_0 + t v_1`` where they are parallel, opposite or zero.

    Args:
        gram: Dot products ``(models, models)``, float64.
        weights: One a model, not below 0, with a sum above 0.

    Returns:
        Coefficients ``(models,)``.
    """
    found, total = torch.zeros(len(weights), dtype=torch.float64), 0.0
    for number, weight in enumerate(weights):
        if weight == 0:
            continue
        total += weight
        t = weight / total
        own = torch.zeros_like(found)
        own[number] = 1.0
        lengths = math.sqrt(max(0.0, float(found @ gram @ found))) * math.sqrt(float(gram[number, number]))
        cosine = float(gram[number] @ found) / lengths if lengths > 0 else 1.0
        near, far = 1 - t, t
        if abs(cosine) <= PARALLEL:
            theta = math.acos(cosine)
            near, far = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
        found = near * found + far * own
    return found


def mean_coefficients(
    gram: Tensor, weights: Sequence[float], iterations: int = 0, tolerance: float = 0.0
) -> Tensor | None:
    """Coefficients of a mean on the sphere times the mean length ``sum_i w_i n_i``.

    It starts at ``m / |m|`` with ``m = sum_i w_i u_i``. That is what mergekit calls Multi-SLERP: it projects the
    ``u_i`` on the tangent space at ``m / |m|``, where their weighted sum is zero, so that the exponential map returns
    to the start. An iteration takes the logarithm instead, ``log_u(u_i) = theta_i / sin theta_i (u_i - cos theta_i u)``
    with ``theta_i`` the angle between ``u_i`` and the point ``u``, and goes to ``exp_u(sum_i w_i log_u(u_i))``; its
    fixed point is the Karcher mean.

    Args:
        gram: Dot products ``(models, models)``, float64.
        weights: One a model, with sum 1.
        iterations: Most iterations.
        tolerance: Length in radians of a step after which it ends.

    Returns:
        Coefficients ``(models,)``, or None if the unit vectors cancel, or all vectors are zero.
    """
    parts = torch.tensor(weights, dtype=torch.float64)
    lengths = gram.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    unit = parts * inverse
    length = float(unit @ gram @ unit)
    if length <= (LEAST * float(parts[lengths > 0].sum())) ** 2:
        return None
    found = unit / math.sqrt(length)
    for _ in range(iterations):
        cosines = ((gram @ found) * inverse).clamp(-1, 1)
        angles = torch.acos(cosines)
        sines = torch.sin(angles)
        ratios = torch.where(sines > 1e-7, angles / sines, 1.0)  # an opposite vector has no logarithm and adds nothing
        step = unit * ratios - (parts * ratios * cosines).sum() * found
        size = math.sqrt(max(0.0, float(step @ gram @ step)))
        found = math.cos(size) * found + float(torch.sinc(torch.tensor(size / math.pi))) * step
        if size < tolerance:
            break
    return found * (parts * lengths).sum()


@dataclass(frozen=True)
class Spherical(Combination):
    """What the spherical methods share.

    Args:
        space: Merge weights, or differences from the base, which is added again; None takes differences where there
            is a base.
        on_zero: Where a tensor is zero in a model: ``linear`` lets it count in the mean length alone (SLERP
            interpolates on the line), ``error`` refuses it.
    """

    space: Space | None = None
    on_zero: OnZero = "linear"
    positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.space is not None:
            check_choice("space", self.space, Space)
        check_choice("on_zero", self.on_zero, OnZero)

    @property
    def averages(self) -> bool:
        """Always."""
        return True

    def check(self, count: int, weights: Sequence[float] | None, has_base: bool) -> list[float]:
        """Differences need a base."""
        if self.space == "delta" and not has_base:
            raise InputError("space 'delta' needs the base that the models were trained from", field="base")
        return super().check(count, weights, has_base)

    def takes_deltas(self, has_base: bool) -> bool:
        """As ``space`` says."""
        return has_base if self.space is None else self.space == "delta"

    def mean(
        self, gram: Tensor, weights: Sequence[float], note: Callable[[str], None], iterations: int, tolerance: float
    ) -> list[float]:
        """A mean on the sphere, or the linear mean where there is none."""
        check_zero(gram, self.on_zero, note, "they count in the mean length alone")
        parts = shares(weights)
        found = mean_coefficients(gram, parts, iterations, tolerance)
        if found is None and bool(gram.any()):  # a tensor that is zero everywhere is nothing to speak of
            note("the directions cancel, and the linear mean was taken")
        return parts if found is None else found.tolist()


@dataclass(frozen=True)
class Slerp(Spherical):
    """Spherical linear interpolation of two models, or of more one after the other (:func:`slerp_coefficients`).

    Args:
        t: Place between two models, 0 the first and 1 the second, instead of weights.
    """

    t: float | None = None
    name: ClassVar[str] = "slerp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t is not None:
            check_range("t", self.t, 0.0, 1.0, open_low=False)

    def check(self, count: int, weights: Sequence[float] | None, has_base: bool) -> list[float]:
        """A place takes the weights' place."""
        if self.t is None:
            return super().check(count, weights, has_base)
        if weights is not None or count != 2:
            raise InputError(f"is a place between two models without weights, got {count} models", field="t")
        return super().check(count, [1 - self.t, self.t], has_base)

    def coefficients(self, gram: Tensor, weights: Sequence[float], note: Callable[[str], None]) -> list[float]:
        """Of :func:`slerp_coefficients`."""
        check_zero(gram, self.on_zero, note, "they were interpolated on the line")
        return slerp_coefficients(gram, weights).tolist()


@dataclass(frozen=True)
class MultiSlerp(Spherical):
    """A mean direction times the mean length (:func:`mean_coefficients`).

    Args:
        tangent: ``projection`` is mergekit's formula, the normalised mean of the unit vectors; ``log`` one step with
            the logarithm from there; ``karcher`` as many as :class:`Karcher` takes.
    """

    tangent: Tangent = "projection"
    name: ClassVar[str] = "multislerp"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tangent", self.tangent, Tangent)

    def coefficients(self, gram: Tensor, weights: Sequence[float], note: Callable[[str], None]) -> list[float]:
        """Of :func:`mean_coefficients`."""
        if self.tangent == "karcher":
            return self.mean(gram, weights, note, ITERATIONS, TOLERANCE)
        return self.mean(gram, weights, note, int(self.tangent == "log"), 0.0)


@dataclass(frozen=True)
class Karcher(Spherical):
    """The Karcher mean of the directions times the mean length (:func:`mean_coefficients`).

    Args:
        iterations: Most steps.
        tolerance: Length in radians of a step after which it ends.
    """

    iterations: int = ITERATIONS
    tolerance: float = TOLERANCE
    name: ClassVar[str] = "karcher"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("iterations", self.iterations, 1, math.inf, open_low=False)
        check_range("tolerance", self.tolerance, 0.0, math.inf, open_low=False)

    def coefficients(self, gram: Tensor, weights: Sequence[float], note: Callable[[str], None]) -> list[float]:
        """Of :func:`mean_coefficients`."""
        return self.mean(gram, weights, note, int(self.iterations), self.tolerance)
