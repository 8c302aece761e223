"""Training batches: responses in length-sorted chunks, behind a prompt that their group shares, or as a trie behind it.

Only the states before response tokens are wanted. All layouts give the same ones: a chunk of rows padded on the right
under plain causal attention, or a row a group, ``prompt, response 1, response 2, ...``, in which each response sees the
prompt and itself, or such a row with what responses have in common read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_core.sharding import maximum
from lit_core.tokens import plan_chunks, plan_equal_chunks
from lit_rl.modules.trie import Nodes, Tree, grow, join

Layout = Literal["auto", "sorted", "shared", "trie"]
SHARED_GAIN = 0.8  # a shared prompt has to save this much, as its attention needs an explicit mask
TOKEN_PAIRS = 512  # pairs of attention that cost as much as what else is done for a token; 500 to 1,000 in tiny models
SHARED_LENGTH = 4096  # tokens of a row with a shared prompt: the mask is their square


@dataclass
class Chunk:
    """What one forward pass sees.

    Args:
        rows: Responses of the batch, in the order in which their tokens come out; none in an idle chunk, which only
            keeps ranks in step.
        input_ids: Long ``(B, L)``.
        positions: Long ``(B, L)``.
        ends: Place in its row from which on nothing sees a token any more, Long ``(B, L)``; None for plain causal
            attention.
        states: Where in the flattened ``(B * L)`` the state before each response token stands, Long ``(N,)``: all of
            the first row's tokens, then the second's.
        nodes: Which of these tokens follow the same prefix and are the same, so that the head may do one for all; None
            where none do.
    """

    rows: list[int]
    input_ids: Tensor
    positions: Tensor
    ends: Tensor | None
    states: Tensor
    nodes: Nodes | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the model reads, padding counted."""
        return self.input_ids.numel()

    @property
    def mask(self) -> Tensor | None:
        """Bool ``(B, 1, L, L)``, True = may see; None for plain causal attention. Built anew, as it is large."""
        if self.ends is None:
            return None
        places = torch.arange(self.ends.shape[1], device=self.ends.device)
        return ((places <= places[:, None]) & (places[:, None] < self.ends[:, None])).unsqueeze(1)


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
        self,
        rows: Sequence[int],
        budget: int,
        device: torch.device,
        layout: Layout = "auto",
        equal: bool = False,
        spare: int | None = None,
    ) -> list[Chunk]:
        """Cut rows into chunks of at most ``budget`` tokens.

        Args:
            rows: Rows to read, each once; those with an empty response come out with no token.
            budget: Tokens of a chunk, padding counted; a longer row or group is a chunk of its own.
            device: Where the tensors go.
            layout: ``auto`` takes the trie, which without a shared token is ``shared``, or ``sorted``, where the
                trie's longer rows cost more than the tokens that they spare.
            equal: Every rank makes equally many chunks, as sharded models need; these are length-sorted.
            spare: With ``equal`` and no rows, a row for idle chunks, as many as the other ranks have; None where all
                ranks have rows.
        """
        if equal and not rows and spare is not None:
            return [self._idle([spare], device) for _ in range(maximum(0, device))]
        if not rows:
            return []
        if equal:
            lengths = self._lengths(rows)
            plan, idle = plan_equal_chunks(lengths, budget, device)
            chunks = [self._sorted([rows[number] for number in chunk], device) for chunk in plan]
            return chunks + [self._idle([rows[number] for number in chunk], device) for chunk in idle]
        trees = [] if layout == "sorted" else self._trees(rows, merge=layout != "shared")
        if layout == "sorted" or (layout == "auto" and not self._sharing_saves(rows, trees, budget)):
            plan = plan_chunks(self._lengths(rows), budget)
            return [self._sorted([rows[number] for number in chunk], device) for chunk in plan]
        plan = plan_chunks([len(tree) for tree in trees], budget)
        return [_joined([trees[number] for number in chunk], device) for chunk in plan]

    def _lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens that are read of each row: all but the last, which predicts nothing."""
        return [len(self.prompts[row]) + max(len(self.responses[row]) - 1, 0) for row in rows]

    def _trees(self, rows: Sequence[int], merge: bool) -> list[Tree]:
        packs: dict[int, dict[int, Sequence[int]]] = {}
        for row in rows:
            packs.setdefault(self.groups[row], {})[row] = self.responses[row]
        return [grow(self.prompts[next(iter(pack))], pack, merge) for pack in packs.values()]

    def _sharing_saves(self, rows: Sequence[int], trees: Sequence[Tree], budget: int) -> bool:
        lengths = [len(tree) for tree in trees]
        if max(lengths) > SHARED_LENGTH:
            return False
        return _cost(lengths, budget) < SHARED_GAIN * _cost(self._lengths(rows), budget)

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


def _joined(trees: Sequence[Tree], device: torch.device) -> Chunk:
    width = max(map(len, trees))
    ids, positions = (
        pad_sequence(parts, batch_first=True).to(device)
        for parts in ([tree.input_ids for tree in trees], [tree.positions for tree in trees])
    )
    ends = pad_sequence([tree.ends for tree in trees], batch_first=True, padding_value=width).to(device)
    states = torch.cat([tree.states + place * width for place, tree in enumerate(trees)])
    rows = [row for tree in trees for row in tree.rows]
    nodes = join([tree.nodes for tree in trees])
    return Chunk(rows, ids, positions, ends, states.to(device), nodes and Nodes(*(part.to(device) for part in nodes)))


def _cost(lengths: Sequence[int], budget: int) -> float:
    """Of reading length-sorted chunks, padding counted, in tokens."""
    widths = [lengths[chunk[0]] for chunk in plan_chunks(lengths, budget) for _ in chunk]
    return sum(width + width**2 / TOKEN_PAIRS for width in widths)
