"""Responses that share prefixes: who branched off whom and where, and the nodes that this makes (ROSE card, 2.4).

A node is a prefix of a response, known by its lineage: the row that owns it and its length. The prefix of length ``k``
of a row belongs to the row's parent as long as ``k`` is at most the row's branch, and so on upwards; the empty prefix
is one node for the whole group, whatever the number of its trees. Equal tokens do not make prefixes one node; where
they should, :meth:`Forest.merged` gives the lineage of the token trie.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Forest:
    """Lineage of ``B`` responses; every tensor is Long ``(B,)``. Rows and groups may stand in any order.

    Args:
        parents: Row that the response branched off, of the same group; -1 for one drawn from the prompt.
        branches: Length in tokens of the prefix that it took over; 0 for those without a parent. A response that
            branched at 0 shares nothing but the prompt.
        lengths: Tokens of the response with the prefix, the end token counted.
        group_ids: Equal ids belong to one prompt.

    Attributes:
        groups: Number of each row's group, from 0, Long ``(B,)``.
        members: Rows of each group in ascending order, Long ``(groups, G)``, -1 behind the last.

    Raises:
        ValueError: Tensors of another kind or shape, and rows that cannot be; the message names the first.
    """

    parents: Tensor
    branches: Tensor
    lengths: Tensor
    group_ids: Tensor
    groups: Tensor = field(init=False, repr=False)
    members: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("parents", "branches", "lengths", "group_ids")}
        for name, tensor in given.items():
            if tensor.dtype != torch.long or tensor.shape != (len(self.parents),):
                raise ValueError(
                    f"{name} must be Long and as long as parents ({self.parents.numel()}), "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        _refuse(self.lengths < 0, "a length is at least 0", self.lengths)
        _refuse((self.parents < -1) | (self.parents >= len(self)), "a parent is a row, or -1", self.parents)
        root, parents = self.parents < 0, self.parents.clamp(min=0)
        _refuse(~root & (self.group_ids[parents] != self.group_ids), "a parent is of the same group", self.parents)
        _refuse(root & (self.branches != 0), "without a parent the branch is 0", self.branches)
        most = torch.where(root, 0, torch.minimum(self.lengths[parents], self.lengths))
        outside = (self.branches < 0) | (self.branches > most)
        _refuse(outside, "a branch lies within the parent and the response", self.branches)
        groups, members = _grouped(self.group_ids)
        ancestors = self.parents
        for _ in range(members.shape[1]):
            ancestors = torch.where(ancestors < 0, -1, self.parents[ancestors.clamp(min=0)])
        _refuse(ancestors >= 0, "parents must not lead in a circle", self.parents)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "members", members)

    def __len__(self) -> int:
        return len(self.parents)

    @classmethod
    def independent(cls, lengths: Tensor, group_ids: Tensor) -> "Forest":
        """Responses that were all drawn from their prompts; Long ``(B,)`` each."""
        return cls(torch.full_like(lengths, -1), torch.zeros_like(lengths), lengths, group_ids)

    @classmethod
    def concatenate(cls, forests: Sequence["Forest"]) -> "Forest":
        """One after another. Equal group ids of different forests become one group, as they name one prompt."""
        if not forests:
            raise ValueError("need at least one forest, got none")
        parents, first = [], 0
        for forest in forests:
            parents.append(torch.where(forest.parents < 0, -1, forest.parents + first))
            first += len(forest)
        rest = (
            torch.cat([getattr(forest, name) for forest in forests]) for name in ("branches", "lengths", "group_ids")
        )
        return cls(torch.cat(parents), *rest)

    def take(self, rows: Tensor) -> "Forest":
        """These rows in this order, Long ``(N,)``, each at most once.

        Raises:
            ValueError: A row whose parent is not among them, or one that is there twice.
        """
        places = torch.full_like(self.parents, -1)
        places[rows] = torch.arange(len(rows), device=rows.device)
        twice = places[rows] != torch.arange(len(rows), device=rows.device)
        if twice.any():
            raise ValueError(f"a row can be taken once, got row {int(rows[twice][0])} twice")
        parents = self.parents[rows]
        found = torch.where(parents < 0, -1, places[parents.clamp(min=0)])
        missing = (parents >= 0) & (found < 0)
        if missing.any():
            row = int(rows[missing][0])
            raise ValueError(f"a row needs its parent, got row {row} without row {int(self.parents[row])}")
        return Forest(found, self.branches[rows], self.lengths[rows], self.group_ids[rows])

    def merged(self, responses: Tensor) -> "Forest":
        """The lineage of the token trie of each group, in which equal prefixes are one node whoever drew them.

        Args:
            responses: Token ids, Long ``(B, T)``; what stands behind a response's length does not count.
        """
        width = responses.shape[1]
        inside = torch.arange(width, device=responses.device) < self.lengths[:, None]
        tokens = torch.cat([self.groups[:, None], torch.where(inside, responses, -1)], dim=1)
        order = tokens.unique(dim=0, return_inverse=True)[1].argsort(stable=True)  # sorted by group, then by tokens
        before, after = order[:-1], order[1:]
        unequal = tokens[after] != tokens[before]
        first = torch.where(unequal.any(1), unequal.byte().argmax(1), width + 1) - 1  # -1: another group
        shared = torch.minimum(first, torch.minimum(self.lengths[before], self.lengths[after]))
        parents, branches = torch.full_like(self.parents, -1), torch.zeros_like(self.branches)
        parents[after] = torch.where(shared > 0, before, -1)
        branches[after] = shared.clamp(min=0)
        return Forest(parents, branches, self.lengths, self.group_ids)

    def owners(self, rows: Tensor, prefix_lengths: Tensor) -> Tensor:
        """Row that owns each prefix, Long; the first row of the group for the empty prefix.

        Args:
            rows: Long ``(...)``.
            prefix_lengths: Long ``(...)``, at most the rows' lengths.
        """
        rows, prefix_lengths = torch.broadcast_tensors(rows, prefix_lengths)
        found = rows
        while (up := (self.parents[found] >= 0) & (prefix_lengths <= self.branches[found])).any():
            found = torch.where(up, self.parents[found], found)
        return torch.where(prefix_lengths == 0, self.members[self.groups[rows], 0], found)

    def trees(self) -> Tensor:
        """Root row of each row's tree, Long ``(B,)``; a response that branched at 0 is a root itself."""
        return self.owners(torch.arange(len(self), device=self.parents.device), torch.ones_like(self.parents))

    def passes(self, rows: Tensor, prefix_lengths: Tensor) -> Tensor:
        """Which responses of the group have the node on their path: bool ``(N, G)``, in the order of ``members``.

        Args:
            rows: Any row on whose path each node lies, Long ``(N,)``.
            prefix_lengths: Its prefix length, Long ``(N,)``.
        """
        members = self.members[self.groups[rows]]
        others, length = members.clamp(min=0), prefix_lengths[:, None]
        same = self.owners(others, length) == self.owners(rows, prefix_lengths)[:, None]
        return same & (members >= 0) & (length <= self.lengths[others])

    def leaves(self, row: int, prefix_length: int) -> Tensor:
        """Rows whose path contains the node, ascending (Omega of the card)."""
        rows, lengths = (self.parents.new_tensor([value]) for value in (row, prefix_length))
        return self.members[self.groups[row]][self.passes(rows, lengths)[0]]

    def deepest_common(self, rows: Tensor, others: Tensor) -> Tensor:
        """Prefix length of the deepest node that two rows share, Long ``(N,)``; 0 in different trees and groups.

        Args:
            rows: Long ``(N,)``.
            others: Long ``(N,)``.
        """
        found = torch.zeros_like(rows)
        reached, row = self.lengths[rows], rows
        while (row >= 0).any():
            limit, other = self.lengths[others], others
            while (other >= 0).any():
                met = (row == other) & (row >= 0)
                found = torch.where(met, torch.maximum(found, torch.minimum(reached, limit)), found)
                limit, other = self._up(limit, other)
            reached, row = self._up(reached, row)
        return found

    def _up(self, limits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The parents, -1 above the roots, and how much of the way's start they have in common."""
        below = rows.clamp(min=0)
        return torch.minimum(limits, self.branches[below]), torch.where(rows < 0, -1, self.parents[below])


def _refuse(wrong: Tensor, requirement: str, values: Tensor) -> None:
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{requirement}, got {int(values[row])} in row {row}")


def _grouped(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each row's group, and the rows of each group."""
    names, groups = group_ids.unique(return_inverse=True)
    counts = groups.bincount(minlength=len(names))
    order = groups.argsort(stable=True)
    places = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[groups[order]]
    members = torch.full((len(names), int(counts.max()) if len(names) else 1), -1, device=order.device)
    members[groups[order], places] = order
    return groups, members
