"""Additive attention masks of shape ``(B, 1, L, L)``: 0 where a row may attend a column, the dtype's minimum elsewhere.

Float masks, never boolean ones: eager attention adds a boolean mask as 0/1. In every mask a padding row sees itself
and nothing else, so that no row is without a key (softmax over nothing is NaN or a mean over everything, depending on
the kernel), and no other row sees it.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_core.errors import InputError

Bridge = Literal["collaborative", "strict", "one_way"]


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
    rows, columns = _around(end_index, valid)
    return _additive(_past(valid) & ~((rows > 0) & (columns < 0)), valid, dtype)


def collaborative(valid: Tensor, end_index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two blocks that meet in one token, which reads both (CoCoA, figure; card section 2.2).

    The tokens before the end token see each other and it; the tokens behind it likewise; the end token sees every
    token. From the second layer on the first block thus depends on the second, through the end token.

    Args:
        valid: Bool ``(B, L)``, True = token, False = padding, on any side or between the blocks.
        end_index: Long ``(B,)``, position of the end token (the bridge) in each row.
        dtype: Floating dtype of the mask, the model's dtype.

    Returns:
        Additive mask ``(B, 1, L, L)``.

    Raises:
        ValueError: ``end_index`` does not hold one position a row.
    """
    rows, columns = _around(end_index, valid)
    allowed = (rows == 0) | ((rows < 0) & (columns <= 0)) | ((rows > 0) & (columns >= 0))
    return _additive(allowed, valid, dtype)


def strict(valid: Tensor, end_index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As :func:`collaborative`, but the end token sees only itself and what stands before it.

    The first block and the end token are then blind to the second block in every layer.
    """
    rows, columns = _around(end_index, valid)
    allowed = ((rows <= 0) & (columns <= 0)) | ((rows > 0) & (columns >= 0))
    return _additive(allowed, valid, dtype)


def one_way(valid: Tensor, end_index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As :func:`strict`, and the tokens before the end token do not see it either; it only collects."""
    rows, columns = _around(end_index, valid)
    allowed = ((rows < 0) & (columns < 0)) | ((rows == 0) & (columns <= 0)) | ((rows > 0) & (columns >= 0))
    return _additive(allowed, valid, dtype)


def bridge_mask(bridge: Bridge, valid: Tensor, end_index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask of that name; arguments and result as in :func:`collaborative`.

    Raises:
        InputError: There is no such bridge.
    """
    masks = {"collaborative": collaborative, "strict": strict, "one_way": one_way}
    if bridge not in masks:
        raise InputError(f"bridge must be one of {', '.join(get_args(Bridge))}, got {bridge!r}")
    return masks[bridge](valid, end_index, dtype)


def _around(end_index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Place of rows ``(B, L, 1)`` and columns ``(B, 1, L)`` relative to the end token: below 0 in front of it."""
    if end_index.shape != valid.shape[:1]:
        raise ValueError(f"end_index must have shape ({len(valid)},), got {tuple(end_index.shape)}")
    place = torch.arange(valid.shape[1], device=valid.device) - end_index[:, None]
    return place[:, :, None], place[:, None, :]


def _past(valid: Tensor) -> Tensor:
    position = torch.arange(valid.shape[1], device=valid.device)
    return (position[:, None] >= position[None, :])[None]  # (1, L, L)


def _additive(allowed: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Drop padding columns, let padding rows see themselves, turn True/False into 0/minimum once (never add two)."""
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    allowed = (allowed & valid[:, None, :] & valid[:, :, None]) | itself  # (B, L, L)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=valid.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
