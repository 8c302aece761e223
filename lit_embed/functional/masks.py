"""Additive attention masks of shape ``(B, 1, L, L)``: 0 where a row may attend a column, the dtype's minimum elsewhere.

Float masks, never boolean ones: eager attention adds a boolean mask as 0/1. In every mask a padding row sees itself
and nothing else, so that no row is without a key (softmax over nothing is NaN or a mean over everything, depending on
the kernel), and no other row sees it.
"""

import torch
from torch import Tensor


def causal(valid: Tensor, end_index: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each token sees itself and the tokens before it.

    Args:
        valid: Bool ``(B, L)``, True = token, False = padding.
        end_index: Not used; taken so that all masks are called alike.
        dtype: Floating dtype of the mask, the model's dtype.

    Returns:
        Additive mask ``(B, 1, L, L)``.
    """
    return _additive(_past(valid), valid, dtype)


def bidirectional(valid: Tensor, end_index: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each token sees every token. Arguments and result as in :func:`causal`."""
    length = valid.shape[1]
    return _additive(torch.ones(1, length, length, dtype=torch.bool, device=valid.device), valid, dtype)


def attention_stop(valid: Tensor, end_index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Causal, and tokens after the end token see no token before it (LLM-QL, attention stop).

    Row ``i`` may attend column ``j`` iff ``j <= i`` and not (``i > end`` and ``j < end``) and ``j`` is a token.

    Args:
        valid: Bool ``(B, L)``, True = token, False = padding.
        end_index: Long ``(B,)``, position of the end token in each row.
        dtype: Floating dtype of the mask, the model's dtype.

    Returns:
        Additive mask ``(B, 1, L, L)``.

    Raises:
        ValueError: ``end_index`` does not hold one position a row.
    """
    if end_index.shape != valid.shape[:1]:
        raise ValueError(f"end_index must have shape ({len(valid)},), got {tuple(end_index.shape)}")
    position = torch.arange(valid.shape[1], device=valid.device)
    after = position > end_index[:, None]  # (B, L) rows behind the end token
    before = position < end_index[:, None]  # (B, L) columns in front of it
    return _additive(_past(valid) & ~(after[:, :, None] & before[:, None, :]), valid, dtype)


def _past(valid: Tensor) -> Tensor:
    position = torch.arange(valid.shape[1], device=valid.device)
    return (position[:, None] >= position[None, :])[None]  # (1, L, L)


def _additive(allowed: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Drop padding columns, let padding rows see themselves, turn True/False into 0/minimum once (never add two)."""
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    allowed = (allowed & valid[:, None, :] & valid[:, :, None]) | itself  # (B, L, L)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=valid.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
