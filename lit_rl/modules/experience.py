"""What an update learns from: responses with everything that stays fixed while the weights change."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lit_core.samplers import permutation
from lit_core.sharding import gather_objects
from lit_rl.functional.masking import Reduce
from lit_rl.modules.layout import Sequences


@dataclass
class Experience:
    """A batch of responses, a row each; all tensors ``(B, T)`` and 0 outside the mask.

    Args:
        sequences: Token ids of prompts and responses.
        responses: Long, padded on the right.
        mask: Bool, True = a token that the policy chose.
        old_log_probs: Under the weights that drew them.
        advantages: Whitened or scaled as the method says.
        returns: What the value function should give; None without one.
        values: What it gave.
        reference_log_probs: Under the frozen weights; None without a divergence.
        weights: Importance weights of the tokens; None without a correction.
        domains: Domain of each row; empty where they do not matter.
    """

    sequences: Sequences
    responses: Tensor
    mask: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    returns: Tensor | None = None
    values: Tensor | None = None
    reference_log_probs: Tensor | None = None
    weights: Tensor | None = None
    domains: Sequence[str] = ()


def deal_groups(sequences: Sequences, mini_batches: int, *seed_parts: int) -> list[list[int]]:
    """Deal whole groups out to mini-batches in random order.

    Args:
        sequences: Knows the groups.
        mini_batches: How many; fewer groups than that give one mini-batch a group.
        *seed_parts: The order depends on these alone.

    Returns:
        Rows of each mini-batch.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(sequences.groups):
        members.setdefault(group, []).append(row)
    groups = list(members.values())
    order = permutation(len(groups), *seed_parts)
    count = min(mini_batches, len(groups))
    bounds = [len(groups) * number // count for number in range(count + 1)]
    return [[row for place in order[start:end] for row in groups[place]] for start, end in pairwise(bounds)]


class Totals:
    """Sums of logged quantities over micro-batches, mini-batches and ranks.

    Args:
        device: Where they are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.largest: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values to a mean: those that a mask marks, or all."""
        values = values.detach().float()
        kept = values if mask is None else torch.where(mask, values, 0.0)
        count = torch.tensor(float(values.numel()), device=self.device) if mask is None else mask.sum().float()
        self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + kept.sum()
        self.counts[name] = self.counts.get(name, torch.zeros((), device=self.device)) + count

    def add_largest(self, name: str, values: Tensor) -> None:
        """Keep the largest value."""
        if values.numel():
            found = values.detach().float().max()
            self.largest[name] = torch.maximum(self.largest[name], found) if name in self.largest else found

    def means(self, reduce: Reduce) -> dict[str, Tensor]:
        """Means over everything on all ranks; largest values are those of this rank."""
        names = sorted(set[str]().union(*gather_objects(list(self.sums))))  # a rank may have read nothing
        if not names:
            return dict(self.largest)
        none = torch.zeros((), device=self.device)
        pairs = [torch.stack([self.sums.get(name, none), self.counts.get(name, none)]) for name in names]
        both = reduce(torch.stack(pairs))
        return {name: pair[0] / pair[1].clamp(min=1) for name, pair in zip(names, both, strict=True)} | self.largest


def rows_of(tensor: Tensor | None, rows: Sequence[int]) -> Tensor | None:
    """Some rows of a tensor, or None."""
    return None if tensor is None else tensor[torch.tensor(list(rows), dtype=torch.long, device=tensor.device)]
