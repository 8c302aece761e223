"""Surgery on the gradients of several domains, from their scalar products alone (MGS card, sections 2 and 5).

Every method here gives ``G = sum_t w_t g_t``, and the weights follow from the Gram matrix ``K_ij = <g_i, g_j>``: what a
projection leaves of a gradient stays in the span of all of them. Gram matrices are float64 ``(T, T)``, or ``(M, T, T)``
for ``M`` modules that are treated apart and at once; weights are float64 ``(T,)`` or ``(M, T)``.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SurgeryMethod = Literal["pcgrad", "gradvac", "cagrad", "mgda", "sum"]
SMALLEST = 1e-12  # a squared norm below this (a share of the domains' mean, or absolute) is no gradient
MOST_DOMAINS = 8  # cagrad and mgda try every subset of the domains


class GradVac(NamedTuple):
    """Weights ``(M, T)``, and the means of the cosines after this step ``(M, T, T)``."""

    weights: Tensor
    cosines: Tensor


def surgery_weights(
    gram: Tensor,
    orders: Tensor | None = None,
    method: SurgeryMethod = "pcgrad",
    compat: bool = False,
    radius: float = 0.5,
) -> Tensor:
    """Weights of the domains' gradients in the combined one.

    Where at most one domain has a gradient, all weights are 1. ``pcgrad`` (and with it MGS, which is PCGrad by module)
    takes from each gradient what points against another one's, and adds up what is left (not the mean); ``sum`` is the
    mixed gradient; ``cagrad`` and ``mgda`` see :func:`cagrad_weights` and :func:`mgda_weights`. ``gradvac`` has a
    state: see :func:`gradvac_weights`; here it starts anew, which is ``pcgrad``.

    Args:
        gram: ``(T, T)`` or ``(M, T, T)``.
        orders: In which order each domain meets the others, Long ``(T, T - 1)`` or ``(M, T, T - 1)``, for ``pcgrad``
            and ``gradvac``; None is :func:`fixed_orders`.
        method: How.
        compat: Take :data:`SMALLEST` as an absolute bound, as the authors' code does, instead of a share of the mean
            squared norm of the domains.
        radius: c of ``cagrad``.

    Raises:
        ValueError: A matrix or orders of another shape, or an unknown method.
    """
    batch, paths = _checked(gram, orders)
    present = _present(batch, compat)
    if method == "pcgrad":
        found = _pcgrad(batch, paths, present)
    elif method == "gradvac":
        found = _gradvac(batch, paths, torch.zeros_like(batch), 0.0, present).weights
    elif method == "cagrad":
        found = _cagrad(batch, radius, present)
    elif method == "mgda":
        found = _mgda(batch, present)
    elif method == "sum":
        found = torch.ones_like(batch[:, 0])
    else:
        raise ValueError(f"method must be pcgrad, gradvac, cagrad, mgda or sum, got '{method}'")
    return _alone(found, present).view(gram.shape[:-1])


def gradvac_weights(
    gram: Tensor,
    cosines: Tensor | None = None,
    orders: Tensor | None = None,
    decay: float = 0.5,
    compat: bool = False,
) -> GradVac:
    """GradVac (Wang et al. 2021): raise the cosine of two gradients to its running mean where it is below.

    With a mean of 0 it is PCGrad. As in LibMTL the means follow the cosines of what the projections before have left.
    Pairs without a gradient keep theirs.

    Args:
        gram: ``(T, T)`` or ``(M, T, T)``.
        cosines: Means so far, of the same shape; None starts with 0.
        orders: See :func:`surgery_weights`.
        decay: Share of the new cosine in the mean (beta).
        compat: See :func:`surgery_weights`.

    Raises:
        ValueError: Shapes that do not fit.
    """
    batch, paths = _checked(gram, orders)
    means = torch.zeros_like(batch) if cosines is None else cosines.to(batch).view_as(batch)
    present = _present(batch, compat)
    found = _gradvac(batch, paths, means, decay, present)
    return GradVac(_alone(found.weights, present).view(gram.shape[:-1]), found.cosines.view_as(gram))


def cagrad_weights(gram: Tensor, radius: float = 0.5) -> Tensor:
    """CAGrad (Liu et al. 2021): the best worst domain within ``radius * |g_0|`` of the mixed gradient ``g_0``.

    ``(g_0 + radius |g_0| g_x / |g_x|) / (1 + radius**2)`` with the convex combination ``g_x`` that minimises
    ``<g_x, g_0> + radius |g_0| |g_x|``, found exactly. The mixed gradient is the sum here, so that a radius of 0 gives
    it back.
    """
    return surgery_weights(gram, method="cagrad", radius=radius)


def mgda_weights(gram: Tensor) -> Tensor:
    """MGDA (Désidéri 2012): the shortest convex combination, found exactly; the weights add up to 1.

    Domains without a gradient are left out: with them the shortest is 0.
    """
    return surgery_weights(gram, method="mgda")


def fixed_orders(domains: int) -> Tensor:
    """Each domain meets the others by number: Long ``(T, T - 1)``."""
    others = [[other for other in range(domains) if other != own] for own in range(domains)]
    return torch.tensor(others, dtype=torch.long).view(domains, max(domains - 1, 0))


def draw_orders(seed: int, modules: int, domains: int) -> Tensor:
    """Random orders, Long ``(M, T, T - 1)``, a function of the seed and the module's number: equal on all ranks.

    Args:
        seed: Of this step, from 0 to 2**63 - 1.
        modules: How many.
        domains: How many.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(modules, domains, max(domains - 1, 0), generator=generator, dtype=torch.float64)
    return fixed_orders(domains).expand(modules, -1, -1).gather(2, keys.argsort(dim=2))


def _checked(gram: Tensor, orders: Tensor | None) -> tuple[Tensor, Tensor]:
    if gram.ndim not in (2, 3) or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] < 1:
        raise ValueError(f"need Gram matrices (T, T) or (M, T, T), got {tuple(gram.shape)}")
    batch = gram.double().view(-1, *gram.shape[-2:])
    modules, domains = batch.shape[:2]
    orders = fixed_orders(domains) if orders is None else orders
    if orders.shape[-2:] != (domains, domains - 1) or orders.ndim not in (2, 3):
        raise ValueError(f"need orders (T, T - 1) of {domains} domains, got {tuple(orders.shape)}")
    return batch, orders.to(batch.device).expand(modules, -1, -1)


def _present(gram: Tensor, compat: bool = False) -> Tensor:
    """Which domains have a gradient in a module, bool ``(M, T)``."""
    squares = gram.diagonal(dim1=1, dim2=2)
    if compat:
        return squares > SMALLEST
    return squares > SMALLEST * squares.mean(1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)


def _alone(weights: Tensor, present: Tensor) -> Tensor:
    """A module with at most one gradient keeps it as it is."""
    return torch.where((present.sum(1) <= 1)[:, None], 1.0, weights)


def _pcgrad(gram: Tensor, orders: Tensor, present: Tensor) -> Tensor:
    modules, domains = gram.shape[:2]
    squares = gram.diagonal(dim1=1, dim2=2)
    left = torch.eye(domains, dtype=gram.dtype, device=gram.device).repeat(modules, 1, 1)  # row i: what is left of g_i
    for others in orders.unbind(2):  # (M, T): whom each meets now
        dots = (left @ gram).gather(2, others[..., None])
        bends = (dots[..., 0] < 0) & present.gather(1, others)
        factors = torch.where(bends, -dots[..., 0] / squares.gather(1, others), 0.0)
        left.scatter_add_(2, others[..., None], factors[..., None])
    return left.sum(1)


def _gradvac(gram: Tensor, orders: Tensor, means: Tensor, decay: float, present: Tensor) -> GradVac:
    modules, domains = gram.shape[:2]
    squares, means = gram.diagonal(dim1=1, dim2=2), means.clone()
    left = torch.eye(domains, dtype=gram.dtype, device=gram.device).repeat(modules, 1, 1)
    for others in orders.unbind(2):
        other = others[..., None]
        products = left @ gram
        own = (products * left).sum(2).clamp(min=0).sqrt()
        theirs = squares.gather(1, others).sqrt()
        some = present & present.gather(1, others) & (own > 0)
        cosine = torch.where(some, products.gather(2, other)[..., 0] / (own * theirs), 0.0).clamp(-1, 1)
        mean = means.gather(2, other)[..., 0]
        rest = (1 - mean.square()).clamp(min=SMALLEST).sqrt()
        factor = own * (mean * (1 - cosine.square()).sqrt() - cosine * rest) / (theirs * rest)
        left.scatter_add_(2, other, torch.where(some & (cosine < mean), factor, 0.0)[..., None])
        means.scatter_(2, other, torch.where(some, (1 - decay) * mean + decay * cosine, mean)[..., None])
    return GradVac(left.sum(1), means)


def _mgda(gram: Tensor, present: Tensor) -> Tensor:
    shortest = _onto_simplex(_stationary(gram, torch.zeros_like(gram[:, 0]), present)[0])  # (M, S, T)
    lengths = (shortest @ gram * shortest).sum(2)
    return _best(shortest, lengths)


def _cagrad(gram: Tensor, radius: float, present: Tensor) -> Tensor:
    """The minimum of ``f(x) = b x + r |g_x|`` over convex combinations ``x``, ``b_i = <g_i, g_0>``, ``r = c |g_0|``.

    Within a subset of the domains it is ``x_0 + x_1 / t``, ``x_0`` the shortest affine combination and ``x_1`` the
    direction that ``b`` asks for, for the ``t`` with ``t |g_x| = r``: since ``<g_{x_0}, g_{x_1}> = 0``,
    ``t**2 |g_{x_0}|**2 + |g_{x_1}|**2 = r**2``. Or it lies where ``g_x = 0``, which is ``x_0``.
    """
    slopes = gram.sum(2)
    length = slopes.sum(1).clamp(min=0).sqrt()
    reach = (radius * length)[:, None]
    shortest, towards = _stationary(gram, slopes, present)
    squares = [(part @ gram * part).sum(2).clamp(min=0) for part in (shortest, towards)]
    inverse = (squares[0] / (reach.square() - squares[1]).clamp(min=torch.finfo(gram.dtype).tiny)).sqrt()
    inside = (reach.square() > squares[1])[..., None]
    moved = _onto_simplex(torch.where(inside, shortest + inverse[..., None] * towards, shortest))
    candidates = torch.cat([moved, _onto_simplex(shortest)], 1)
    lengths = (candidates @ gram * candidates).sum(2).clamp(min=0).sqrt()
    chosen = _best(candidates, (candidates * slopes[:, None]).sum(2) + reach * lengths)
    size = (chosen[:, None] @ gram @ chosen[..., None])[:, 0].clamp(min=0).sqrt()
    added = torch.where(size > 1e-12 * length[:, None], reach * chosen / size, 0.0)
    return (1 + added) / (1 + radius**2)


def _stationary(gram: Tensor, slopes: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Of every subset of the domains: ``x_0`` with ``K x_0 = const``, and ``x_1`` with ``K x_1 = const - slopes``.

    ``x_0`` adds up to 1, ``x_1`` to 0. Subsets with an absent domain give numbers that are not finite, as do those
    whose gradients depend on each other: a smaller one has the same combination. ``(M, S, T)`` each.
    """
    domains = gram.shape[1]
    if domains > MOST_DOMAINS:
        raise ValueError(f"cagrad and mgda take at most {MOST_DOMAINS} domains, got {domains}")
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(gram.dtype).tiny)[:, None, None]
    numbers = torch.arange(1, 2**domains, device=gram.device)
    subsets = (numbers[:, None] >> torch.arange(domains, device=gram.device)) & 1 == 1  # (S, T)
    inside = subsets & (present | ~present.any(1, keepdim=True))[:, None]  # (M, S, T)
    system = gram.new_zeros(*inside.shape[:2], domains + 1, domains + 1)
    pairs = inside[..., :, None] & inside[..., None, :]
    system[..., :domains, :domains] = torch.where(pairs, (gram / scale)[:, None], 0.0)
    system[..., :domains, :domains].diagonal(dim1=2, dim2=3).add_((~inside).to(gram))
    system[..., :domains, domains] = inside.to(gram)
    system[..., domains, :domains] = inside.to(gram)
    right = gram.new_zeros(*inside.shape[:2], domains + 1, 2)
    right[..., domains, 0] = 1
    right[..., :domains, 1] = torch.where(inside, -slopes[:, None] / scale, 0.0)
    found = torch.linalg.solve_ex(system, right).result[..., :domains, :]
    whole = (inside == subsets).all(2, keepdim=True)
    shortest, towards = (torch.where(whole, part, torch.nan) for part in found.unbind(3))
    return shortest, towards


def _onto_simplex(points: Tensor) -> Tensor:
    """Points of which none is negative and that add up to 1, from some that nearly are; not finite ones stay so."""
    points = points.clamp(min=0)
    return points / points.sum(-1, keepdim=True)


def _best(candidates: Tensor, values: Tensor) -> Tensor:
    """The candidate ``(M, S, T)`` with the smallest value among the finite ones, ``(M, T)``."""
    finite = candidates.isfinite().all(2) & values.isfinite()
    best = torch.where(finite, values, torch.inf).argmin(1)
    return candidates[torch.arange(len(candidates), device=best.device), best]
