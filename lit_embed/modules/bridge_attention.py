"""The bridges without a square mask: two or three attention calls on slices of a batch (CoCoA, card 2.4, form 2).

A row ``[A, E, B]`` is laid out ``[padding, A, E | B, padding]``, so that the end tokens E of all rows stand in one
column. What the rows of a block may see is then a slice of the keys, and nothing has to be gathered: A sees the columns
up to E, B those from E on, and E, where it reads both sides, all. Only padding inside a slice needs a mask, of one row
for all queries; where no row of the batch has any there is none, and the fastest kernels apply.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_core.backbones import unwrap
from lit_core.errors import InputError
from lit_embed.functional.masks import Bridge

NAME = "bridge_split"


class Block(NamedTuple):
    """Queries that see the same keys.

    Args:
        rows: Columns of the queries.
        keys: Columns of the keys.
        mask: Bool ``(B, 1, 1, keys)``, True = token; None where there is no padding.
    """

    rows: slice
    keys: slice
    mask: Tensor | None


@dataclass(frozen=True)
class BridgeLayout:
    """What each column of a batch may see.

    Args:
        blocks: They follow one another and cover all queries.
    """

    blocks: tuple[Block, ...]

    def additive(self, batch: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The same as a mask ``(B, 1, rows, keys)`` of zeros and minima, for models without this attention."""
        rows = self.blocks[-1].rows.stop
        mask = torch.full((batch, 1, rows, keys), torch.finfo(dtype).min, dtype=dtype, device=device)
        for block in self.blocks:
            part = mask[:, :, block.rows, block.keys]
            part.fill_(0) if block.mask is None else part.masked_fill_(block.mask, 0)
        return mask


@dataclass(frozen=True)
class Arrangement:
    """A batch moved to ``[padding, A, E | B, padding]``.

    Args:
        columns: Long ``(B, W)``, the given column of each new one; that of the end token where padding is.
        places: Long ``(B, L)``, the new column of each given one; that of the end token for padding.
        valid: Bool ``(B, W)``, True = token, False = padding.
        end: New column of all end tokens.
        full: No row has padding: in ``[A, E]``, in ``[E, B]``.
    """

    columns: Tensor
    places: Tensor
    valid: Tensor
    end: int
    full: tuple[bool, bool]

    @property
    def context(self) -> int:
        """Columns of A."""
        return self.end

    @property
    def target(self) -> int:
        """Columns of B."""
        return self.valid.shape[1] - self.end - 1

    def move(self, values: Tensor) -> Tensor:
        """Values ``(B, L)`` or ``(B, L, D)`` in the new columns; padding repeats the end token."""
        return _take(values, self.columns)

    def restore(self, values: Tensor) -> Tensor:
        """Values ``(B, W)`` or ``(B, W, D)`` in the given columns; padding holds nothing of meaning."""
        return _take(values, self.places)


def arrange(valid: Tensor, end_index: Tensor) -> Arrangement:
    """Find the columns of a batch in which all end tokens stand together; copies five numbers to the host.

    Args:
        valid: Bool ``(B, L)``, True = token, False = padding, which may be anywhere.
        end_index: Long ``(B,)``, column of each row's end token.

    Raises:
        ValueError: ``end_index`` has another shape or points at padding.
    """
    if end_index.shape != valid.shape[:1]:
        raise ValueError(f"end_index must have shape ({len(valid)},), got {tuple(end_index.shape)}")
    count = valid.long().cumsum(1)
    until_end = count.gather(1, end_index[:, None])
    before, behind = until_end - 1, count[:, -1:] - until_end
    on_token = valid.gather(1, end_index[:, None]).all().long()
    numbers = torch.stack([on_token, before.max(), before.min(), behind.max(), behind.min()]).tolist()
    if not numbers[0]:
        raise ValueError("end_index must point at tokens, but some of it points at padding")
    end, width = numbers[1], numbers[1] + 1 + numbers[3]
    spare = torch.where(valid, count - until_end + end, width)  # padding goes to a column that is cut off
    given = torch.arange(valid.shape[1], device=valid.device).expand_as(spare)
    columns = end_index[:, None].repeat(1, width + 1).scatter_(1, spare, given)[:, :width]
    moved = torch.zeros(len(valid), width + 1, dtype=torch.bool, device=valid.device).scatter_(1, spare, valid)
    full = (numbers[1] == numbers[2], numbers[3] == numbers[4])
    return Arrangement(columns, torch.where(valid, spare, end), moved[:, :width], end, full)


def _take(values: Tensor, columns: Tensor) -> Tensor:
    first = torch.arange(len(values), device=columns.device)[:, None] * values.shape[1]
    chosen = values.flatten(0, 1).index_select(0, (first + columns).flatten())
    return chosen.view(*columns.shape, *values.shape[2:])


def bridge_layout(bridge: Bridge, arrangement: Arrangement) -> BridgeLayout:
    """The calls of a bridge: three for ``collaborative`` and ``one_way``, two for ``strict``; fewer without A or B."""
    end, width = arrangement.end, arrangement.valid.shape[1]
    head, tail = slice(0, end + 1), slice(end, width)
    full_head, full_tail = arrangement.full

    def block(rows: slice, keys: slice, full: bool) -> Block:
        return Block(rows, keys, None if full else key_mask(arrangement.valid[:, keys]))

    target = block(slice(end + 1, width), tail, full_tail)
    if bridge == "strict":
        blocks = [block(head, head, full_head), target]
    else:
        context, itself = slice(0, end), slice(end, end + 1)
        if bridge == "collaborative":
            blocks = [block(context, head, full_head), block(itself, slice(0, width), full_head and full_tail), target]
        else:
            blocks = [block(context, context, full_head), block(itself, head, full_head), target]
    return BridgeLayout(tuple(one for one in blocks if one.rows.start < one.rows.stop))


def key_mask(valid: Tensor) -> Tensor:
    """Mask ``(B, 1, 1, keys)`` of the keys' padding; where there is nothing else, none is masked (no NaN)."""
    return (valid | ~valid.any(1, keepdim=True))[:, None, None]


def bridge_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    bridge: BridgeLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; without ``bridge`` it is the ordinary one.

    Args:
        module: The attention layer.
        query: ``(B, heads, rows, D)``.
        key: ``(B, key heads, keys, D)``.
        value: ``(B, key heads, keys, D)``.
        attention_mask: Ignored where ``bridge`` is given.
        bridge: Layout of the batch.
        **kwargs: Passed on (scaling, dropout).

    Returns:
        ``(B, rows, heads, D)`` and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if bridge is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs["is_causal"] = False
    parts = [
        sdpa_attention_forward(module, query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, **kwargs)[0]
        for rows, keys, mask in bridge.blocks
    ]
    return torch.cat(parts, dim=1), None


def use_bridge_attention(model: nn.Module) -> None:
    """Let the text decoder of a transformers model that runs on sdpa understand ``bridge=BridgeLayout(...)``.

    A vision tower keeps its attention: it is handed the same arguments and must not be cut into blocks.

    Raises:
        InputError: The decoder runs on another attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    decoder = text_decoder(model)
    if decoder.config._attn_implementation not in ("sdpa", NAME):
        found = decoder.config._attn_implementation
        raise InputError(f"bridges without a mask need sdpa attention, got {found}; use form dense with eager")
    AttentionInterface.register(NAME, bridge_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    decoder.set_attn_implementation(NAME)


def text_decoder(model: nn.Module) -> Any:
    """The layers of a transformers model that read text, without its head and its vision tower."""
    return unwrap(model).get_decoder()


def allowed_pairs(bridge: Bridge, context: int, target: int) -> int:
    """Pairs of query and key that a bridge allows in a row of ``context`` and ``target`` tokens and an end token.

    They are what form split computes; a square mask computes ``(context + 1 + target) ** 2``.
    """
    pairs = {
        "collaborative": context * (context + 1) + (context + 1 + target),
        "strict": (context + 1) ** 2,
        "one_way": context**2 + (context + 1),
    }
    return pairs[bridge] + target * (target + 1)


def split_saves(bridge: Bridge, context: int, target: int, length: int, token_pairs: float = 0.0) -> bool:
    """Whether form split costs less than a square mask.

    Args:
        bridge: Who sees whom.
        context: Tokens of the longest A of a batch.
        target: Tokens of the longest B; together with A it may be longer than any row.
        length: Columns under a square mask, those of the longest row.
        token_pairs: What else is done for a token, in pairs of attention (:func:`pairs_per_token`).
    """
    split = allowed_pairs(bridge, context, target) + token_pairs * (context + 1 + target)
    return split < length**2 + token_pairs * length


def pairs_per_token(decoder: Any) -> float:
    """How many pairs of attention cost as much as the linear layers do for a token, counting multiplications."""
    config = decoder.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(parameter.numel() for parameter in decoder.layers[0].parameters())
    return weights / (2 * config.num_attention_heads * width)
