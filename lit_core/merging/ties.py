"""TIES: task vectors are trimmed, a sign is elected for each entry, and those that agree with it are averaged."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_core.merging.chunks import Stack
from lit_core.merging.method import Method, check_choice, check_flag, check_range
from lit_core.merging.selection import Selection, share_of

Consensus = Literal["weighted", "count"]


def agreeing(votes: Tensor) -> Tensor:
    """Which entries have the sign of their sum over the models; a sum of 0 elects plus, and a zero agrees with none.

    Args:
        votes: Floats ``(models, n)``.

    Returns:
        Booleans ``(models, n)``.
    """
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(votes.dtype)
    return votes * elected > 0


def agreed_sum(deltas: Tensor, weights: Sequence[float], normalize: bool, consensus: Consensus = "weighted") -> Tensor:
    """Sum of the weighted entries that agree in sign (Yadav et al., arXiv 2306.01708, section 3).

    Args:
        deltas: Task vectors ``(models, n)``; they are overwritten.
        weights: One a model.
        normalize: Divide by the weights of those that agree, where these do not sum to 0.
        consensus: ``weighted`` elects the sign of the weighted sum; ``count``, as peft does, that of the plain sum, and
            divides by the number of those that agree.

    Returns:
        Floats ``(n,)``, 0 where none agrees.
    """
    column = deltas.new_tensor(weights)[:, None]
    if consensus == "count":
        agree = agreeing(deltas)
        total = deltas.mul_(column).mul_(agree).sum(0)
        return total / agree.sum(0).clamp(min=1) if normalize else total
    votes = deltas.mul_(column)
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(votes.dtype)
    agreed = votes.mul_(elected).clamp_(min=0)  # without a mask, which costs as much as all the rest
    total = agreed.sum(0).mul_(elected)
    if normalize:
        counted = agreed.sign_().mul_(column).sum(0)
        total /= torch.where(counted.abs() < 1e-8, 1.0, counted)
    return total


def magnitudes(deltas: Tensor, double: bool) -> Tensor:
    """Sizes by which entries are trimmed: float32 unless the models are float64, which saves passes."""
    return deltas.abs() if double else deltas.float().abs_()


@dataclass(frozen=True)
class Ties(Method):
    """``base + lam agreed_i(w_i trim(model_i - base))`` (Yadav et al., arXiv 2306.01708, section 3).

    A task vector is trimmed to its largest magnitudes, tensor by tensor, in float32 unless the tensors are float64;
    of equal ones the first are kept. The sign of an entry is that of the weighted sum.

    Args:
        density: Share of the entries that is kept, rounded down, at least one entry.
        lam: Factor of the merged task vector.
        normalize: Divide each entry by the weights of the models that agree, or leave the sum.
        consensus: ``weighted``, or ``count`` as peft does it (:func:`agreed_sum`).
    """

    density: float = 0.2
    lam: float = 1.0
    normalize: bool = True
    consensus: Consensus = "weighted"
    name: ClassVar[str] = "ties"
    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("density", self.density, 0.0, 1.0)
        check_range("lam", self.lam, 0.0, math.inf)
        check_flag("normalize", self.normalize)
        check_choice("consensus", self.consensus, Consensus)

    def merge(self, stack: Stack, weights: Sequence[float]) -> Iterator[Tensor]:
        """Three passes for the thresholds (five in float64), one to merge."""

        def sizes(which: slice) -> Iterator[Tensor]:
            for _, deltas in stack.deltas(which, stack.work):
                yield magnitudes(deltas, stack.double)

        trim = None
        if (kept := share_of(stack.numel, self.density)) < stack.numel:
            dtype = torch.float64 if stack.double else torch.float32
            trim = Selection(sizes, [kept] * len(stack.models), stack.numel, dtype).trimmer()
        for base, deltas in stack.deltas(dtype=stack.work):
            kept_deltas = deltas if trim is None else trim(deltas)
            yield base.add_(agreed_sum(kept_deltas, weights, self.normalize, self.consensus), alpha=self.lam)
