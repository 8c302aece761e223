"""The language-model head without a ``(tokens, vocabulary)`` tensor: float32 logits, exact gradients.

``cross_entropy`` forms its gradient during the forward pass (three matrix products in all, as for full logits), in
chunks of rows, since it needs a row's normaliser first. ``token_log_probs`` serves losses that weight each token by
themselves (policy gradients, re-ranking): it recomputes the logits in the backward pass, so that it is free to go tile
by tile (:mod:`lit_core.head_tiles`), which keeps a part of the weight in the caches for many rows.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_core.head_tiles import Gradients, Running, Tiles, add_product, place, tile_logits, tiling

IGNORE_INDEX = -100
CHUNK_LOGITS = 1 << 23  # logits held at once: 32 MiB of float32, which stays near the caches of a CPU


@dataclass(frozen=True)
class Truncation:
    """The most probable tokens of each row, to which an entropy is kept.

    Args:
        top_k: This many of them. 1 stands for the min-entropy, ``-log`` of the largest probability, instead.
        top_p: Or as many as reach this mass, the one that crosses it included.
        cap: Most tokens by mass; None has no bound, and then keeps numbers for the whole vocabulary in memory.
        mass_preserving: Take out of the entropy's gradient the part along the probabilities, so that a step along the
            logits' gradient leaves the mass of these tokens as it is to first order.

    Raises:
        ValueError: Not exactly one of ``top_k`` and ``top_p``, or one that is out of range.
    """

    top_k: int | None = None
    top_p: float | None = None
    cap: int | None = 256
    mass_preserving: bool = False

    def __post_init__(self) -> None:
        if (self.top_k is None) == (self.top_p is None):
            raise ValueError("a truncation needs either top_k or top_p")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"cap must be at least 1, got {self.cap}")

    def most(self, vocabulary: int) -> int:
        """Most tokens that can be kept of so many."""
        return self.top_k or min(self.cap or vocabulary, vocabulary)


class TokenLogProbs(NamedTuple):
    """Per-token results, each float32 ``(N,)`` in nats; the last three where they were asked for.

    ``truncated_entropy`` is that of the distribution renormalised on the kept tokens, ``kept`` their number, and
    ``kept_mass`` their share of the probability; the latter two carry no gradient.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    truncated_entropy: Tensor | None = None
    kept: Tensor | None = None
    kept_mass: Tensor | None = None


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, chunk_logits: int = CHUNK_LOGITS
) -> Tensor:
    """Mean cross-entropy over the rows that carry a label.

    Args:
        hidden: States ``(N, D)`` that predict the labels (already shifted).
        weight: Head weight ``(V, D)``.
        labels: Long ``(N,)``; rows with -100 are ignored and cost nothing.
        bias: Head bias ``(V,)``.
        chunk_logits: Logits formed at once; bounds the memory.

    Returns:
        Mean negative log-likelihood in nats, shape ``()``, float32.

    Raises:
        ValueError: No row carries a label, so that there is no mean.
    """
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if len(rows) == 0:
        raise ValueError("cross_entropy needs at least one label, got only ignored rows")
    total = _CrossEntropySum.apply(hidden[rows], weight, labels[rows], bias, chunk_logits)  # type: ignore[no-untyped-call]
    return total / len(rows)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    entropy: bool = False,
    truncation: Truncation | None = None,
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> TokenLogProbs:
    """Log-probability of each target and, on request, entropies of each distribution; all differentiable.

    Args:
        hidden: States ``(N, D)``.
        weight: Head weight ``(V, D)``.
        targets: Long ``(N,)``.
        bias: Head bias ``(V,)``.
        entropy: Also return the entropy over the whole vocabulary.
        truncation: Also return the entropy over the most probable tokens. They are those of these logits and carry no
            gradient; a single one has entropy 0.
        temperature: Divides the logits.
        chunk_logits: Logits formed at once; bounds the memory.

    Raises:
        ValueError: A temperature that is not above 0, or more tokens to keep than there are.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if truncation is not None and (truncation.top_k or 1) > len(weight):
        raise ValueError(f"top_k must be at most the {len(weight)} tokens, got {truncation.top_k}")
    want = _Wanted(entropy, truncation, temperature, chunk_logits)
    found = _TokenLogProbs.apply(hidden, weight, targets, bias, want)  # type: ignore[no-untyped-call]
    log_probs, entropies, truncated, kept, mass = found
    return TokenLogProbs(
        log_probs, entropies if entropy else None, *((truncated, kept, mass) if truncation else (None, None, None))
    )


class _Wanted(NamedTuple):
    entropy: bool
    truncation: Truncation | None
    temperature: float
    chunk_logits: int

    def best(self, vocabulary: int) -> int:
        return 0 if self.truncation is None else self.truncation.most(vocabulary)

    def tiles(self, hidden: Tensor, weight: Tensor) -> Tiles:
        best = self.best(len(weight))
        return tiling(len(hidden), len(weight), self.chunk_logits, best, hidden.is_cuda)


class Region(NamedTuple):
    """The most probable tokens of each row: logits and ids ``(N, K)``, and which of them lie inside (bool)."""

    logits: Tensor
    ids: Tensor
    inside: Tensor


def most_probable(logits: Tensor, normalisers: Tensor, truncation: Truncation) -> Region:
    """Find the tokens that a truncation keeps.

    Args:
        logits: ``(..., V)``.
        normalisers: Their log-sum-exp ``(...)``.
        truncation: Which tokens.
    """
    best = logits.topk(truncation.most(logits.shape[-1]), dim=-1)
    return inside_region(best.values, best.indices, normalisers, truncation)


def inside_region(best: Tensor, ids: Tensor, normalisers: Tensor, truncation: Truncation) -> Region:
    """The same from the largest logits and their ids ``(..., K)``, which are in order."""
    if truncation.top_k is not None:
        return Region(best, ids, torch.ones_like(best, dtype=torch.bool))
    mass = (best - normalisers[..., None]).detach().exp()
    inside = mass.cumsum(-1) - mass < float(truncation.top_p or 1)
    inside[..., 0] = True
    return Region(best, ids, inside)


class RegionEntropy(NamedTuple):
    """Entropy in nats ``(...)`` of the softmax over a region, and its gradient by the region's logits ``(..., K)``."""

    values: Tensor
    gradient: Tensor


def region_entropy(region: Region, mass_preserving: bool) -> RegionEntropy:
    """Entropy over the tokens inside a region; see :class:`Truncation` for ``mass_preserving``."""
    logs = torch.where(region.inside, region.logits, -math.inf).log_softmax(-1)
    probabilities = logs.exp()
    logs = torch.where(probabilities > 0, logs, 0.0)
    values = -(probabilities * logs).sum(-1)
    gradient = -probabilities * (logs + values[..., None])
    if mass_preserving:
        along = (gradient * probabilities).sum(-1, keepdim=True)
        gradient = gradient - along / probabilities.square().sum(-1, keepdim=True) * probabilities
    return RegionEntropy(values, gradient)


def _chunks(rows: int, vocabulary: int, chunk_logits: int) -> list[slice]:
    step = max(1, chunk_logits // vocabulary)
    return [slice(start, start + step) for start in range(0, rows, step)]


class _RowGradients:
    """Gradients of hidden, weight and bias, summed over row chunks; weight and bias in float32, to be scaled yet."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None

    def add(self, rows: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """``gradient`` is that of the chunk's logits, float32 ``(n, V)``."""
        narrow = gradient.to(weight.dtype)
        if self.hidden is not None:
            torch.mm(narrow, weight, out=self.hidden[rows])
        if self.weight is not None:
            add_product(self.weight, narrow.T, hidden[rows])
        if self.bias is not None:
            self.bias += gradient.sum(0)


class _CrossEntropySum(Function):
    """Sum of the cross-entropies; the backward pass only scales gradients that the forward pass has formed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk_logits: int
    ) -> Tensor:
        needed = ctx.needs_input_grad
        gradients = _RowGradients(hidden, weight, bias, (needed[0], needed[1], needed[3]))
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows in _chunks(len(hidden), len(weight), chunk_logits):
            logits = tile_logits(hidden[rows], weight, bias)
            target = labels[rows, None]
            normaliser = logits.logsumexp(1, keepdim=True)
            total += (normaliser - logits.gather(1, target)).sum()
            if any(needed):
                probabilities = logits.sub_(normaliser).exp_()
                gradients.add(rows, probabilities.scatter_add_(1, target, -torch.ones_like(normaliser)), hidden, weight)
        ctx.gradients, ctx.dtypes = gradients, (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("cross_entropy can be pulled back once: its gradients are scaled in place")
        grads, (weight_dtype, bias_dtype) = ctx.gradients, ctx.dtypes
        ctx.gradients = None  # a second copy of the weight's gradient would be the peak of the whole step
        hidden = None if grads.hidden is None else grads.hidden.mul_(outer)
        weight = None if grads.weight is None else grads.weight.mul_(outer).to(weight_dtype)
        bias = None if grads.bias is None else grads.bias.mul_(outer).to(bias_dtype)
        return hidden, weight, None, bias, None


class _TokenLogProbs(Function):
    """Log-probs and entropies per row; keeps the normalisers and recomputes the logits in the backward pass.

    Of a truncated entropy it keeps the gradient by the kept tokens' logits, a few numbers a row.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, want: _Wanted
    ) -> tuple[Tensor, ...]:
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        normalisers, entropies = torch.empty_like(log_probs), torch.zeros_like(log_probs)
        truncated, kept, mass = (torch.zeros_like(log_probs) for _ in range(3))
        ids, gradients = list[Tensor](), list[Tensor]()
        tiles = want.tiles(hidden, weight)
        for rows in tiles.rows:
            running = Running(targets[rows], len(weight), want.entropy, want.best(len(weight)))
            for words in tiles.words:
                running.read(_logits(hidden, weight, bias, want, rows, words), words)
            normalisers[rows], log_probs[rows] = running.normalisers(), running.log_probs()
            if want.entropy:
                entropies[rows] = running.entropies()
            if want.truncation is not None:
                region = inside_region(running.best_logits, running.best_ids, normalisers[rows], want.truncation)
                truncated[rows], gradient = region_entropy(region, want.truncation.mass_preserving)
                if want.truncation.top_k == 1:
                    truncated[rows], gradient = normalisers[rows] - region.logits[:, 0], gradient - 1
                kept[rows] = region.inside.sum(1).float()
                shares = (region.logits - normalisers[rows, None]).exp()
                mass[rows] = torch.where(region.inside, shares, 0.0).sum(1)
                if any(ctx.needs_input_grad):
                    ids.append(region.ids)
                    gradients.append(gradient)
        ctx.save_for_backward(hidden, weight, targets, bias, normalisers, entropies, *ids, *gradients)
        ctx.want = want
        ctx.mark_non_differentiable(kept, mass)
        return log_probs, entropies, truncated, kept, mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, grad_truncated: Tensor, *unused: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, normalisers, entropies, *regions = ctx.saved_tensors
        want, needed = ctx.want, ctx.needs_input_grad
        gradients = Gradients(hidden, weight, bias, (needed[0], needed[1], needed[3]))
        by_target, by_entropy, by_region = (
            outer / want.temperature for outer in (grad_log_probs, grad_entropy, grad_truncated)
        )
        common = -by_target  # of all words, by their probability
        if want.truncation is not None and want.truncation.top_k == 1:
            common = common + by_region
        tiles = want.tiles(hidden, weight)
        for words in tiles.words:
            for number, rows in enumerate(tiles.rows):
                shifted = _logits(hidden, weight, bias, want, rows, words).sub_(normalisers[rows, None])  # log p
                if want.entropy:  # dH/dz = -p (log p + H)
                    probabilities = shifted.exp()
                    weights = shifted.add_(entropies[rows, None]).mul_(-by_entropy[rows, None])
                    gradient = probabilities.mul_(weights.add_(common[rows, None]))
                else:
                    gradient = shifted.exp_().mul_(common[rows, None])
                _scatter(gradient, targets[rows, None], by_target[rows, None], words)
                if want.truncation is not None:
                    ids, inner = regions[number], regions[len(regions) // 2 + number]
                    _scatter(gradient, ids, inner * by_region[rows, None], words)
                gradients.add(rows, words, gradient)
        hidden_grad = None if gradients.hidden is None else gradients.hidden.to(hidden.dtype)
        bias_grad = None if gradients.bias is None else gradients.bias.to(bias.dtype)
        return hidden_grad, gradients.weight, None, bias_grad, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, want: _Wanted, rows: slice, words: slice) -> Tensor:
    return tile_logits(hidden[rows], weight[words], None if bias is None else bias[words], want.temperature)


def _scatter(gradient: Tensor, ids: Tensor, values: Tensor, words: slice) -> None:
    """Add values ``(n, K)`` to a tile's gradient where their words are in it."""
    columns, inside = place(ids, words)
    gradient.scatter_add_(1, columns, torch.where(inside, values, 0.0))
