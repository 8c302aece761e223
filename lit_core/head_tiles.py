"""Tiles of a head's logits, some rows by some words at a time, so that states, weights and logits stay in the caches.

:class:`Running` carries what a softmax needs along the words; :class:`Gradients` sums over tiles.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

CPU_TILE = 1 << 20  # logits: 4 MiB of float32, which the allocator reuses and the caches hold
CPU_ROWS = 256  # from so many rows on, the product runs at the processor's rate
SORTED_WIDTH = 64  # PyTorch's topk on a CPU is several times faster in rows of 64 times as many numbers as it looks for
BELOW_ALL = torch.finfo(torch.float32).min / 2  # finite, so that differences are


class Tiles(NamedTuple):
    """Slices of the rows and of the words; every pair of them is a tile."""

    rows: list[slice]
    words: list[slice]


def tiling(rows: int, vocabulary: int, most: int, best: int, cuda: bool = False) -> Tiles:
    """Cut the logits into tiles, about four times as wide as they are high.

    Args:
        rows: Of the hidden states.
        vocabulary: Words of the head.
        most: Logits in a tile.
        best: Numbers that are looked for in each row; asks for wide tiles.
        cuda: A tile is as large as it may be; on a CPU as large as is fast.
    """
    area = most if cuda else min(most, CPU_TILE)
    width = min(vocabulary, max(math.isqrt(4 * area), area // max(1, rows), SORTED_WIDTH * best), max(1, most))
    height = max(1, area // width, min(CPU_ROWS, most // width))
    return Tiles(_slices(rows, height), _slices(vocabulary, width))


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Float32 logits; the product runs in the inputs' dtype, which is what the full head would do."""
    logits = (hidden @ weight.T).float()
    logits = logits if bias is None else logits.add_(bias.float())
    return logits if temperature == 1 else logits.div_(temperature)


def place(indices: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Columns of words inside a tile, and which of them are in it; the columns of the others are any that exist."""
    inside = (indices >= words.start) & (indices < words.stop)
    return (indices - words.start).clamp_(0, words.stop - words.start - 1), inside


class Running:
    """What is known of the distributions of some rows after the words read so far (online softmax).

    Args:
        targets: Long ``(n,)``; their logits are picked out.
        vocabulary: Words there are.
        entropy: Also sum what the entropy needs.
        best: Also keep this many of the largest logits of each row.
    """

    def __init__(self, targets: Tensor, vocabulary: int, entropy: bool, best: int) -> None:
        self.targets, self.entropy, self.best = targets, entropy, best
        zero = torch.zeros((), dtype=torch.float32, device=targets.device)
        self.target = zero.expand(vocabulary).gather(0, targets)  # refuses targets that are no words
        self.maximum = torch.full_like(self.target, BELOW_ALL)
        self.total = torch.zeros_like(self.target)  # of exp(logit - maximum)
        self.moment = torch.zeros_like(self.target)  # of exp(logit - maximum) (logit - maximum)
        self.best_logits = self.target.new_empty(len(targets), 0)
        self.best_ids = targets.new_empty(len(targets), 0)

    def read(self, logits: Tensor, words: slice) -> None:
        """Take in the logits ``(n, words)`` of further words; overwrites them."""
        columns, inside = place(self.targets, words)
        self.target = torch.where(inside, logits.gather(1, columns[:, None]).squeeze(1), self.target)
        if self.best:
            self._keep_best(logits, words.start)
        maximum = torch.maximum(self.maximum, logits.amax(1))
        rise = self.maximum - maximum
        shifted = logits.sub_(maximum[:, None])
        if self.entropy:
            shares = shifted.exp()
            self.moment = (self.moment + rise * self.total) * rise.exp() + torch.linalg.vecdot(shares, shifted)
        else:
            shares = shifted.exp_()
        self.total = self.total * rise.exp() + shares.sum(1)
        self.maximum = maximum

    def _keep_best(self, logits: Tensor, start: int) -> None:
        known = self.best_logits.shape[1]
        if known:  # in front, where a partial sort begins: few of the words then displace one
            logits = torch.cat([self.best_logits, logits], dim=1)
        found = logits.topk(min(self.best, logits.shape[1]), dim=1)
        ids = found.indices + (start - known)
        if known:
            earlier = self.best_ids.gather(1, found.indices.clamp(max=known - 1))
            ids = torch.where(found.indices < known, earlier, ids)
        self.best_logits, self.best_ids = found.values, ids

    def normalisers(self) -> Tensor:
        """Log-sum-exp of each row's logits, float32 ``(n,)``."""
        return self.maximum + self.total.log()

    def log_probs(self) -> Tensor:
        """Log-probabilities of the targets, float32 ``(n,)``."""
        return self.target - self.maximum - self.total.log()

    def entropies(self) -> Tensor:
        """Entropies in nats, float32 ``(n,)``."""
        return self.total.log() - self.moment / self.total


class Gradients:
    """Gradients of hidden, weight and bias, summed over tiles in float32; in the order words, then rows."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        self.inputs = hidden, weight
        self.hidden = torch.zeros_like(hidden, dtype=torch.float32) if needed[0] else None
        self.weight = torch.zeros_like(weight) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None

    def add(self, rows: slice, words: slice, gradient: Tensor) -> None:
        """``gradient`` is that of the tile's logits, float32 ``(n, words)``."""
        hidden, weight = self.inputs[0][rows], self.inputs[1][words]
        narrow = gradient.to(weight.dtype)
        if self.hidden is not None:
            add_product(self.hidden[rows], narrow, weight)
        if self.weight is not None:
            if rows.start == 0:
                wide = weight.dtype == torch.float32
                self.slice = self.weight[words] if wide else torch.zeros_like(weight, dtype=torch.float32)
            add_product(self.slice, narrow.T, hidden)
            if rows.stop == len(self.inputs[0]) and self.slice.dtype != self.weight.dtype:
                self.weight[words] = self.slice
        if self.bias is not None:
            self.bias[words] += gradient.sum(0)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to a float32 total."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
