"""Attention stop without a mask: one causal call over documents, one over ``[end, query]`` (card section 2.7, form 4).

A row is laid out ``[document, end, padding | query, padding]``, the query block starting at one column for all rows.
Document rows are plain causal and never see the padding behind them. Query rows see the end token's key and value,
gathered at each row's own position, and themselves. The end token's own query joins the second call, so that this is a
square causal problem, which every kernel has; its output there is dropped.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "attention_stop_split"


@dataclass
class SplitLayout:
    """Where the blocks of a batch lie.

    Args:
        query_start: First column of the query block.
        end_index: Long ``(B,)``, column of each row's end token, below ``query_start``.
    """

    query_start: int
    end_index: Tensor


def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    split: SplitLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; without ``split`` it is the ordinary one.

    Args:
        module: The attention layer.
        query: ``(B, heads, L, D)``.
        key: ``(B, key heads, L, D)``.
        value: ``(B, key heads, L, D)``.
        attention_mask: Ignored where ``split`` is given.
        split: Layout of the batch.
        **kwargs: Passed on (scaling, dropout).

    Returns:
        ``(B, L, heads, D)`` and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if split is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    start, rows = split.query_start, torch.arange(len(query), device=query.device)

    def bridged(states: Tensor) -> Tensor:
        return torch.cat([states[rows, :, split.end_index][:, :, None], states[:, :, start:]], dim=2)

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)[0]

    documents = causal(query[:, :, :start], key[:, :, :start], value[:, :, :start])
    queries = causal(bridged(query), bridged(key), bridged(value))
    return torch.cat([documents, queries[:, 1:]], dim=1), None


def use_split_attention(model: Any) -> None:
    """Let a transformers model that runs on sdpa understand ``split=SplitLayout(...)`` in its forward arguments."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, split_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
