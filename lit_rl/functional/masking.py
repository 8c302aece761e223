"""Which tokens of a response count, and means, variances and whitening over them.

Tensors are ``(B, T)``: a row a response, right-padded. Masks are boolean, True = a token that the policy chose.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over the ranks
WHITENING_EPSILON = 1e-8  # added to the variance


def identity(tensor: Tensor) -> Tensor:
    """The sum over one rank."""
    return tensor


def response_mask(responses: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Mark the tokens of responses up to and including the first end token; all of them where there is none.

    Args:
        responses: Long ``(B, T)``.
        end_ids: All ids that end a response.
    """
    ends = torch.isin(responses, torch.tensor(list(end_ids), dtype=responses.dtype, device=responses.device))
    return ends.cumsum(1) - ends.long() == 0


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Mean over the tokens that count on all ranks, shape ``()``; 0 where none does."""
    total, count = reduce(torch.stack([_zeroed(values, mask).sum(), mask.sum().to(values.dtype)]))
    return total / count.clamp(min=1)


def whiten(values: Tensor, mask: Tensor, unbiased: bool = True, reduce: Reduce = identity) -> Tensor:
    """Subtract the mean and divide by the standard deviation over all tokens that count, in float32.

    Args:
        values: ``(B, T)``; the whole rollout batch, not a part of it.
        mask: Bool ``(B, T)``.
        unbiased: Divide the squares by ``n - 1`` (verl, TRL) or by ``n`` (OpenRLHF).
        reduce: Sums over ranks.

    Returns:
        Float32 ``(B, T)``, 0 where the mask is False. A single token becomes 0.
    """
    values = values.float()
    mean = masked_mean(values, mask, reduce)
    centred = _zeroed(values - mean, mask)
    squares, count = reduce(torch.stack([centred.square().sum(), mask.sum().float()]))
    variance = squares / (count - 1 if unbiased else count).clamp(min=1)
    return centred * (variance + WHITENING_EPSILON).rsqrt()


def _zeroed(values: Tensor, mask: Tensor) -> Tensor:
    """Values where the mask is True, else 0, whatever stands there (NaN and infinity too)."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
