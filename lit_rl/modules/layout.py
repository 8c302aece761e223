"""Training batches: responses in length-sorted chunks, or behind a prompt that their group shares.

Only the states before response tokens are wanted. Both layouts give the same ones: a chunk of rows padded on the right
under plain causal attention, or a row a group, ``prompt, response 1, response 2, ...``, in which each response sees the
prompt and itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_core.tokens import plan_chunks, plan_equal_chunks

Layout = Literal["auto", "sorted", "shared"]
SHARED_GAIN = 0.8  # a shared prompt has to save this much, as its attention needs an explicit mask
SHARED_LENGTH = 4096  # tokens of a row with a shared prompt: the mask is their square


@dataclass
class Chunk:
    """What one forward pass sees.

    Args:
        rows: Responses of the batch, in the order in which their tokens come out; none in an idle chunk, which only
            keeps ranks in step.
        input_ids: Long ``(B, L)``.
        positions: Long ``(B, L)``.
        mask: Bool ``(B, 1, L, L)``, True = may see; None for plain causal attention.
        states: Where in the flattened ``(B * L)`` the state before each response token stands, Long ``(N,)``: all of
            the first row's tokens, then the second's.
    """

    rows: list[int]
    input_ids: Tensor
    positions: Tensor
    mask: Tensor | None
    states: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that the model reads, padding counted."""
        return self.input_ids.numel()


@dataclass
class Sequences:
    """Prompts and responses of a batch, and which rows share a prompt.

    Args:
        prompts: Token ids of each row's prompt.
        responses: Token ids of each row's response.
        groups: Rows with equal numbers have the same prompt.
    """

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    groups: Sequence[int]

    def take(self, rows: Sequence[int]) -> "Sequences":
        """Some of the rows."""
        prompts, responses = ([values[row] for row in rows] for values in (self.prompts, self.responses))
        return Sequences(prompts, responses, [self.groups[row] for row in rows])

    @classmethod
    def concatenate(cls, parts: "Sequence[Sequences]") -> "Sequences":
        """The rows of all parts in order; their groups must have numbers of their own."""
        prompts = [prompt for part in parts for prompt in part.prompts]
        responses = [response for part in parts for response in part.responses]
        return cls(prompts, responses, [group for part in parts for group in part.groups])

    def chunks(
        self, rows: Sequence[int], budget: int, device: torch.device, layout: Layout = "auto", equal: bool = False
    ) -> list[Chunk]:
        """Cut rows into chunks of at most ``budget`` tokens.

        Args:
            rows: Rows to read, each once; those with an empty response come out with no token.
            budget: Tokens of a chunk, padding counted; a longer row or group is a chunk of its own.
            device: Where the tensors go.
            layout: ``auto`` takes the one that reads fewer tokens.
            equal: Every rank makes equally many chunks, as sharded models need; these are length-sorted.
        """
        if not rows:
            return []
        if equal:
            lengths = self._lengths(rows)
            plan, idle = plan_equal_chunks(lengths, budget, device)
            chunks = [self._sorted([rows[number] for number in chunk], device) for chunk in plan]
            return chunks + [self._idle([rows[number] for number in chunk], device) for chunk in idle]
        if layout == "sorted" or (layout == "auto" and not self._sharing_saves(rows, budget)):
            plan = plan_chunks(self._lengths(rows), budget)
            return [self._sorted([rows[number] for number in chunk], device) for chunk in plan]
        return self._shared_chunks(rows, budget, device)

    def _lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens that are read of each row: all but the last, which predicts nothing."""
        return [len(self.prompts[row]) + max(len(self.responses[row]) - 1, 0) for row in rows]

    def _sharing_saves(self, rows: Sequence[int], budget: int) -> bool:
        packs = self._packs(rows)
        shared = [self._pack_length(pack) for pack in packs]
        if max(shared) > SHARED_LENGTH:
            return False
        return _padded(shared, budget) < SHARED_GAIN * _padded(self._lengths(rows), budget)

    def _packs(self, rows: Sequence[int]) -> list[list[int]]:
        packs: dict[int, list[int]] = {}
        for row in rows:
            packs.setdefault(self.groups[row], []).append(row)
        return list(packs.values())

    def _pack_length(self, pack: Sequence[int]) -> int:
        return len(self.prompts[pack[0]]) + sum(max(len(self.responses[row]) - 1, 0) for row in pack)

    def _sorted(self, rows: list[int], device: torch.device) -> Chunk:
        texts = [
            [*self.prompts[row], *self.responses[row]][:length]
            for row, length in zip(rows, self._lengths(rows), strict=True)
        ]
        width = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
        positions = torch.arange(width, device=device).expand(len(texts), -1)
        states = [
            place * width + len(self.prompts[row]) - 1 + step
            for place, row in enumerate(rows)
            for step in range(len(self.responses[row]))
        ]
        return Chunk(rows, ids, positions, None, torch.tensor(states, dtype=torch.long, device=device))

    def _idle(self, rows: list[int], device: torch.device) -> Chunk:
        chunk = self._sorted(rows, device)
        return Chunk([], chunk.input_ids, chunk.positions, None, chunk.states[:0])

    def _shared_chunks(self, rows: Sequence[int], budget: int, device: torch.device) -> list[Chunk]:
        packs = self._packs(rows)
        plan = plan_chunks([self._pack_length(pack) for pack in packs], budget)
        return [self._shared([packs[number] for number in chunk], device) for chunk in plan]

    def _shared(self, packs: list[list[int]], device: torch.device) -> Chunk:
        width = max(self._pack_length(pack) for pack in packs)
        ids, positions, owners, states = [], [], [], list[int]()
        for place, pack in enumerate(packs):
            prompt = self.prompts[pack[0]]
            text, position, owner = list(prompt), list(range(len(prompt))), [0] * len(prompt)
            for number, row in enumerate(pack, start=1):
                response = self.responses[row]
                start = place * width + len(text)
                if response:
                    states.append(place * width + len(prompt) - 1)
                    states += range(start, start + len(response) - 1)
                    text += response[:-1]
                    position += range(len(prompt), len(prompt) + len(response) - 1)
                    owner += [number] * (len(response) - 1)
            padding = width - len(text)
            ids.append(text + [0] * padding)
            positions.append(position + [0] * padding)
            owners.append(owner + [-1] * padding)
        owned = torch.tensor(owners, device=device)
        same = (owned[:, :, None] == owned[:, None, :]) | (owned[:, None, :] == 0)
        mask = (same & torch.ones(width, width, dtype=torch.bool, device=device).tril()).unsqueeze(1)
        rows = [row for pack in packs for row in pack]
        index = torch.tensor(states, dtype=torch.long, device=device)
        return Chunk(rows, torch.tensor(ids, device=device), torch.tensor(positions, device=device), mask, index)


def _padded(lengths: Sequence[int], budget: int) -> int:
    """Tokens that length-sorted chunks have, padding counted."""
    return sum(len(chunk) * lengths[chunk[0]] for chunk in plan_chunks(lengths, budget))
