"""What keeps a policy exploring: entropies, trust-region entropy, and which tokens a penalty or the loss is kept to.

Trust-region entropy is arXiv 2602.03635; forking tokens, KL-Cov and Clip-Cov are its baselines. Logits are already
divided by the sampling temperature; entropies are in nats; masks are boolean ``(B, T)``.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Scale = Literal["logV_over_logS", "none"]


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
    ``top_k=1`` gives the min-entropy over the whole vocabulary, unscaled, as the authors' code does.

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
    vocabulary = logits.shape[-1]
    if (top_k is None) == (top_p is None):
        raise ValueError("trust-region entropy needs either top_k or top_p")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be between 1 and the {vocabulary} tokens, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    logits = logits.float()
    if top_k == 1:
        return logits.logsumexp(-1) - logits.amax(-1)
    region, inside = _region(logits, top_k, top_p, cap)
    values = _RegionEntropy.apply(region, inside, mass_preserving)  # type: ignore[no-untyped-call]
    if scale == "none":
        return values
    size = inside.sum(-1)
    return values * torch.where(size > 1, math.log(vocabulary) / size.clamp(min=2).float().log(), 0.0)


def region_size(logits: Tensor, top_p: float, cap: int | None = 256) -> Tensor:
    """Number of tokens in the nucleus at each position, Long ``(...)``."""
    return _region(logits.detach().float(), None, top_p, cap)[1].sum(-1)


def _region(logits: Tensor, top_k: int | None, top_p: float | None, cap: int | None) -> tuple[Tensor, Tensor]:
    """Logits of the most probable tokens, and which of them lie inside."""
    vocabulary = logits.shape[-1]
    if top_k is not None:
        best = logits.topk(top_k, dim=-1).values
        return best, torch.ones_like(best, dtype=torch.bool)
    best = logits.topk(min(cap or vocabulary, vocabulary), dim=-1).values
    mass = (best - logits.logsumexp(-1, keepdim=True)).detach().exp()
    before = mass.cumsum(-1) - mass
    inside = before < (1.0 if top_p is None else top_p)
    inside[..., 0] = True
    return best, inside


class _RegionEntropy(Function):
    """Entropy of the softmax over the marked logits; the gradient is formed by hand, so that it can be projected."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inside: Tensor, mass_preserving: bool) -> Tensor:
        logs = torch.where(inside, logits, -math.inf).log_softmax(-1)
        probabilities = logs.exp()
        logs = torch.where(probabilities > 0, logs, 0.0)
        values = -(probabilities * logs).sum(-1)
        ctx.save_for_backward(probabilities, logs, values)
        ctx.mass_preserving = mass_preserving
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        probabilities, logs, values = ctx.saved_tensors
        gradient = -probabilities * (logs + values[..., None])
        if ctx.mass_preserving:
            along = (gradient * probabilities).sum(-1, keepdim=True)
            gradient = gradient - along / probabilities.square().sum(-1, keepdim=True) * probabilities
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
