"""A prompt with the responses of its group behind it, each distinct prefix of tokens once if wanted.

Responses that branched from one another share tokens. A node of their trie is a token after a certain prefix: its state
needs to be read once, and its log-probability to be computed once, however many responses go through it. Nodes stand in
the order of a walk through the trie, so that what goes on from a node is a stretch behind it: a token sees itself and
what stands before it and has not ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Nodes(NamedTuple):
    """Which response tokens are the same node of a trie.

    ``first`` is one response token of each node, Long ``(M,)``; ``number`` the node of each token, Long ``(N,)``.
    """

    first: Tensor
    number: Tensor


@dataclass
class Tree:
    """A prompt and responses as one row of ``L`` tokens, on the host.

    Args:
        rows: Responses, in the order in which their ``N`` tokens come out.
        input_ids: Long ``(L,)``.
        positions: Long ``(L,)``, distance from the start of the prompt.
        ends: Where what follows from a token ends, Long ``(L,)``: from there on nothing sees it.
        states: Where the state before each response token stands, Long ``(N,)``.
        nodes: Of the response tokens.
    """

    rows: list[int]
    input_ids: Tensor
    positions: Tensor
    ends: Tensor
    states: Tensor
    nodes: Nodes

    def __len__(self) -> int:
        return len(self.input_ids)


def grow(prompt: Sequence[int], responses: Mapping[int, Sequence[int]], merge: bool) -> Tree:
    """Lay out a prompt and its responses.

    A token that no response goes on from predicts nothing and is left out.

    Args:
        prompt: Token ids, at least one.
        responses: Token ids by row.
        merge: Read the prefixes that responses share once; else each response is a branch of its own.
    """
    rows = sorted(responses, key=lambda row: list(responses[row])) if merge else list(responses)
    lengths = torch.tensor([len(responses[row]) for row in rows])[:, None]
    texts = [torch.tensor(responses[row], dtype=torch.long) for row in rows]
    tokens = pad_sequence(texts, batch_first=True, padding_value=-1)
    count, width = tokens.shape
    steps, order = torch.arange(width), torch.arange(count)[:, None]
    known = torch.zeros(count, 1, dtype=torch.long)  # tokens that a response shares with the one above it
    if merge:
        same = (tokens[1:] == tokens[:-1]) & (steps < lengths[1:])
        known[1:, 0] = same.cumprod(1).sum(1)
    apart = steps >= known
    owner = torch.where(apart, order, 0).cummax(0).values  # the first response that goes through this node
    new = apart & (steps < lengths)
    number = (new.flatten().cumsum(0) - 1).view(count, width).gather(0, owner)
    read = torch.zeros(int(new.sum()), dtype=torch.bool)
    read[number[steps < lengths - 1]] = True
    place = len(prompt) - 1 + read.cumsum(0)
    before = place[number].roll(1, 1)
    before[:, :1] = len(prompt) - 1
    own = torch.zeros_like(new).masked_scatter(new, read)  # what stands in the row, at the response that owns it
    starts = len(prompt) + torch.cat([torch.zeros(1, dtype=torch.long), own.sum(1).cumsum(0)])
    later = torch.cat([torch.where(apart, order, count)[1:], torch.full((1, width), count)])
    last = later.flip(0).cummin(0).values.flip(0)  # the next response that does not go through this node
    return Tree(
        rows,
        torch.cat([torch.tensor(prompt, dtype=torch.long), tokens[own]]),
        torch.cat([torch.arange(len(prompt)), len(prompt) + steps.expand(count, -1)[own]]),
        torch.cat([starts[-1].expand(len(prompt)), starts[last[own]]]),
        before[steps < lengths],
        Nodes(new[steps < lengths].nonzero().squeeze(1), number[steps < lengths]),
    )


def join(parts: Sequence[Nodes]) -> Nodes | None:
    """Nodes of several trees whose response tokens stand one after the other; None where every token is its own."""
    tokens = nodes = 0
    firsts, numbers = [], []
    for part in parts:
        firsts.append(part.first + tokens)
        numbers.append(part.number + nodes)
        tokens, nodes = tokens + len(part.number), nodes + len(part.first)
    return None if tokens == nodes else Nodes(torch.cat(firsts), torch.cat(numbers))
