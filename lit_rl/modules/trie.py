"""A prompt with the responses of its group behind it, each distinct prefix of tokens once if wanted.

Responses that branched from one another share tokens. A node of their trie is a token after a certain prefix: its state
needs to be read once, and its log-probability to be computed once, however many responses go through it. Nodes stand in
the order of a walk through the trie, so that what goes on from a node is a stretch behind it: a token sees itself and
what stands before it and has not ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


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
    lengths = np.array([len(responses[row]) for row in rows])[:, None]
    count, width = len(rows), max(1, int(lengths.max()))
    tokens = np.full((count, width), -1)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(responses[row])] = responses[row]
    steps, order = np.arange(width), np.arange(count)[:, None]
    known = np.zeros((count, 1), dtype=int)  # tokens that a response shares with the one above it
    if merge:
        same = (tokens[1:] == tokens[:-1]) & (steps < lengths[1:])
        known[1:, 0] = np.logical_and.accumulate(same, axis=1).sum(1)
    apart, inside = steps >= known, steps < lengths
    owner = np.maximum.accumulate(np.where(apart, order, 0), axis=0)  # the first response that goes through this node
    new = apart & inside
    number = np.take_along_axis((new.cumsum() - 1).reshape(count, width), owner, axis=0)
    read = np.zeros(int(new.sum()), dtype=bool)
    read[number[steps < lengths - 1]] = True
    place = len(prompt) - 1 + read.cumsum()
    before = np.full((count, width), len(prompt) - 1)
    before[:, 1:] = place[number[:, :-1]] if len(place) else 0
    own = np.zeros_like(new)  # what stands in the row, at the response that owns it
    own[new] = read
    starts = len(prompt) + np.concatenate([[0], own.sum(1).cumsum()])
    later = np.full((count, width), count)
    later[:-1] = np.where(apart, order, count)[1:]
    last = np.minimum.accumulate(later[::-1], axis=0)[::-1]  # the next response that does not go through this node
    positions = np.broadcast_to(len(prompt) + steps, own.shape)[own]
    return Tree(
        rows,
        torch.from_numpy(np.concatenate([np.asarray(prompt, dtype=int), tokens[own]])),
        torch.from_numpy(np.concatenate([np.arange(len(prompt)), positions])),
        torch.from_numpy(np.concatenate([np.full(len(prompt), starts[-1]), starts[last[own]]])),
        torch.from_numpy(before[inside]),
        Nodes(torch.from_numpy(new[inside].nonzero()[0]), torch.from_numpy(number[inside])),
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
