"""Ragged token batches, and how they are cut into chunks that waste little padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_core.sharding import maximum


@dataclass
class Tokens:
    """Token ids of several texts, one after the other.

    Args:
        ids: Long ``(sum of lengths,)``.
        lengths: Tokens of each text; on the host, so that chunks are planned without a device synchronisation.
    """

    ids: Tensor
    lengths: list[int]

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> "Tokens":
        """Pack lists of ids."""
        return cls(torch.tensor([token for row in rows for token in row], dtype=torch.long), [len(row) for row in rows])

    @classmethod
    def concatenate(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """The texts of all parts in order."""
        return cls(torch.cat([part.ids for part in parts]), [length for part in parts for length in part.lengths])

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Tokens":
        """Move the ids; lightning calls this for its batch transfer."""
        return Tokens(self.ids.to(device, non_blocking=non_blocking), self.lengths)

    def pin_memory(self) -> "Tokens":
        """Copy the ids into page-locked memory; the data loader calls this."""
        return Tokens(self.ids.pin_memory(), self.lengths)

    def pad(self, rows: Sequence[int], pad_id: int) -> tuple[Tensor, Tensor]:
        """Chosen texts as a right-padded batch.

        Args:
            rows: Numbers of the texts.
            pad_id: Fills the rest.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 = token), both Long ``(len(rows), longest)``.
        """
        starts = [0]
        for length in self.lengths[:-1]:
            starts.append(starts[-1] + length)
        device = self.ids.device
        lengths = torch.tensor([self.lengths[row] for row in rows], device=device)
        first = torch.tensor([starts[row] for row in rows], device=device)
        position = torch.arange(max(self.lengths[row] for row in rows), device=device)
        keep = position < lengths[:, None]
        index = (first[:, None] + position).clamp(max=len(self.ids) - 1)
        return self.ids[index].masked_fill_(~keep, pad_id), keep.long()


def plan_chunks(lengths: Sequence[int], budget: int, minimum: int = 1) -> list[list[int]]:
    """Cut texts, longest first, into chunks of at most ``budget`` tokens with padding counted.

    A text longer than the budget is a chunk of its own. On a CPU small budgets (512) win: less padding, warm caches.

    Args:
        lengths: Tokens of each text.
        budget: Padded tokens a chunk may have.
        minimum: Fewest chunks wanted; then the largest are halved. Fewer texts than that give one chunk a text.

    Returns:
        The numbers of the texts in each chunk; every text once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    chunks: list[list[int]] = []
    width = 0
    for row in order:
        if not chunks or width * (len(chunks[-1]) + 1) > budget:
            chunks.append([])
            width = lengths[row]
        chunks[-1].append(row)
    while len(chunks) < min(minimum, len(lengths)):
        largest = max(range(len(chunks)), key=lambda number: len(chunks[number]))
        rows = chunks[largest]
        chunks[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return chunks


def plan_equal_chunks(
    lengths: Sequence[int], budget: int, device: torch.device | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Chunks for a sharded model, whose ranks gather weights in step and so must run equally many forward passes.

    Args:
        lengths: Tokens of each text on this rank, at least one.
        budget: Padded tokens a chunk may have.
        device: Where the ranks' counts are exchanged.

    Returns:
        Chunks as :func:`plan_chunks` gives them, and idle ones: a rank with fewer texts than another has chunks repeats
        its shortest text, whose results are to be dropped.
    """
    wanted = maximum(len(plan_chunks(lengths, budget)), device)
    chunks = plan_chunks(lengths, budget, wanted)
    return chunks, [chunks[-1][-1:]] * (wanted - len(chunks))
