"""Positions of text and image tokens."""

import torch
from torch import Tensor


def mrope_positions(valid: Tensor, image_start: Tensor, grid: Tensor) -> Tensor:
    """Multimodal rotary positions of rows with at most one image (Qwen2-VL, section 2.1).

    Text counts on in all three directions; an image's tokens share the temporal position at which it begins and go on
    from there by row and column; the text behind it goes on behind the larger of the two. The same as transformers'
    ``get_rope_index``, which walks through the tokens one by one.

    Args:
        valid: Bool ``(B, L)``, True = token, False = padding on either side.
        image_start: Long ``(B,)``, tokens in front of the image's first one, padding not counted.
        grid: Long ``(B, 2)``, rows and columns of the image in tokens; zeros where there is none.

    Returns:
        Long ``(3, B, L)``: temporal, height, width; 0 at padding.
    """
    index = (valid.long().cumsum(1) - 1).clamp(min=0)
    rows, columns = grid[:, :1], grid[:, 1:]
    place = index - image_start[:, None]  # among the image's tokens
    inside = (place >= 0) & (place < rows * columns)
    text = torch.where(place >= rows * columns, index - rows * columns + torch.maximum(rows, columns), index)
    row, column = place // columns.clamp(min=1), place % columns.clamp(min=1)
    moved = image_start[:, None] + torch.stack([torch.zeros_like(row), row, column])
    return torch.where(inside, moved, text).masked_fill(~valid, 0)
