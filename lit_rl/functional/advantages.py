"""Rewards by token, returns and advantages (rl_core card, sections 2 and 3).

Tensors are ``(B, T)``: a row a response, right-padded; masks are boolean, True = a token that the policy chose. Masked
positions inside a response (tool output) are skipped: what follows them is carried over. Scores and group ids are
``(B,)``; equal ids belong to one prompt, in any order. Nothing is written in place. The estimators of responses that
share prefixes (``rose`` and others) are written in ``tree_advantages.py`` and ``chain_advantages.py``.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_rl.functional.chain_advantages import fr3e as fr3e
from lit_rl.functional.chain_advantages import spo_chain as spo_chain
from lit_rl.functional.groups import centred, group_statistics, leave_one_out
from lit_rl.functional.masking import Reduce, identity, whiten
from lit_rl.functional.tree_advantages import rose as rose
from lit_rl.functional.tree_advantages import spo_tree as spo_tree
from lit_rl.functional.tree_advantages import tree_grpo as tree_grpo
from lit_rl.functional.tree_advantages import tree_po as tree_po
from lit_rl.functional.tree_advantages import tree_rl as tree_rl

Scale = Literal["group", "batch", "none"]


class Advantages(NamedTuple):
    """Advantages and the returns that a value function is trained on, both ``(B, T)`` and 0 outside the mask."""

    advantages: Tensor
    returns: Tensor


def token_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coefficient: float = 0.0) -> Tensor:
    """Put each score on the last token that counts and subtract the penalty of every token.

    Args:
        scores: ``(B,)``.
        mask: Bool ``(B, T)``; a row without any token gets no reward.
        kl: Per-token divergence from the reference ``(B, T)``.
        kl_coefficient: Its weight.
    """
    last = mask & (mask.long().flip(1).cumsum(1).flip(1) == 1)
    rewards = last * scores[:, None]
    return rewards if kl is None else rewards - kl_coefficient * torch.where(mask, kl, torch.zeros_like(kl))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, decay: float = 0.95) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016); the value behind the last token is 0.

    Args:
        rewards: ``(B, T)``.
        values: Value of the state before each token ``(B, T)``.
        mask: Bool ``(B, T)``.
        discount: gamma.
        decay: lambda.

    Returns:
        Advantages, not whitened, and returns (advantage plus value).
    """
    order = _valid_first(mask)
    valid = mask.gather(1, order)
    reward, value = (torch.where(valid, tensor.gather(1, order), 0.0) for tensor in (rewards, values))
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    advantages = discounted_sums(torch.where(valid, reward + discount * following - value, 0.0), discount * decay)
    found = torch.where(mask, torch.zeros_like(advantages).scatter(1, order, advantages), 0.0)
    return Advantages(found, torch.where(mask, found + values, 0.0))


def returns_to_go(rewards: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """Sum of a token's reward and all later ones, discounted by their distance in tokens that count: ``(B, T)``."""
    order = _valid_first(mask)
    sums = discounted_sums(torch.where(mask.gather(1, order), rewards.gather(1, order), 0.0), discount)
    return torch.where(mask, torch.zeros_like(sums).scatter(1, order, sums), 0.0)


def discounted_sums(values: Tensor, factor: float) -> Tensor:
    """``S_t = v_t + factor * S_{t+1}`` along the last dimension, in log2(T) steps over the whole tensor."""
    step, length = 1, values.shape[-1]
    while step < length:
        shifted = torch.nn.functional.pad(values[..., step:], (0, step))
        values = values + factor**step * shifted
        step *= 2
    return values


def grpo(
    scores: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    scale: Scale = "group",
    epsilon: float = 1e-6,
    reduce: Reduce = identity,
) -> Tensor:
    """``(r - mean of the group) / (std + epsilon)``, the same for all tokens of a response.

    A group whose scores are all equal gives exactly 0; a group of one has mean 0 and standard deviation 1.

    Args:
        scores: ``(B,)``.
        group_ids: Long ``(B,)``.
        mask: Bool ``(B, T)``.
        scale: Divide by the unbiased standard deviation of the group, of the batch (TRL's option), or not (Dr. GRPO).
        epsilon: 1e-6 as verl, 1e-4 as TRL, 1e-9 as OpenRLHF.
        reduce: Sums over ranks, for the standard deviation of the batch.
    """
    groups = group_statistics(scores, group_ids)
    advantages = centred(scores, groups)
    if scale == "group":
        advantages = advantages / (groups.std + epsilon)
    elif scale == "batch":
        advantages = advantages / (_batch_std(scores, reduce) + epsilon)
    return _by_token(advantages, mask)


def grpo_by_domain(
    scores: Tensor,
    group_ids: Tensor,
    domain_ids: Tensor,
    domains: int,
    mask: Tensor,
    epsilon: float = 1e-6,
    reduce: Reduce = identity,
) -> Tensor:
    """``(r - mean of the group) / (std of the domain + epsilon)``, the same for all tokens of a response.

    The unbiased standard deviation of the rewards of all samples of the domain in the batch; a domain of one sample
    gives 0.

    Args:
        scores: ``(B,)``.
        group_ids: Long ``(B,)``.
        domain_ids: Long ``(B,)``, below ``domains``.
        domains: How many, on all ranks.
        mask: Bool ``(B, T)``.
        epsilon: Added to the deviation.
        reduce: Sums over ranks.
    """
    scores = scores.float()
    zeros = torch.zeros(domains, device=scores.device)
    count = reduce(zeros.index_add(0, domain_ids, torch.ones_like(scores)))
    mean = reduce(zeros.index_add(0, domain_ids, scores)) / count.clamp(min=1)
    squares = reduce(zeros.index_add(0, domain_ids, (scores - mean[domain_ids]).square()))
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    alone = (count == 1)[domain_ids]
    advantages = centred(scores, group_statistics(scores, group_ids)) / (deviation[domain_ids] + epsilon)
    return _by_token(torch.where(alone, 0.0, advantages), mask)


def dr_grpo(scores: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    """``r - mean of the group``, the same for all tokens of a response (Liu et al. 2025)."""
    return grpo(scores, group_ids, mask, scale="none")


def rloo(scores: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    """``r - mean of the others in the group``, the same for all tokens of a response (Ahmadian et al. 2024)."""
    return _by_token(leave_one_out(scores, group_ids), mask)


def reinforce_pp(
    rewards: Tensor, mask: Tensor, discount: float = 1.0, unbiased: bool = True, reduce: Reduce = identity
) -> Advantages:
    """REINFORCE++: returns to go, whitened over all tokens of the batch.

    Args:
        rewards: ``(B, T)``, the penalty of the reference subtracted.
        mask: Bool ``(B, T)``.
        discount: gamma.
        unbiased: See :func:`lit_rl.functional.masking.whiten`.
        reduce: Sums over ranks.
    """
    returns = returns_to_go(rewards, mask, discount)
    return Advantages(whiten(returns, mask, unbiased, reduce), returns)


def reinforce_pp_baseline(
    scores: Tensor, group_ids: Tensor, mask: Tensor, unbiased: bool = True, reduce: Reduce = identity
) -> Tensor:
    """REINFORCE++-baseline: ``r - mean of the group``, whitened over all tokens of the batch.

    The whitening moves groups without a signal away from 0; that is the method.
    """
    return whiten(dr_grpo(scores, group_ids, mask), mask, unbiased, reduce)


def remax(scores: Tensor, greedy_scores: Tensor, mask: Tensor) -> Tensor:
    """``r - score of the greedy response``, both ``(B,)``, the same for all tokens of a response (Li et al. 2024)."""
    return _by_token(scores - greedy_scores, mask)


def _batch_std(scores: Tensor, reduce: Reduce) -> Tensor:
    scores = scores.float()
    total, count = reduce(torch.stack([scores.sum(), torch.tensor(float(len(scores)), device=scores.device)]))
    squares = reduce((scores - total / count).square().sum())
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _by_token(advantages: Tensor, mask: Tensor) -> Tensor:
    return advantages[:, None] * mask


def _valid_first(mask: Tensor) -> Tensor:
    """Order of each row's positions that puts those that count first, as they stand."""
    return (~mask).long().argsort(dim=1, stable=True)
