"""Precision@1 over lists of candidates, of which one is right, with a stated rule for equal scores."""

from typing import Literal

from torch import Tensor

Ties = Literal["wrong", "random", "compat"]


def precision_at_1(scores: Tensor, right: Tensor, ties: Ties = "wrong") -> Tensor:
    """Whether the right candidate has the best score, for each query.

    Where others have the same best score the rule decides. Lists that put the right candidate first and take the first
    of the best ones, as MMEB's evaluation does, give a model whose embeddings are all equal full marks; the default
    gives it none.

    Args:
        scores: ``(Q, N)``, higher is better, no NaN.
        right: Column of each query's right candidate, long ``(Q,)``.
        ties: ``wrong`` counts a tie with another candidate as wrong; ``random`` gives the expected value if one of the
            ``n`` best were drawn, ``1 / n``; ``compat`` counts a tie as right, as the authors do.

    Returns:
        ``(Q,)``, float32, between 0 and 1.

    Raises:
        ValueError: The shapes do not fit, or the rule is unknown.
    """
    if scores.ndim != 2 or right.shape != scores.shape[:1]:
        raise ValueError(f"need scores (Q, N) and right (Q,), got {tuple(scores.shape)} and {tuple(right.shape)}")
    own = scores.gather(1, right.unsqueeze(1))
    best = (scores > own).sum(1) == 0
    equal = (scores == own).sum(1)  # at least the right one itself
    match ties:
        case "wrong":
            return (best & (equal == 1)).float()
        case "random":
            return best.float() / equal
        case "compat":
            return best.float()
        case _:
            raise ValueError(f"ties must be wrong, random or compat, got '{ties}'")
