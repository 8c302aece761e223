"""Statistics of scores that share a number: those of a prompt, of a tree, of a node."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Statistics of each row's group, ``(B,)`` each; ``equal`` says that all its scores are the same."""

    mean: Tensor
    std: Tensor
    size: Tensor
    equal: Tensor


def group_statistics(scores: Tensor, group_ids: Tensor) -> Groups:
    """Mean, unbiased standard deviation and size of each row's group; a group of one has mean 0 and deviation 1."""
    scores = scores.float()
    _, group = group_ids.unique(return_inverse=True)
    size = int(group.max()) + 1 if len(group) else 0

    def total(values: Tensor) -> Tensor:
        return torch.zeros(size, device=values.device).index_add(0, group, values)[group]

    count = total(torch.ones_like(scores))
    alone = count == 1
    mean = torch.where(alone, 0.0, total(scores) / count)
    variance = total((scores - mean).square()) / (count - 1).clamp(min=1)
    most, least = (values[group] for values in _extremes(scores, group, size))
    return Groups(mean, torch.where(alone, 1.0, variance.sqrt()), count, (most == least) & ~alone)


def centred(scores: Tensor, groups: Groups) -> Tensor:
    """Scores minus their group's mean; exactly 0 where all are equal, whatever the rounding of the mean."""
    return torch.where(groups.equal, 0.0, scores.float() - groups.mean)


def leave_one_out(scores: Tensor, group_ids: Tensor) -> Tensor:
    """``r - mean of the others in the group``, ``(B,)``; a group of one keeps its score."""
    groups = group_statistics(scores, group_ids)
    return centred(scores, groups) * (groups.size / (groups.size - 1).clamp(min=1))


def means(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Mean of the values with each number, float32 ``(size,)``; exactly the value where all are equal, 0 without any.

    Args:
        values: ``(N,)``.
        index: Long ``(N,)``, below ``size``.
        size: How many numbers there are.
    """
    values = values.float()
    zeros = torch.zeros(size, device=values.device)
    count = zeros.index_add(0, index, torch.ones_like(values))
    most, least = _extremes(values, index, size)
    return torch.where(most == least, most, zeros.index_add(0, index, values) / count.clamp(min=1))


def _extremes(values: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Largest and least value with each number; 0 without any."""
    zeros = torch.zeros(size, device=values.device)
    most, least = (zeros.scatter_reduce(0, index, values, how, include_self=False) for how in ("amax", "amin"))
    return most, least
