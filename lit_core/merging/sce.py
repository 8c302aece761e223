"""SCE: entries that vary most over models are selected, weights calculated from them, and other signs erased."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_core.merging.chunks import Stack
from lit_core.merging.method import Method, check_range
from lit_core.merging.selection import Selection, share_of
from lit_core.merging.ties import agreeing


def spread(deltas: Tensor, double: bool) -> Tensor:
    """Standard deviation over the models, ``(1, n)``; exactly 0 where all are equal."""
    centred = deltas - deltas[0]
    centred -= centred.mean(0)
    size = centred.square_().mean(0, keepdim=True).sqrt_()
    return size if double else size.float()


@dataclass(frozen=True)
class Sce(Method):
    """Select, calculate, erase (Wan et al., arXiv 2408.07990, section 3.2), tensor by tensor.

    Of the entries that are not equal in all models those with the largest variance are selected, and the others are
    those of the base; where nothing varies all are selected. A model's weight is the mean square of its task vector
    over the tensor. Entries whose sign is not that of the sum over the models are erased, and the rest is averaged.

    Args:
        select_topk: Share of the entries that vary to select, rounded down, at least one; 1 selects all.
    """

    select_topk: float = 1.0
    name: ClassVar[str] = "sce"
    needs_base: ClassVar[bool] = True
    weighted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("select_topk", self.select_topk, 0.0, 1.0)

    def merge(self, stack: Stack, weights: Sequence[float]) -> Iterator[Tensor]:
        """A pass for the weights and one to merge; before these, four (six in float64) where not all are selected."""
        selection = self._selection(stack)
        squares = torch.zeros(len(stack.models), dtype=torch.float64, device=stack.device)
        for _, deltas in self._selected(stack, selection):
            squares += deltas.square_().sum(1)
        parts = torch.where(squares.sum() > 0, squares / squares.sum(), 1 / len(squares))[:, None]
        for base, deltas in self._selected(stack, selection):
            agree = agreeing(deltas)
            total = deltas.mul_(agree).mul_(parts).sum(0)
            counted = torch.mul(agree, parts, out=deltas).sum(0)
            yield base.add_(total / torch.where(counted > 0, counted, 1.0))

    def _selection(self, stack: Stack) -> Selection | None:
        if self.select_topk == 1:
            return None

        def spreads(_: slice) -> Iterator[Tensor]:
            for _base, deltas in stack.deltas():
                yield spread(deltas, stack.double)

        varying = sum(int((chunk > 0).sum()) for chunk in spreads(slice(None)))
        if not varying:
            return None
        dtype = torch.float64 if stack.double else torch.float32
        return Selection(spreads, [share_of(varying, self.select_topk)], stack.numel, dtype)

    def _selected(self, stack: Stack, selection: Selection | None) -> Iterator[tuple[Tensor, Tensor]]:
        """A pass over the base ``(n,)`` and the task vectors ``(models, n)``, 0 where not selected."""
        mark = None if selection is None else selection.marker()
        for base, deltas in stack.deltas():
            if mark is not None:
                deltas.mul_(mark(spread(deltas, stack.double)))
            yield base, deltas
