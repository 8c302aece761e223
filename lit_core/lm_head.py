"""The language-model head without a ``(tokens, vocabulary)`` tensor: row chunks, float32 logits, exact gradients.

``cross_entropy`` forms its gradient during the forward pass (three matrix products in all, as for full logits).
``token_log_probs`` serves losses that weight each token by themselves (policy gradients, re-ranking): it recomputes the
logits chunk by chunk in the backward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
CHUNK_LOGITS = 1 << 23  # logits held at once: 32 MiB of float32, which stays near the caches of a CPU


class TokenLogProbs(NamedTuple):
    """Per-token results, each float32 ``(N,)`` in nats."""

    log_probs: Tensor
    entropy: Tensor | None


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
    chunk_logits: int = CHUNK_LOGITS,
) -> TokenLogProbs:
    """Log-probability of each target and, on request, the entropy of each distribution; both differentiable.

    Args:
        hidden: States ``(N, D)``.
        weight: Head weight ``(V, D)``.
        targets: Long ``(N,)``.
        bias: Head bias ``(V,)``.
        entropy: Also return the entropy over the whole vocabulary.
        chunk_logits: Logits formed at once; bounds the memory.
    """
    log_probs, entropies = _TokenLogProbs.apply(hidden, weight, targets, bias, entropy, chunk_logits)  # type: ignore[no-untyped-call]
    return TokenLogProbs(log_probs, entropies if entropy else None)


def _chunks(rows: int, vocabulary: int, chunk_logits: int) -> list[slice]:
    step = max(1, chunk_logits // vocabulary)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 logits; the product runs in the inputs' dtype, which is what the full head would do."""
    logits = (hidden @ weight.T).float()
    return logits if bias is None else logits.add_(bias.float())


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
    """Log-probs and entropies per row; keeps the normalisers and recomputes the logits in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, entropy: bool, chunk_logits: int
    ) -> tuple[Tensor, Tensor]:
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        normalisers, entropies = torch.empty_like(log_probs), torch.zeros_like(log_probs)
        for rows in _chunks(len(hidden), len(weight), chunk_logits):
            logits = _logits(hidden[rows], weight, bias)
            normalisers[rows] = logits.logsumexp(1)
            log_probs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normalisers[rows]
            if entropy:
                shifted = logits.sub_(normalisers[rows, None])
                entropies[rows] = -(shifted.exp() * shifted).sum(1)
        ctx.save_for_backward(hidden, weight, targets, bias, normalisers, entropies)
        ctx.entropy, ctx.chunk_logits = entropy, chunk_logits
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, normalisers, entropies = ctx.saved_tensors
        needed = ctx.needs_input_grad
        gradients = _Gradients(hidden, weight, bias, (needed[0], needed[1], needed[3]))
        for rows in _chunks(len(hidden), len(weight), ctx.chunk_logits):
            shifted = _logits(hidden[rows], weight, bias).sub_(normalisers[rows, None])  # log p of every word
            probabilities = shifted.exp()
            outer = grad_log_probs[rows, None]
            if ctx.entropy:  # dH/dz = -p (log p + H)
                weights = shifted.add_(entropies[rows, None]).mul_(grad_entropy[rows, None]).add_(outer)
                gradient = probabilities.mul_(weights).neg_()
            else:
                gradient = probabilities.mul_(-outer)
            gradients.add(rows, gradient.scatter_add_(1, targets[rows, None], outer), hidden, weight)
        weight_grad = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        bias_grad = None if gradients.bias is None else gradients.bias.to(bias.dtype)
        return gradients.hidden, weight_grad, None, bias_grad, None, None
