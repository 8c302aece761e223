"""The language-model head without a ``(tokens, vocabulary)`` tensor: row chunks, float32 logits, exact gradients.

``cross_entropy`` forms its gradient during the forward pass (three matrix products in all, as for full logits).
``token_log_probs`` serves losses that weight each token by themselves (policy gradients, re-ranking): it recomputes the
logits chunk by chunk in the backward pass.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
    vocabulary = logits.shape[-1]
    if truncation.top_k is not None:
        best = logits.topk(truncation.top_k, dim=-1)
        return Region(best.values, best.indices, torch.ones_like(best.values, dtype=torch.bool))
    best = logits.topk(min(truncation.cap or vocabulary, vocabulary), dim=-1)
    mass = (best.values - normalisers[..., None]).detach().exp()
    inside = mass.cumsum(-1) - mass < float(truncation.top_p or 1)
    inside[..., 0] = True
    return Region(best.values, best.indices, inside)


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


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Float32 logits; the product runs in the inputs' dtype, which is what the full head would do."""
    logits = (hidden @ weight.T).float()
    logits = logits if bias is None else logits.add_(bias.float())
    return logits if temperature == 1 else logits.div_(temperature)


class _Gradients:
    """Sums the gradients of hidden, weight and bias over chunks; weight and bias in float32."""

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
            if self.weight.dtype == weight.dtype:
                self.weight.addmm_(narrow.T, hidden[rows])
            else:
                self.weight += narrow.T @ hidden[rows]
        if self.bias is not None:
            self.bias += gradient.sum(0)


class _CrossEntropySum(Function):
    """Sum of the cross-entropies; the backward pass only scales gradients that the forward pass has formed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk_logits: int
    ) -> Tensor:
        needed = ctx.needs_input_grad
        gradients = _Gradients(hidden, weight, bias, (needed[0], needed[1], needed[3]))
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows in _chunks(len(hidden), len(weight), chunk_logits):
            logits = _logits(hidden[rows], weight, bias)
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
        for rows in _chunks(len(hidden), len(weight), want.chunk_logits):
            logits = _logits(hidden[rows], weight, bias, want.temperature)
            normalisers[rows] = logits.logsumexp(1)
            log_probs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normalisers[rows]
            if want.truncation is not None:
                region = most_probable(logits, normalisers[rows], want.truncation)
                truncated[rows], gradient = region_entropy(region, want.truncation.mass_preserving)
                if want.truncation.top_k == 1:
                    truncated[rows], gradient = normalisers[rows] - region.logits[:, 0], gradient - 1
                kept[rows] = region.inside.sum(1).float()
                shares = (region.logits - normalisers[rows, None]).exp()
                mass[rows] = torch.where(region.inside, shares, 0.0).sum(1)
                if any(ctx.needs_input_grad):
                    ids.append(region.ids)
                    gradients.append(gradient)
            if want.entropy:
                shifted = logits.sub_(normalisers[rows, None])
                entropies[rows] = -(shifted.exp() * shifted).sum(1)
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
        gradients = _Gradients(hidden, weight, bias, (needed[0], needed[1], needed[3]))
        for number, rows in enumerate(_chunks(len(hidden), len(weight), want.chunk_logits)):
            logits = _logits(hidden[rows], weight, bias, want.temperature)
            shifted = logits.sub_(normalisers[rows, None])  # log p of every word
            probabilities = shifted.exp()
            outer = grad_log_probs[rows, None]
            common = outer  # of all words, by their probability
            if want.truncation is not None and want.truncation.top_k == 1:
                common = outer - grad_truncated[rows, None]
            if want.entropy:  # dH/dz = -p (log p + H)
                weights = shifted.add_(entropies[rows, None]).mul_(grad_entropy[rows, None]).add_(common)
                gradient = probabilities.mul_(weights).neg_()
            else:
                gradient = probabilities.mul_(-common)
            gradient.scatter_add_(1, targets[rows, None], outer)
            if want.truncation is not None:
                ids, inner = regions[number], regions[len(regions) // 2 + number]
                gradient.scatter_add_(1, ids, inner * grad_truncated[rows, None])
            if want.temperature != 1:
                gradient.div_(want.temperature)
            gradients.add(rows, gradient, hidden, weight)
        weight_grad = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        bias_grad = None if gradients.bias is None else gradients.bias.to(bias.dtype)
        return gradients.hidden, weight_grad, None, bias_grad, None
