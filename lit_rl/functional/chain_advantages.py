"""Advantages from continuations drawn at points along a response: SPO-chain and FR3E (ROSE card, section 5).

Float32 ``(B, T)``, 0 where the mask is False; masks are boolean, True = a token that counts.
"""

import torch
from torch import Tensor

from lit_rl.functional.groups import centred, group_statistics, means
from lit_rl.functional.segments import by_token


def uncertain_tokens(log_probs: Tensor, mask: Tensor, threshold: float = 0.9) -> Tensor:
    """Tokens drawn with a probability below the threshold, to which SPO-chain keeps its loss: bool ``(B, T)``.

    Args:
        log_probs: Of the policy that drew the tokens, ``(B, T)``.
        mask: Bool ``(B, T)``.
        threshold: Probability.
    """
    return mask & (log_probs.float().exp() < threshold)


def chain_cuts(uncertain: Tensor, lengths: Tensor, every: int = 5) -> Tensor:
    """Prefix lengths at which SPO-chain draws continuations: 0, and just before every fifth uncertain token.

    Args:
        uncertain: Bool ``(B, T)``, see :func:`uncertain_tokens`.
        lengths: Long ``(B,)``.
        every: How many uncertain tokens a segment has.

    Returns:
        Long ``(B, K)``, ascending; rows with fewer cuts end with their length, repeated.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    numbers = uncertain.cumsum(1)
    chosen = uncertain & (numbers % every == 0)
    rows, places = chosen.nonzero(as_tuple=True)
    columns = numbers[rows, places] // every
    cuts = lengths[:, None].repeat(1, int(columns.max()) + 1 if len(columns) else 1)
    cuts[:, 0] = 0
    cuts[rows, columns] = places
    return cuts


def spo_chain(cuts: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """SPO-chain: the value of the next cut less that of the one before, for the tokens between them.

    Args:
        cuts: Prefix lengths, ascending from 0, Long ``(B, K)``; see :func:`chain_cuts`.
        values: Mean reward of the continuations of each cut, and last the response's own reward, ``(B, K + 1)``. What
            stands at a cut that is the response's length does not count.
        lengths: Long ``(B,)``.
        mask: Bool ``(B, T)``.

    Raises:
        ValueError: Shapes that do not fit, or cuts out of order.
    """
    if values.shape != (len(cuts), cuts.shape[1] + 1):
        raise ValueError(
            f"need a value for each cut and a reward, {cuts.shape[1] + 1} a row, got {tuple(values.shape)}"
        )
    cuts = torch.cat([cuts, lengths[:, None]], dim=1)
    wrong = (cuts[:, 0] != 0) | (cuts.diff(dim=1) < 0).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"cuts go up from 0 to the length {int(lengths[row])}, got {cuts[row, :-1].tolist()} in row {row}"
        )
    values = torch.where(cuts == lengths[:, None], values[:, -1:], values).float()
    return by_token(values.diff(dim=1), cuts, mask)


def fr3e(
    rewards: Tensor,
    chain_ids: Tensor,
    steps: Tensor,
    mask: Tensor,
    sharpen: bool = False,
    scale: bool = False,
    epsilon: float = 1e-6,
) -> Tensor:
    """FR3E: reward less the mean of its state, divided by ``exp(Delta)``, the gain of the state over the one before.

    A state is a prefix of a trajectory from which several continuations were drawn, and its value the share of them
    with a positive advantage. ``Delta`` is the value less that of the state before, for the first state of a
    trajectory 1 less its value. States that were left out (all rewards equal) are passed over.

    Args:
        rewards: Of the continuations, ``(B,)``.
        chain_ids: Trajectory whose prefix each one continues, Long ``(B,)``.
        steps: Which of its prefixes, in the order of their lengths, Long ``(B,)``.
        mask: Bool ``(B, T)``, the tokens of the continuations.
        sharpen: ``sign(Delta) |Delta|^1.5``, divided by the sum of ``|Delta|^1.5`` over the trajectory.
        scale: Divide by the standard deviation of the state.
        epsilon: Added to it.
    """
    names, state = torch.stack([chain_ids, steps]).unique(dim=1, return_inverse=True)  # by trajectory, then by step
    groups = group_statistics(rewards, state)
    advantages = centred(rewards, groups)
    if scale:
        advantages = advantages / (groups.std + epsilon)
    values = means((advantages > 0).float(), state, names.shape[1])
    first = torch.ones_like(names[0], dtype=torch.bool)
    first[1:] = names[0, 1:] != names[0, :-1]
    gains = torch.where(first, 1 - values, values - values.roll(1))
    if sharpen:
        powers = gains.abs().pow(1.5)
        chain = first.cumsum(0) - 1
        total = torch.zeros_like(powers).index_add(0, chain, powers)[chain]
        gains = torch.where(total > 0, gains.sign() * powers / torch.where(total > 0, total, 1.0), 0.0)
    return torch.where(mask, (advantages / gains.exp()[state])[:, None], 0.0)
