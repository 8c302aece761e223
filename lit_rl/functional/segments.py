"""Responses cut at the nodes on their paths, and values of those nodes (ROSE card, 2.4)."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_rl.functional.forest import Forest
from lit_rl.functional.groups import means


class Segments(NamedTuple):
    """The nodes on the path of each response: the prompt, those where a response of the group branched off, the leaf.

    Column 0 is the prompt; a segment is the step from a column to the next. The leaf is the response's alone, also
    where another branched off its end. Behind the leaf a row repeats it, so that these segments have no tokens.

    Attributes:
        cuts: Prefix lengths, ascending from 0 to the response's length, Long ``(B, G + 1)``.
        nodes: Numbers of the nodes, Long ``(B, G + 1)``.
        valid: Bool ``(B, G + 1)``, True = a node of the path.
        rows: With ``through``, every pair of a response and a node that its path contains, Long ``(P,)``.
        through: See ``rows``.
        total: How many nodes there are in all.
    """

    cuts: Tensor
    nodes: Tensor
    valid: Tensor
    rows: Tensor
    through: Tensor
    total: int

    def values(self, rewards: Tensor) -> Tensor:
        """Mean reward of the responses through each node: float32 ``(total,)`` from ``(B,)``."""
        return means(rewards[self.rows], self.through, self.total)

    def sizes(self) -> Tensor:
        """Responses through each node, Long ``(total,)``."""
        return self.through.bincount(minlength=self.total)

    def parents(self) -> Tensor:
        """Node before each node, Long ``(total,)``; -1 for the prompts and for nodes that end only shorter paths."""
        found = torch.full((self.total,), -1, device=self.nodes.device)
        inside = self.valid[:, 1:]
        found[self.nodes[:, 1:][inside]] = self.nodes[:, :-1][inside]
        return found

    def depths(self) -> Tensor:
        """How many nodes lie before each node, Long ``(total,)``; -1 where it is on no row's path."""
        found = torch.full((self.total,), -1, device=self.nodes.device)
        columns = torch.arange(self.nodes.shape[1], device=self.nodes.device).expand_as(self.nodes)
        found[self.nodes[self.valid]] = columns[self.valid]
        return found

    def by_token(self, values: Tensor, mask: Tensor) -> Tensor:
        """Give every token the value of its segment: ``(B, T)`` from ``(B, G)``, see :func:`by_token`."""
        return by_token(values, self.cuts, mask)


def by_token(values: Tensor, cuts: Tensor, mask: Tensor) -> Tensor:
    """Give every token the value of its segment, and 0 where the mask is False: ``(B, T)``, without ``(B, S, T)``.

    Args:
        values: ``(B, S)``.
        cuts: Where segments start and end, ascending from 0 to the response's length, Long ``(B, S + 1)``.
        mask: Bool ``(B, T)``.

    Raises:
        ValueError: A mask of another number of rows, or narrower than the longest response.
    """
    rows, width = mask.shape
    longest = int(cuts.max()) if len(cuts) else 0
    if rows != len(cuts) or width < longest:
        raise ValueError(f"need a mask of {len(cuts)} rows and {longest} tokens, got {tuple(mask.shape)}")
    repeats = torch.cat([cuts.diff(dim=1), width - cuts[:, -1:]], dim=1)
    padded = torch.nn.functional.pad(values, (0, 1))
    tokens = padded.flatten().repeat_interleave(repeats.flatten(), output_size=rows * width)
    return tokens.view(rows, width).masked_fill_(~mask, 0.0)


def segments(forest: Forest) -> Segments:
    """Cut every response where some response of its group branched off its path, by lineage.

    Responses that branched off one node, or off a child exactly at the child's own branch, make one cut.
    """
    device = forest.parents.device
    every = torch.arange(len(forest), device=device)
    owners, first, number = _branch_nodes(forest)
    members = forest.members[forest.groups]  # (B, G): the candidates of each row are its group's
    safe = members.clamp(min=0)
    made = (members >= 0) & first[safe]
    depths = torch.where(made, forest.branches[safe], 1)
    through = made & (forest.owners(every[:, None], depths) == owners[safe])
    inner = through & (depths < forest.lengths[:, None])
    groups, rows = len(forest.members), len(forest)  # the nodes: prompts, then leaves, then where responses branched
    leaves = (groups + every)[:, None]
    cuts, order = torch.where(inner, depths, forest.lengths[:, None]).sort(dim=1, stable=True)
    nodes = torch.where(inner, groups + rows + number[safe], leaves).gather(1, order)
    cuts, nodes = (
        torch.cat([start[:, None], rest], dim=1)
        for start, rest in ((torch.zeros_like(forest.lengths), cuts), (forest.groups, nodes))
    )
    valid = torch.arange(cuts.shape[1], device=device) <= inner.sum(1, keepdim=True) + 1
    pairs = through.nonzero()
    at = groups + rows + number[safe[pairs[:, 0], pairs[:, 1]]]
    total = groups + rows + int(first.sum())
    every_pair = torch.cat([every, every, pairs[:, 0]]), torch.cat([forest.groups, leaves[:, 0], at])
    return Segments(cuts, nodes, valid, *every_pair, total)


def _branch_nodes(forest: Forest) -> tuple[Tensor, Tensor, Tensor]:
    """Of the node at which each row branched: its owner, whether no row before branched there, and its number."""
    branched = forest.branches > 0
    owners = forest.owners(torch.where(branched, forest.parents, 0), forest.branches)
    rows = branched.nonzero()[:, 0]
    names, inverse = (forest.branches * len(forest) + owners)[rows].unique(return_inverse=True)
    number = torch.zeros_like(owners)
    number[rows] = inverse
    lowest = torch.full((len(names),), len(forest), device=rows.device).scatter_reduce(0, inverse, rows, "amin")
    first = torch.zeros_like(branched)
    first[lowest] = True
    return owners, first, number
