"""Task arithmetic: sums of task vectors, the differences between models and the base that they were trained from."""

from collections.abc import Sequence

from torch import Tensor


def task_arithmetic(models: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
    """``base + sum_i w_i (model_i - base)`` (Ilharco et al., arXiv 2212.04089, section 2).

    Args:
        models: A tensor of each model, of one shape and a floating type of at least 32 bits.
        weights: One a model; their sum need not be 1.
        base: The same tensor of the base.
    """
    assert base is not None  # the caller asks for one
    merged = base.clone()
    for model, weight in zip(models, weights, strict=True):
        merged.add_(model - base, alpha=weight)
    return merged
