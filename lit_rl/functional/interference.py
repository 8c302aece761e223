"""How the gradients of several domains get in each other's way, from their Gram matrices (MGS card, 2.7)."""

from typing import NamedTuple

import torch
from torch import Tensor

NO_NORM = 1e-8  # a gradient of at most this norm has no direction


class Interference(NamedTuple):
    """Of modules taken together.

    Args:
        cosines: Of each pair of domains over all modules ``(T, T)``.
        cosine: Their mean over the pairs in which both have a gradient, ``()``; 0 without one.
        conflict_ratio: Share of (pair, module), both with a gradient there, whose scalar product is negative, ``()``.
        conflict_ratio_weighted: The same, each module by its number of parameters.
        magnitude: ``|G - sum g| / |sum g|``, ``()``: how far surgery moves the mixed gradient.
        gains: ``<G, g_t> / |g_t|**2`` of each domain ``(T,)``: what a step wins it to first order, as a share of what
            a step along its own gradient would; 0 without a gradient.
    """

    cosines: Tensor
    cosine: Tensor
    conflict_ratio: Tensor
    conflict_ratio_weighted: Tensor
    magnitude: Tensor
    gains: Tensor


def module_cosines(gram: Tensor) -> Tensor:
    """Cosines of the gradients, float64 of the shape of ``gram``; 0 where a norm is at most 1e-8."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    both = norms[..., :, None] * norms[..., None, :]
    some = (norms > NO_NORM)[..., :, None] & (norms > NO_NORM)[..., None, :]
    return torch.where(some, gram / torch.where(some, both, 1.0), 0.0)


def conflicts(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of domains in conflict, and those in which both have a gradient: ``(M,)`` each, unordered."""
    upper = torch.ones(gram.shape[1:], dtype=torch.bool, device=gram.device).triu(1)
    norms = gram.diagonal(dim1=1, dim2=2) > NO_NORM**2
    some = norms[:, :, None] & norms[:, None, :] & upper
    return ((gram < 0) & some).sum((1, 2)), some.sum((1, 2))


def interference(gram: Tensor, weights: Tensor, sizes: Tensor) -> Interference:
    """Measure interference; no value is read by the host.

    Args:
        gram: ``(M, T, T)``.
        weights: Of the combined gradient ``(M, T)``.
        sizes: Number of parameters of each module ``(M,)``.
    """
    whole = gram.sum(0)
    cosines = module_cosines(whole)
    have = whole.diagonal() > NO_NORM**2
    pairs = (have[:, None] & have).triu(1)
    against, met = conflicts(gram)
    weighted = sizes.to(gram)
    moved = weights - 1
    change = (moved[:, None] @ gram @ moved[..., None]).sum().clamp(min=0)
    products = (weights[:, None] @ gram).sum((0, 1))
    squares = whole.diagonal()
    return Interference(
        cosines,
        torch.where(pairs, cosines, 0.0).sum() / pairs.sum().clamp(min=1),
        against.sum() / met.sum().clamp(min=1),
        (weighted * against).sum() / (weighted * met).sum().clamp(min=1),
        _over(change, whole.sum().clamp(min=0)).sqrt(),
        torch.where(have, products / torch.where(have, squares, 1.0), 0.0),
    )


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
