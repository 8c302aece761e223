"""Advantages of responses that share prefixes: ROSE and the tree estimators it is compared with (ROSE card, 2 and 5).

Every function takes a :class:`lit_rl.functional.forest.Forest` of ``B`` responses, their rewards ``(B,)`` and the mask
``(B, T)``, True = a token that counts, and gives float32 ``(B, T)``, 0 where the mask is False. A token that several
responses share stands in the row of each. A group whose rewards are all equal gives exactly 0.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_rl.functional.forest import Forest
from lit_rl.functional.groups import centred, group_statistics, leave_one_out, means
from lit_rl.functional.masking import Reduce, identity, whiten
from lit_rl.functional.segments import Segments, segments

EdgeScale = Literal["rloo", "grpo"]
Reweight = Literal["none", "leaves", "code"]
Weights = Literal["average", "group_size"]
TreeMode = Literal["sum", "code"]


class EdgeAdvantages(NamedTuple):
    """Advantages ``(B, T)``, and the tokens with a signal, bool ``(B, T)``: the mask less the edges of exactly 0."""

    advantages: Tensor
    mask: Tensor


def rose(forest: Forest, rewards: Tensor, mask: Tensor, length_penalty: float = 1.0, share: bool = False) -> Tensor:
    """``V(end of the segment) - V(its start)``, less for correct responses that are longer than need be (eqs. 4-8).

    ``V`` of a node is the mean reward of the responses through it. The advantages of a response add up to its reward
    less the mean of its group over its segments. A correct response (reward above 0.5) is compared with the shortest
    correct one of its group, the lowest row of several: behind their deepest common node, at ``b``, positive
    advantages are multiplied by ``eta ** length_penalty`` and negative ones by ``2 - eta ** length_penalty``, with
    ``eta = (L_shortest - b) / (L - b)``. Independent responses without a penalty give Dr. GRPO.

    Args:
        forest: Lineage of the responses.
        rewards: ``(B,)``, in [0, 1] unless the penalty is 0.
        mask: Bool ``(B, T)``.
        length_penalty: alpha; 0 leaves lengths out.
        share: Divide by the number of responses that have the token in common, so that it counts once.

    Raises:
        ValueError: A negative penalty, or rewards outside [0, 1] with one.
    """
    if length_penalty < 0:
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}")
    rewards = _checked(forest, rewards)
    path = segments(forest)
    advantages = path.values(rewards)[path.nodes].diff(dim=1)
    if length_penalty > 0:
        advantages = _calibrated(forest, path, rewards, advantages, length_penalty)
    if share:
        advantages = advantages / _sharing(forest, path)
    return path.by_token(advantages, mask)


def spo_tree(forest: Forest, rewards: Tensor, mask: Tensor, scale: EdgeScale = "rloo") -> EdgeAdvantages:
    """SPO-tree: ``V(child) - V(parent)``, where ``V`` of a node is the mean of its children's.

    In balanced trees that is ROSE without a penalty. Edges without a signal are to be left out of the loss: use the
    mask that is returned.

    Args:
        forest: Lineage of the responses.
        rewards: ``(B,)``.
        mask: Bool ``(B, T)``.
        scale: ``grpo`` divides by the biased standard deviation of the parent's children.
    """
    path = segments(forest)
    values = path.values(_checked(forest, rewards))  # right at the leaves; the others follow from the bottom up
    parents, depths = path.parents(), path.depths()
    deviations = torch.ones_like(values)
    for depth in range(int(depths.max()) if len(depths) else 0, 0, -1):
        children = depths == depth
        above = parents[children]
        inner = torch.zeros_like(children)
        inner[above] = True
        values = torch.where(inner, means(values[children], above, path.total), values)
        spread = means((values[children] - values[above]).square(), above, path.total).sqrt()
        deviations = torch.where(inner & (spread > 0), spread, deviations)
    steps = values[path.nodes].diff(dim=1)
    if scale == "grpo":
        steps = steps / deviations[path.nodes[:, :-1]]
    advantages = path.by_token(steps, mask)
    return EdgeAdvantages(advantages, advantages != 0)


def tree_rl(
    forest: Forest, rewards: Tensor, mask: Tensor, reweight: Reweight = "leaves", selected: Tensor | None = None
) -> Tensor:
    """TreeRL: ``(V - V(root)) + (V - V(parent))`` at the end of each segment.

    ``V`` is the mean over the leaves below of the reward less the mean of the others in the group.

    Args:
        forest: Lineage of the responses.
        rewards: ``(B,)``.
        mask: Bool ``(B, T)``.
        reweight: ``leaves`` divides by the square root of the number of leaves below; ``code`` divides ``V`` by it
            before the differences are taken, as the authors' code does.
        selected: Leaves that are trained on, bool ``(B,)``: only these are counted below a node, and the others get 0.
    """
    path = segments(forest)
    selected = torch.ones_like(forest.lengths, dtype=torch.bool) if selected is None else selected
    values = path.values(leave_one_out(_checked(forest, rewards), forest.group_ids))
    below = torch.zeros_like(values).index_add(0, path.through, selected[path.rows].float())
    weights = below.clamp(min=1).rsqrt()
    if reweight == "code":
        values = values * weights
    at = values[path.nodes]
    credits = (at - at[:, :1])[:, 1:] + at.diff(dim=1)
    if reweight == "leaves":
        credits = credits * weights[path.nodes[:, 1:]]
    return path.by_token(credits, mask & selected[:, None])


def tree_po(
    forest: Forest,
    rewards: Tensor,
    mask: Tensor,
    weights: Weights = "average",
    drop_equal: bool = False,
    whitened: bool = True,
    unbiased: bool = True,
    reduce: Reduce = identity,
) -> Tensor:
    """TreePO: mean of ``r - V(node)`` over the path without its leaf, the same for all tokens of a response.

    Args:
        forest: Lineage of the responses; nodes are the prompt and where responses branched.
        rewards: ``(B,)``.
        mask: Bool ``(B, T)``.
        weights: All nodes alike, or by the number of responses through them.
        drop_equal: Leave nodes out below which all rewards are equal.
        whitened: Whiten over all tokens of the batch. That moves groups without a signal away from 0.
        unbiased: See :func:`lit_rl.functional.masking.whiten`.
        reduce: Sums over ranks, for the whitening.
    """
    rewards = _checked(forest, rewards)
    path = segments(forest)
    values = path.values(rewards)
    size = path.sizes().float() if weights == "group_size" else torch.ones_like(values)
    if drop_equal:
        spread = means((rewards[path.rows] - values[path.through]).square(), path.through, path.total)
        size = torch.where(spread > 0, size, 0.0)
    inner = path.valid[:, 1:]  # a node is followed by another, unless it is the leaf
    nodes = path.nodes[:, :-1]
    weight = torch.where(inner, size[nodes], 0.0)
    total = (weight * (rewards[:, None] - values[nodes])).sum(1)
    divisor = weight.sum(1)
    advantages = torch.where(divisor > 0, total / torch.where(divisor > 0, divisor, 1.0), 0.0)
    found = torch.where(mask, advantages[:, None], 0.0)
    return whiten(found, mask, unbiased, reduce) if whitened else found


def tree_grpo(forest: Forest, rewards: Tensor, mask: Tensor, mode: TreeMode = "sum", epsilon: float = 1e-6) -> Tensor:
    """Tree-GRPO: rewards normalised among the responses of the tree and of the prompt, the same for all tokens.

    Args:
        forest: Lineage of the responses; responses without a common token are different trees.
        rewards: ``(B,)``.
        mask: Bool ``(B, T)``.
        mode: ``sum`` adds the two; a tree of one response adds nothing. ``code`` normalises within the group and then
            within the tree, which undoes the first but for epsilon, as the authors' code does; a tree of one response
            keeps what the first gave.
        epsilon: Added to the standard deviations.
    """
    rewards, trees = _checked(forest, rewards), forest.trees()
    over_group = _normalised(rewards, forest.group_ids, epsilon)
    if mode == "code":
        found = _normalised(over_group, trees, epsilon)
    else:
        alone = group_statistics(rewards, trees).size == 1
        found = over_group + torch.where(alone, 0.0, _normalised(rewards, trees, epsilon))
    return torch.where(mask, found[:, None], 0.0)


def _checked(forest: Forest, rewards: Tensor) -> Tensor:
    if rewards.shape != (len(forest),):
        raise ValueError(f"need one reward for each of {len(forest)} responses, got {tuple(rewards.shape)}")
    return rewards.float()


def _calibrated(forest: Forest, path: Segments, rewards: Tensor, advantages: Tensor, length_penalty: float) -> Tensor:
    """Lower the advantages ``(B, G)`` of correct responses behind the node that they share with the shortest one."""
    if not ((rewards >= 0) & (rewards <= 1)).all():
        raise ValueError(f"a length penalty needs rewards in [0, 1], got {rewards.min():g} to {rewards.max():g}")
    correct, rows = rewards > 0.5, torch.arange(len(forest), device=rewards.device)
    members = forest.members.clamp(min=0)
    candidates = correct[members] & (forest.members >= 0)
    lengths = torch.where(candidates, forest.lengths[members], torch.iinfo(torch.long).max)
    shortest = members.gather(1, lengths.argmin(1, keepdim=True))[forest.groups, 0]  # the first of several
    common = forest.deepest_common(rows, shortest)
    ratio = (forest.lengths[shortest] - common) / (forest.lengths - common).clamp(min=1)  # at most 1, if correct
    kept = ratio.clamp(min=0).pow(length_penalty)[:, None]
    longer = (correct & (rows != shortest))[:, None] & (path.cuts[:, :-1] >= common[:, None])
    return torch.where(longer, advantages * torch.where(advantages > 0, kept, 2 - kept), advantages)


def _sharing(forest: Forest, path: Segments) -> Tensor:
    """How many responses have the tokens of each segment in common, ``(B, G)``, at least 1."""
    rows = torch.arange(len(forest), device=forest.lengths.device)
    whole = forest.passes(rows, forest.lengths).sum(1)  # more than one where a response goes on behind another's end
    leaf = path.cuts[:, 1:] == forest.lengths[:, None]
    return torch.where(leaf, whole[:, None], path.sizes()[path.nodes[:, 1:]])


def _normalised(scores: Tensor, ids: Tensor, epsilon: float) -> Tensor:
    groups = group_statistics(scores, ids)
    return centred(scores, groups) / torch.where(groups.size == 1, 1.0, groups.std + epsilon)
