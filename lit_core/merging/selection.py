"""The exact largest of many numbers that are never in memory at once."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

WHOLE = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}
DIGIT = 16  # bits that one pass settles
GROUP = 4  # rows that are counted in the same pass; each needs 256 KiB


class Selection:
    """The ``counts[row]`` largest entries of each row; of equal ones the first.

    The bits of numbers that are not negative are ordered as the numbers are. Each pass counts the next 16 bits of
    those entries whose higher bits are those of the threshold: two passes for float32, four for float64.

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
        whole, bits = WHOLE[dtype]
        counter = torch.int32 if numel < 2**31 else torch.int64
        for first in range(0, len(counts), GROUP):
            rows = range(first, min(first + GROUP, len(counts)))
            for shift in range(bits - DIGIT, -1, -DIGIT):
                above = shift + DIGIT
                seen: Tensor | None = None
                for chunk in chunks(slice(rows.start, rows.stop)):
                    if seen is None:
                        seen = torch.zeros(len(rows), 2**DIGIT, dtype=counter, device=chunk.device)
                        ones = seen.new_ones(chunk.shape[1])  # no chunk is longer than the first
                    for row, codes in enumerate(chunk.view(whole)):
                        kept = codes if above == bits else codes[codes >> above == high[rows[row]]]
                        digits = (kept >> shift) & (2**DIGIT - 1)
                        seen[row].scatter_add_(0, digits.long(), ones[: len(digits)])
                assert seen is not None  # there is an entry to select
                for row, histogram in zip(rows, seen.cpu(), strict=True):
                    from_top = histogram.long().flip(0).cumsum(0)
                    place = int(torch.searchsorted(from_top, self.equal[row]))
                    self.equal[row] -= int(from_top[place - 1]) if place else 0
                    high[row] = high[row] << DIGIT | (2**DIGIT - 1 - place)
        self.thresholds = torch.tensor(high, dtype=whole).view(dtype)[:, None]

    def marker(self) -> Callable[[Tensor], Tensor]:
        """A function for one more pass: from each chunk ``(rows, n)``, in order, to what is selected, ``(rows, n)``."""
        left = list(self.equal)

        def mark(chunk: Tensor) -> Tensor:
            thresholds = self.thresholds.to(chunk.device)
            mask, equal = chunk > thresholds, chunk == thresholds
            for row in equal.any(1).nonzero().flatten().tolist():
                first = equal[row] & (equal[row].cumsum(0) <= left[row])
                left[row] -= int(first.sum())
                mask[row] |= first
            return mask

        return mark


def share_of(count: int, share: float) -> int:
    """How many of ``count`` entries a share of them is: rounded down, at least 1."""
    return max(1, int(share * count))
