"""Some of the responses of each prompt."""

import torch
from torch import Tensor

from lit_rl.functional.forest import Forest

CORRECT = 0.5  # rewards above are right


def selected(forest: Forest, rewards: Tensor, count: int, seed: int) -> Tensor:
    """Draw responses of each group at random, with a correct one among them where there is one: bool ``(B,)``.

    Args:
        forest: Knows the groups.
        rewards: ``(B,)``.
        count: Most responses of a group.
        seed: The draw depends on it alone.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(forest), generator=generator).to(rewards.device)
    members = forest.members
    inside, rows = members >= 0, members.clamp(min=0)
    right = torch.where(inside & (rewards[rows] > CORRECT), order[rows], torch.inf)
    first = right.argmin(1)
    keys = torch.where(inside, order[rows], torch.inf)
    some = right.amin(1).isfinite()
    keys[some, first[some]] = -1.0
    chosen = keys.argsort(1)[:, :count]
    kept = torch.zeros_like(inside).scatter(1, chosen, True) & inside
    found = torch.zeros(len(forest), dtype=torch.bool, device=rewards.device)
    found[rows[kept]] = True
    return found
