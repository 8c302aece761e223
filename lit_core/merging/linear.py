"""Weighted averages of weights."""

from collections.abc import Sequence

from torch import Tensor


def linear(models: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """``sum_i w_i model_i / sum_i w_i``; a base has no part in it.

    Args:
        models: A tensor of each model, of one shape and a floating type of at least 32 bits.
        weights: One a model; their sum is not 0.
        base: Ignored.
    """
    total = sum(weights)
    merged = models[0] * (weights[0] / total)
    for model, weight in zip(models[1:], weights[1:], strict=True):
        merged.add_(model, alpha=weight / total)
    return merged
