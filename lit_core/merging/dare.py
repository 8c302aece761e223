"""DARE: entries of task vectors are dropped at random, and the rest grows to make up for them."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging.chunks import Stack
from lit_core.merging.linear import shares
from lit_core.merging.method import Method, check_choice, check_flag, check_range
from lit_core.merging.ties import agreed_sum

Rescale = Literal["density", "l1", "none"]
PER_STEP = 8  # numbers of 32 bits for each step of the generator's counter


def bernoulli_mask(seed: int, tensor: str, model: int, start: int, stop: int, density: float) -> Tensor:
    """Which entries stay, each with probability ``density``.

    A generator that counts (Philox) has a key for each seed, tensor and model, and a counter that follows the entries:
    a mask depends neither on the order of tensors nor on how they are read.

    Args:
        seed: Seed of all masks.
        tensor: Name of the tensor.
        model: Number of the model, from 0.
        start: First entry, in row-major order.
        stop: The entry after the last.
        density: Above 0 and at most 1.

    Returns:
        Booleans ``(stop - start,)``.
    """
    key = hashlib.blake2b(f"{seed}\0{model}\0{tensor}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(key, "little")).advance(start // PER_STEP)
    skipped = start % PER_STEP
    words = generator.random_raw((skipped + stop - start + 1) // 2)
    drawn = np.stack([words & 0xFFFFFFFF, words >> 32], axis=1).reshape(-1)[skipped : skipped + stop - start]
    return torch.from_numpy(drawn < round(density * 2**32))


@dataclass(frozen=True)
class Dare(Method):
    """What the two forms of DARE share (Yu et al., arXiv 2311.03099, section 3).

    Args:
        density: Probability of an entry of a task vector to stay; one less the paper's drop rate.
        rescale: ``density`` divides what stays by the density, as the paper does; ``l1`` gives it the L1 norm that the
            task vector had in this tensor, as mergekit does; ``none`` leaves it.
        lam: Factor of the merged task vector.
        normalize: Divide by the sum of the weights, with signs by that of the models that agree.
        seed: Seed of the masks.
    """

    density: float = 0.5
    rescale: Rescale = "density"
    lam: float = 1.0
    normalize: bool = False
    seed: int = 0
    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("density", self.density, 0.0, 1.0)
        check_choice("rescale", self.rescale, Rescale)
        check_range("lam", self.lam, 0.0, math.inf)
        check_flag("normalize", self.normalize)
        if not isinstance(self.seed, int):
            raise InputError(f"must be a whole number, got {self.seed!r}", field="seed")

    def dropped(self, stack: Stack) -> Iterator[tuple[Tensor, Tensor]]:
        """A pass over the base ``(n,)`` and what stays of the task vectors ``(models, n)``, at its old size."""
        for (start, stop), (base, deltas) in zip(stack.spans(), stack.deltas(), strict=True):
            for number, row in enumerate(deltas if self.density < 1 else ()):
                stays = bernoulli_mask(self.seed, stack.name, number, start, stop, self.density)
                row.mul_(stays.to(row.device))
            yield base, deltas

    def factors(self, stack: Stack) -> list[float]:
        """What remains of each task vector is multiplied by this; ``l1`` takes two passes."""
        count = len(stack.models)
        if self.rescale == "l1":
            whole, left = (torch.zeros(count, dtype=torch.float64, device=stack.device) for _ in range(2))
            for _, deltas in stack.deltas():
                whole += deltas.abs_().sum(1)
            for _, deltas in self.dropped(stack):
                left += deltas.abs_().sum(1)
            return torch.where(left > 0, whole / left, 1.0).tolist()
        return [1 / self.density if self.rescale == "density" else 1.0] * count


class DareLinear(Dare):
    """``base + lam sum_i w_i drop(model_i - base)``; see :class:`Dare` for options."""

    name: ClassVar[str] = "dare_linear"

    @property
    def averages(self) -> bool:
        """Where weights are divided by their sum."""
        return self.normalize

    def merge(self, stack: Stack, weights: Sequence[float]) -> Iterator[Tensor]:
        """One pass, after those of :meth:`factors`."""
        parts = shares(weights) if self.normalize else weights
        scaled = [part * factor for part, factor in zip(parts, self.factors(stack), strict=True)]
        for base, deltas in self.dropped(stack):
            for row, factor in zip(deltas, scaled, strict=True):
                base.add_(row, alpha=self.lam * factor)
            yield base


class DareTies(Dare):
    """``base + lam agreed_i(w_i drop(model_i - base))``, with the signs of TIES; see :class:`Dare` for options."""

    name: ClassVar[str] = "dare_ties"

    def merge(self, stack: Stack, weights: Sequence[float]) -> Iterator[Tensor]:
        """One pass, after those of :meth:`factors`."""
        factors = torch.tensor(self.factors(stack), dtype=torch.float64, device=stack.device)[:, None]
        for base, deltas in self.dropped(stack):
            yield base.add_(agreed_sum(deltas.mul_(factors), weights, self.normalize), alpha=self.lam)
