"""What keeps a policy exploring: entropies, trust-region entropy, and which tokens a penalty or the loss is kept to.

Trust-region entropy is arXiv 2602.03635; forking tokens, KL-Cov and Clip-Cov are its baselines. Logits are already
divided by the sampling temperature; entropies are in nats; masks are boolean ``(B, T)``. Semantic entropy, by which
ROSE branches, is in ``branching.py``; its logits are those of temperature 1.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_core.lm_head import Region, Truncation, most_probable, region_entropy
from lit_rl.functional.branching import semantic_entropy as semantic_entropy

Scale = Literal["logV_over_logS", "none"]
FEW = 32  # tokens that hold most nuclei


def entropy(logits: Tensor) -> Tensor:
    """Entropy over the whole vocabulary at each position, float32 ``(...)`` from ``(..., V)``."""
    logs = logits.float().log_softmax(-1)
    probabilities = logs.exp()
    return -(probabilities * torch.where(probabilities > 0, logs, 0.0)).sum(-1)  # 0 log 0 = 0, gradients included


def trust_region_entropy(
    logits: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    scale: Scale = "logV_over_logS",
    cap: int | None = 256,
    mass_preserving: bool = False,
) -> Tensor:
    """Entropy of the policy renormalised on the tokens that it finds plausible itself (TRE, card section 2.1).

    The region is that of these logits and carries no gradient. A nucleus of one token gives 0 without a gradient;
    ``top_k=1`` gives the min-entropy over the whole vocabulary, unscaled, as the authors' code does. Training has the
    same from hidden states without full logits (:func:`lit_core.lm_head.token_log_probs`).

    Args:
        logits: ``(..., V)``.
        top_k: Region of the K most probable tokens (TRE-K).
        top_p: Region of the most probable tokens up to this mass, the one that crosses it included (TRE-P).
        scale: Multiply by ``log V / log |region|``, which gives the range of the full entropy, or not.
        cap: Most tokens of a nucleus; None has no such bound.
        mass_preserving: Take from the gradient the part along the region's probabilities, so that a step along the
            logits' gradient leaves the region's mass as it is to first order.

    Returns:
        Float32 ``(...)``.

    Raises:
        ValueError: Not exactly one of ``top_k`` and ``top_p``, or one that is out of range.
    """
    truncation = Truncation(top_k, top_p, cap, mass_preserving)
    if top_k is not None and top_k > logits.shape[-1]:
        raise ValueError(f"top_k must be at most the {logits.shape[-1]} tokens, got {top_k}")
    logits = logits.float()
    if top_k == 1:
        return logits.logsumexp(-1) - logits.amax(-1)
    region = most_probable(logits, logits.logsumexp(-1), truncation)
    values = _RegionEntropy.apply(region.logits, region, mass_preserving)  # type: ignore[no-untyped-call]
    return scaled(values, region.inside.sum(-1), logits.shape[-1], scale)


def scaled(values: Tensor, region_sizes: Tensor, vocabulary: int, scale: Scale) -> Tensor:
    """Entropies of regions ``(...)`` on the scale of the full entropy; those of a single token become 0."""
    if scale == "none":
        return values
    factor = math.log(vocabulary) / region_sizes.clamp(min=2).float().log()
    return values * torch.where(region_sizes > 1, factor, 0.0)


def region_size(logits: Tensor, top_p: float, cap: int | None = 256) -> Tensor:
    """Number of tokens in the nucleus at each position, Long ``(...)``."""
    rows = logits.detach().float().reshape(-1, logits.shape[-1])
    normalisers = rows.logsumexp(-1)
    most = Truncation(top_p=top_p, cap=cap).most(rows.shape[-1])
    first = min(FEW, most)
    sizes = most_probable(rows, normalisers, Truncation(top_p=top_p, cap=first)).inside.sum(-1)
    if first < most and len(open_rows := (sizes == first).nonzero()[:, 0]):  # their nuclei may be larger
        rest = most_probable(rows[open_rows], normalisers[open_rows], Truncation(top_p=top_p, cap=cap))
        sizes[open_rows] = rest.inside.sum(-1)
    return sizes.view(logits.shape[:-1])


class _RegionEntropy(Function):
    """The gradient is formed by hand, so that it can be projected."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, region: Region, mass_preserving: bool) -> Tensor:
        values, gradient = region_entropy(region, mass_preserving)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[..., None], None, None


def forking_mask(entropies: Tensor, mask: Tensor, share: float = 0.2) -> Tensor:
    """Keep the share of tokens with the highest entropy, at least one (Wang et al. 2025): bool ``(B, T)``."""
    count = int(mask.sum())
    if count == 0:
        return mask
    return _largest(entropies, mask, max(1, int(share * count + 0.9999)))


def covariances(advantages: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """``(A - mean A)(log pi - mean log pi)`` of each token, detached, ``(B, T)``; 0 outside the mask."""
    centred = []
    for values in (advantages, log_probs):
        kept = torch.where(mask, values.detach().float(), 0.0)
        centred.append(kept - kept.sum() / mask.sum().clamp(min=1))
    return torch.where(mask, centred[0] * centred[1], 0.0)


def kl_cov_mask(advantages: Tensor, log_probs: Tensor, mask: Tensor, percent: float = 0.2) -> Tensor:
    """Tokens with the largest covariance, which KL-Cov holds near the old policy (Cui et al. 2025): bool ``(B, T)``.

    Args:
        advantages: ``(B, T)``.
        log_probs: Of the policy in training.
        mask: Bool ``(B, T)``.
        percent: Share of the tokens in percent; at least one token.
    """
    count = int(mask.sum())
    if count == 0:
        return mask
    return _largest(covariances(advantages, log_probs, mask), mask, max(1, int(count * percent / 100)))


def clip_cov_mask(
    advantages: Tensor,
    log_probs: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    ratio: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
) -> Tensor:
    """Tokens that Clip-Cov takes out of the loss: a random few of those whose covariance lies between two bounds.

    Args:
        advantages: ``(B, T)``.
        log_probs: Of the policy in training.
        mask: Bool ``(B, T)``.
        generator: Draws which ones.
        ratio: Share of all tokens that is taken out, at least one token.
        low: Lower bound of the covariance.
        high: Upper bound.
    """
    found = covariances(advantages, log_probs, mask)
    candidates = mask & (found > low) & (found < high)
    keys = torch.rand(mask.shape, generator=generator, device=generator.device).to(mask.device)
    count = min(int(candidates.sum()), max(1, int(ratio * int(mask.sum()))))
    return _largest(keys, candidates, count) if count else torch.zeros_like(mask)


def _largest(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest values among those that the mask has."""
    flat = torch.where(mask, values.detach().float(), -math.inf).flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(count).indices] = True
    return chosen.view_as(mask) & mask
