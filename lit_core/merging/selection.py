"""The exact largest of many numbers that are never in memory at once."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}
# bits that a pass settles, the highest first: many, where every entry is counted, and then as few as keep memory small
DIGITS = {torch.float32: (16, 8, 8), torch.float64: (16, 12, 12, 12, 12)}
GROUP = 8  # rows that are counted in the same pass; each needs 128 KiB


class Selection:
    """The ``counts[row]`` largest entries of each row; of equal ones the first.

    The bits of numbers that are not negative are ordered as the numbers are. Each pass counts the next bits of
    those entries whose higher bits are those of the threshold: three passes for float32, five for float64.

    Args:
        chunks: Starts a pass over some rows; yields chunks ``(those rows, n)`` of numbers that are not below 0.
        counts: Entries to select of each row, at least 1 and no more than there are.
        numel: Entries of a row.
        dtype: Type of the chunks, float32 or float64.

    Attributes:
        thresholds: The least selected number of each row, ``(rows, 1)``.
        equal: How many of the entries that equal it are selected.
    """

    def __init__(
        self, chunks: Callable[[slice], Iterable[Tensor]], counts: Sequence[int], numel: int, dtype: torch.dtype
    ) -> None:
        self.equal, high = list(counts), [0] * len(counts)  # high: bits of the threshold that are settled
        self.dtype, whole, digits = dtype, WHOLE[dtype], DIGITS[dtype]
        counter = torch.int32 if numel < 2**31 else torch.int64
        for first in range(0, len(counts), GROUP):
            rows = range(first, min(first + GROUP, len(counts)))
            above = sum(digits)
            for digit in digits:
                first_digit = above == sum(digits)
                shift, bins = above - digit, 2 ** (digit - first_digit)  # the sign is 0
                seen: Tensor | None = None
                for chunk in chunks(slice(rows.start, rows.stop)):
                    if seen is None:
                        seen = torch.zeros(len(rows), bins, dtype=counter, device=chunk.device)
                    for row, codes in enumerate(chunk.view(whole)):
                        if first_digit:
                            _count(codes >> shift, seen[row])
                        else:
                            kept = codes[places(codes >> above, high[rows[row]])]
                            _count((kept >> shift) & (bins - 1), seen[row])
                assert seen is not None  # there is an entry to select
                for row, histogram in zip(rows, seen.cpu(), strict=True):
                    from_top = histogram.long().flip(0).cumsum(0)
                    place = int(torch.searchsorted(from_top, self.equal[row]))
                    self.equal[row] -= int(from_top[place - 1]) if place else 0
                    high[row] = high[row] << digit | (bins - 1 - place)
                above = shift
        self.thresholds = torch.tensor(high, dtype=whole).view(dtype)[:, None]

    def marker(self) -> Callable[[Tensor], Tensor]:
        """A function for one more pass: from each chunk ``(rows, n)``, in order, to what is selected, ``(rows, n)``."""
        left = list(self.equal)

        def mark(chunk: Tensor) -> Tensor:
            mask = chunk > self.thresholds.to(chunk.device)
            for row, least in enumerate(self.thresholds.flatten().tolist()):
                if left[row]:
                    equal = places(chunk[row], least)[: left[row]]
                    mask[row, equal] = True
                    left[row] -= len(equal)
            return mask

        return mark

    def trimmer(self) -> Callable[[Tensor], Tensor]:
        """The same for numbers of any sign, in place: their sizes are selected, and the others become 0.

        Numbers of another type than the selection's are as large as they are in its type.
        """
        left, mark = list(self.equal), self.marker()
        below = torch.nextafter(self.thresholds, torch.zeros_like(self.thresholds)).flatten().tolist()

        def trim(chunk: Tensor) -> Tensor:
            if chunk.dtype != self.dtype:
                return chunk.mul_(mark(chunk.to(self.dtype).abs_()))
            for row, least in enumerate(self.thresholds.flatten().tolist()):
                limit, values = least, chunk[row]
                if left[row]:  # all of those that are equal, but for some of the last chunk that has any
                    equal = places(values.abs(), least)
                    values[equal[left[row] :]] = 0.0
                    left[row] -= min(left[row], len(equal))
                    limit = below[row]
                torch.hardshrink(values, limit, out=values)  # several times as fast as a mask
            return chunk

        return trim


def places(values: Tensor, number: float) -> Tensor:
    """Where numbers equal one, in order; NumPy is several times as fast here as torch is on a CPU.

    Args:
        values: Numbers ``(n,)``.
        number: The one.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy() == number))
    return (values == number).nonzero().flatten()


def _count(digits: Tensor, seen: Tensor) -> None:
    """Add to a histogram how often each number occurs."""
    if len(digits) > len(seen):
        found = torch.bincount(digits)
        seen[: len(found)] += found
    else:
        seen.scatter_add_(0, digits.long(), seen.new_ones(len(digits)))


def share_of(count: int, share: float) -> int:
    """How many of ``count`` entries a share of them is: rounded down, at least 1."""
    return max(1, int(share * count))
