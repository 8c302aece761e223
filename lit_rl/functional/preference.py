"""Learning which of two replies is preferred, and how often a score says so."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centre: float = 0.0) -> Tensor:
    """Negative log-likelihood of the preferences under the Bradley-Terry model.

    With a margin it is that of Llama 2 (arXiv 2307.09288, eq. 2). The penalty ``centre * mean((chosen + rejected)^2)``
    keeps rewards around zero, which the likelihood leaves open (Eisenstein et al., arXiv 2312.09244).

    Args:
        chosen: Rewards ``(B,)`` of the preferred replies.
        rejected: Rewards ``(B,)`` of the others.
        margin: ``(B,)``, by how much the reward of the preferred reply should be larger; None is 0.
        centre: Weight of the penalty; 0 leaves it out.

    Returns:
        Mean over the pairs in nats, shape ``()``, float32; 0 for no pairs.

    Raises:
        ValueError: The tensors are not of one shape ``(B,)``.
    """
    chosen, rejected = _pairs(chosen, rejected)
    difference = chosen - rejected
    if margin is not None:
        if margin.shape != chosen.shape:
            raise ValueError(f"need one margin a pair, got {tuple(margin.shape)} for {tuple(chosen.shape)}")
        difference = difference - margin.float()
    losses = -F.logsigmoid(difference) + centre * (chosen + rejected).square()
    return losses.sum() / max(len(losses), 1)


def pairwise_outcomes(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Say for each pair whether the preferred reply has the higher reward: 1, 0, or half for equal rewards.

    Args:
        chosen: Rewards ``(B,)`` of the preferred replies.
        rejected: Rewards ``(B,)`` of the others.

    Returns:
        Float32 ``(B,)``, without gradient.
    """
    chosen, rejected = _pairs(chosen.detach(), rejected.detach())
    return (torch.sign(chosen - rejected) + 1) / 2


def pairwise_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs whose preferred reply has the higher reward, equal rewards counted half; shape ``()``, float32.

    A score that is constant, or that has nothing to do with the preference, has 1/2. No pairs give 0.
    """
    outcomes = pairwise_outcomes(chosen, rejected)
    return outcomes.sum() / max(len(outcomes), 1)


def _pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    if chosen.ndim != 1 or chosen.shape != rejected.shape:
        raise ValueError(f"need two rewards a pair, each (B,), got {tuple(chosen.shape)} and {tuple(rejected.shape)}")
    return chosen.float(), rejected.float()
