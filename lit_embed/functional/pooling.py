"""From token states to one vector a text."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["mean", "cls", "last", "eos"]


def end_index(attention_mask: Tensor) -> Tensor:
    """Position of the last token of each row, under left or right padding: Long ``(B,)`` from a ``(B, L)`` mask."""
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).to(torch.uint8).argmax(dim=1)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Pool token states.

    Args:
        hidden: Token states ``(B, L, D)``.
        attention_mask: ``(B, L)``, 1 = keep, 0 = padding (on either side).
        pooling: ``mean`` over tokens; ``cls`` the first token; ``last`` and ``eos`` the last token (``eos`` promises
            that the tokenizer has put the end-of-sequence token there).

    Returns:
        ``(B, D)`` in the dtype of ``hidden``; the mean is taken in float32.

    Raises:
        ValueError: ``pooling`` is unknown.
    """
    if pooling == "mean":
        keep = attention_mask[:, :, None].to(torch.float32)
        return ((hidden.float() * keep).sum(1) / keep.sum(1).clamp(min=1)).to(hidden.dtype)
    if pooling == "cls":
        index = attention_mask.to(torch.uint8).argmax(dim=1)
    elif pooling in ("last", "eos"):
        index = end_index(attention_mask)
    else:
        raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def finish(embeddings: Tensor, dimensions: int | None, normalize: bool) -> Tensor:
    """Keep the first ``dimensions`` values (matryoshka), then scale rows to length 1; float32 ``(B, dimensions)``."""
    embeddings = embeddings.float()
    if dimensions is not None:
        embeddings = embeddings[:, :dimensions]
    return F.normalize(embeddings, dim=-1) if normalize else embeddings
