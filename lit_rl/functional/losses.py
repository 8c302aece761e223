"""Policy, value and divergence losses by token, and how they become one number (rl_core card, sections 4 to 9).

Tensors are ``(B, T)``: a row a response, right-padded; masks are boolean, True = a token that the policy chose.
Log-probabilities are those at the training temperature, in nats. Everything is computed in float32.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_rl.functional.masking import Reduce, identity

Reduction = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm"]
Divergence = Literal["k1", "k2", "k3", "k3_st"]
RatioLevel = Literal["token", "sequence_mean", "sequence_sum"]
WeightLevel = Literal["token", "sequence", "sequence_mean"]
LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: far beyond any clip range, far below infinity
DIVERGENCE_LIMIT = 10.0  # nats a token, as verl and OpenRLHF clamp


class PolicyLoss(NamedTuple):
    """Loss of each token ``(B, T)`` and which ones the clip range or the dual clip holds (bool ``(B, T)``)."""

    losses: Tensor
    clipped: Tensor
    dual_clipped: Tensor


class ValueLoss(NamedTuple):
    """Loss of each token ``(B, T)`` and which ones are clipped (bool ``(B, T)``)."""

    losses: Tensor
    clipped: Tensor


def log_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, level: RatioLevel = "token") -> Tensor:
    """Log of the probability ratio of the new to the old policy, clamped to +-20, float32 ``(B, T)``.

    Args:
        log_probs: Of the policy in training.
        old_log_probs: Of the policy that is compared with.
        mask: Bool ``(B, T)``; elsewhere the result is 0.
        level: Of each token; of the sequence by its mean over tokens (GSPO) or its sum (TRL's RLOO), at all tokens.
    """
    difference = torch.where(mask, log_probs.float() - old_log_probs.float(), 0.0)
    if level != "token":
        total = difference.sum(1, keepdim=True)
        total = total / mask.sum(1, keepdim=True).clamp(min=1) if level == "sequence_mean" else total
        difference = torch.where(mask, total, 0.0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    level: RatioLevel = "token",
) -> PolicyLoss:
    """Clipped surrogate of PPO: ``max(-A rho, -A clip(rho, 1 - low, 1 + high))``.

    Args:
        log_probs: Of the policy in training.
        old_log_probs: Of the policy that drew the tokens, detached.
        advantages: ``(B, T)``.
        mask: Bool ``(B, T)``.
        clip_low: Lower range.
        clip_high: Upper range; by default as the lower (DAPO's clip-higher: 0.28).
        dual_clip: Where the advantage is negative, the loss is at most ``-A`` times this (above 1).
        level: See :func:`log_ratio`.

    Raises:
        ValueError: A range that is none.
    """
    high = clip_low if clip_high is None else clip_high
    if clip_low < 0 or high < 0 or (dual_clip is not None and dual_clip <= 1):
        raise ValueError(f"clip ranges must be at least 0 and the dual clip above 1: {clip_low}, {high}, {dual_clip}")
    ratio = log_ratio(log_probs, old_log_probs, mask, level).exp()
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip_low, 1 + high)
    losses, clipped = torch.maximum(free, held), (held > free) & mask
    dual_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (losses > bound) & mask
        losses = torch.where(dual_clipped, bound, losses)
    return PolicyLoss(torch.where(mask, losses, 0.0), clipped, dual_clipped)


def reinforce_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """``-A log pi`` of each token ``(B, T)``, without a ratio."""
    return torch.where(mask, -advantages * log_probs.float(), 0.0)


def loss_denominator(
    mask: Tensor, reduction: Reduction = "token_mean", constant: float | None = None, reduce: Reduce = identity
) -> Tensor:
    """What :func:`aggregate` divides by, counted over all that one optimizer step sees, on all ranks.

    Args:
        mask: Bool ``(B, T)`` of the whole mini-batch, all its micro-batches together.
        reduction: See :func:`aggregate`.
        constant: The divisor of ``const_norm``.
        reduce: Sums over ranks.

    Raises:
        ValueError: ``const_norm`` without a constant.
    """
    if reduction == "const_norm":
        if constant is None or constant <= 0:
            raise ValueError(f"const_norm needs a constant above 0, such as the longest response, got {constant}")
        return torch.tensor(float(constant), device=mask.device)
    count = mask.sum() if reduction == "token_mean" else mask.any(1).sum()
    return reduce(count.float()).clamp(min=1)


def aggregate(losses: Tensor, mask: Tensor, denominator: Tensor, reduction: Reduction = "token_mean") -> Tensor:
    """One number from the losses of tokens; those of micro-batches add up to that of the whole.

    Args:
        losses: ``(B, T)``, of a part of the mini-batch.
        mask: Bool ``(B, T)``.
        denominator: From :func:`loss_denominator`, over the whole mini-batch.
        reduction: ``token_mean`` the mean over tokens; ``seq_mean_token_mean`` the mean over responses of their means
            (GRPO); ``seq_mean_token_sum`` the mean over responses of their sums; ``const_norm`` the sum divided by a
            constant (Dr. GRPO). Responses without a token do not count.

    Returns:
        Float32 ``()``.
    """
    counted = torch.where(mask, losses.float(), 0.0)
    if reduction == "seq_mean_token_mean":
        counted = counted / mask.sum(1, keepdim=True).clamp(min=1)
    return counted.sum() / denominator


def divergence(log_probs: Tensor, reference_log_probs: Tensor, kind: Divergence = "k3") -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token ``(B, T)``, in nats (Schulman 2020), clamped to +-10.

    In the reward any of them serves. As a loss on samples of the policy, k1 has no gradient on average, k2 that of
    KL(policy || reference), and k3 that of KL(reference || policy); ``k3_st`` has k3's value and k2's gradient.

    Args:
        log_probs: Of the policy.
        reference_log_probs: Of the reference.
        kind: k1 ``d``, k2 ``d^2 / 2``, k3 ``exp(-d) - 1 + d``, with ``d`` the difference of the log-probabilities.
    """
    difference = log_probs.float() - reference_log_probs.float()
    if kind == "k1":
        return difference.clamp(-DIVERGENCE_LIMIT, DIVERGENCE_LIMIT)
    squared = (difference.square() / 2).clamp(max=DIVERGENCE_LIMIT)
    if kind == "k2":
        return squared
    bounded = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    value = ((-bounded).exp() - 1 + bounded).clamp(-DIVERGENCE_LIMIT, DIVERGENCE_LIMIT)
    return value if kind == "k3" else squared + (value - squared).detach()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = None
) -> ValueLoss:
    """Half the squared error of each token; clipped, the larger one of it and that of the value held near the old one.

    Args:
        values: Predicted now ``(B, T)``.
        old_values: Predicted at the rollout.
        returns: What they should be; no gradient flows into them.
        mask: Bool ``(B, T)``.
        clip: How far a value may move from the old one; None does not hold it.
    """
    returns, values = returns.detach().float(), values.float()
    free = (values - returns).square()
    if clip is None:
        return ValueLoss(torch.where(mask, free / 2, 0.0), torch.zeros_like(mask))
    held = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return ValueLoss(torch.where(mask, torch.maximum(free, held) / 2, 0.0), (held > free) & mask)


def importance_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    level: WeightLevel = "token",
    how: Literal["truncate", "mask"] = "truncate",
    high: float = 2.0,
    low: float | None = None,
) -> Tensor:
    """Weights that correct for an engine whose probabilities differ from the trainer's, detached, float32 ``(B, T)``.

    Args:
        old_log_probs: Of the trainer's weights at the rollout.
        rollout_log_probs: Of the engine that drew the tokens.
        mask: Bool ``(B, T)``; elsewhere the weight is 0.
        level: Of each token, of the whole sequence (product), or its geometric mean.
        how: Hold weights within the bounds, or drop what lies outside.
        high: Upper bound.
        low: Lower bound, if any.
    """
    ratio_level: dict[WeightLevel, RatioLevel] = {
        "token": "token", "sequence": "sequence_sum", "sequence_mean": "sequence_mean",
    }  # fmt: skip
    weights = log_ratio(old_log_probs.detach(), rollout_log_probs.detach(), mask, ratio_level[level]).exp()
    if how == "truncate":
        weights = weights.clamp(min=low, max=high)
    else:
        inside = weights <= high if low is None else (weights <= high) & (weights >= low)
        weights = torch.where(inside, weights, 0.0)
    return torch.where(mask, weights, 0.0)


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, factor: float = 1.0) -> Tensor:
    """DAPO's penalty ``(B,)``: 0 up to ``longest - buffer`` tokens, then down to ``-factor`` at ``longest``."""
    return (-(lengths - (longest - buffer)) / buffer * factor).clamp(max=0.0)


def adapted_coefficient(coefficient: float, divergence: float, target: float, samples: int, horizon: int) -> float:
    """Next coefficient of the divergence (Ziegler et al. 2019): up where it was above the target, else down."""
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * samples / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - var(returns - values) / var(returns)`` over the tokens that count, ``()``; NaN without variance."""
    error, target = (returns - values)[mask].float(), returns[mask].float()
    return 1 - error.var(correction=0) / target.var(correction=0)
