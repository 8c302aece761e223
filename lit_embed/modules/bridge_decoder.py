"""Token states under a bridge, in three equal forms, on any transformers decoder (CoCoA, card sections 2.2 and 2.4).

- ``dense``: one 4D mask, the reference (form 1 of the card);
- ``split``: two or three attention calls a layer without a square mask (form 2);
- ``two_pass``: contexts ``[A, E]`` with a cache, then targets B on the end token's keys and values (form 3). Exact
  where B reaches neither A nor E: under ``strict``, and under ``one_way`` if the first pass keeps A blind to E, which
  the bidirectional one does not. Under ``collaborative`` E reads B in every layer: nothing can be done first.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_core.backbones import cache_name
from lit_core.errors import InputError
from lit_embed.functional.masks import Bridge, bridge_mask
from lit_embed.modules.bridge_attention import (
    NAME,
    Arrangement,
    Block,
    BridgeLayout,
    arrange,
    bridge_layout,
    key_mask,
    pairs_per_token,
    split_saves,
    text_decoder,
)

BridgeForm = Literal["auto", "dense", "split", "two_pass"]


@dataclass(frozen=True)
class DecoderRows:
    """A padded batch as a decoder reads it.

    Args:
        valid: Bool ``(B, L)``, True = token, False = padding, which may be anywhere.
        input_ids: Long ``(B, L)``; or
        inputs_embeds: ``(B, L, D)``, images already in their places.
        position_ids: Long ``(B, L)``, or ``(3, B, L)`` for M-RoPE; None counts the tokens.

    Raises:
        ValueError: Both ids and embeddings, or neither.
    """

    valid: Tensor
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    position_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.input_ids is None) == (self.inputs_embeds is None):
            raise ValueError("rows need either input_ids or inputs_embeds")

    @property
    def positions(self) -> Tensor:
        """Long ``(B, L)`` or ``(3, B, L)``."""
        return (self.valid.cumsum(1) - 1).clamp(min=0) if self.position_ids is None else self.position_ids

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of a decoder; with positions, which it cannot derive beside a 4D mask."""
        given = {"input_ids": self.input_ids, "inputs_embeds": self.inputs_embeds, "position_ids": self.positions}
        return {name: value for name, value in given.items() if value is not None}

    def arranged(self, arrangement: Arrangement) -> "DecoderRows":
        """The same tokens in the columns of an arrangement."""
        ids, embeds = (None if x is None else arrangement.move(x) for x in (self.input_ids, self.inputs_embeds))
        layers = self.positions.unbind() if self.positions.ndim == 3 else None
        moved = torch.stack([arrangement.move(one) for one in layers]) if layers else arrangement.move(self.positions)
        return DecoderRows(arrangement.valid, ids, embeds, moved)

    def part(self, columns: slice) -> "DecoderRows":
        """Some of the columns, with their positions."""
        ids, embeds = (None if x is None else x[:, columns] for x in (self.input_ids, self.inputs_embeds))
        return DecoderRows(self.valid[:, columns], ids, embeds, self.positions[..., columns])


@dataclass(frozen=True)
class BridgePrefix:
    """What targets may see of their contexts: the end token, layer by layer.

    Args:
        keys_values: Of each layer two tensors ``(N, key heads, 1, D)``.
        end_states: Final state ``(N, D)`` of the end token: the embedding, and what predicts the first target token.
        end_positions: Long ``(N,)`` or ``(3, N)``, its position.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    end_states: Tensor
    end_positions: Tensor

    def take(self, rows: Tensor) -> "BridgePrefix":
        """Those of some contexts, Long ``(M,)``; one with several targets stands there several times."""
        pairs = [(key[rows], value[rows]) for key, value in self.keys_values]
        return BridgePrefix(pairs, self.end_states[rows], self.end_positions[..., rows])


def check_form(model: nn.Module, bridge: Bridge, form: BridgeForm) -> None:
    """Refuse what cannot be computed, before anything is.

    Raises:
        InputError: Two passes under ``collaborative``, an attention that takes no float mask, or form ``split`` on a
            model without :func:`lit_embed.modules.bridge_attention.use_bridge_attention`.
    """
    attention = text_decoder(model).config._attn_implementation
    if form == "two_pass" and bridge == "collaborative":
        raise InputError("form two_pass needs bridge strict or one_way: under collaborative all tokens hang together")
    if attention not in (NAME, "sdpa", "eager"):
        raise InputError(f"bridges need sdpa or eager attention, got {attention}")
    if form == "split" and attention != NAME:
        raise InputError(f"form split needs use_bridge_attention(model), got plain {attention} attention")


def bridge_states(
    model: nn.Module, rows: DecoderRows, end_index: Tensor, bridge: Bridge = "collaborative", form: BridgeForm = "auto"
) -> Tensor:
    """Final states of rows ``[A, E, B]``, whose blocks meet in the end token E.

    Args:
        model: A transformers model with a text decoder, plain or with adapters.
        rows: The batch.
        end_index: Long ``(B,)``, column of each row's end token.
        bridge: Who sees whom.
        form: How it is computed; ``auto`` takes ``split`` where that saves, else ``dense``. All are exact.

    Returns:
        ``(B, L, D)`` in the given columns; those of padding hold nothing of meaning.

    Raises:
        InputError: What :func:`check_form` raises, or a cache that gradient checkpointing has dropped.
        ValueError: ``end_index`` has another shape or points at padding.
    """
    check_form(model, bridge, form)
    decoder = text_decoder(model)
    if form == "dense" or (form == "auto" and decoder.config._attn_implementation != NAME):
        return _dense(decoder, rows, end_index, bridge)
    arrangement = arrange(rows.valid, end_index)
    if form == "auto":
        lengths = arrangement.context, arrangement.target, rows.valid.shape[1]
        if not split_saves(bridge, *lengths, pairs_per_token(decoder)):
            return _dense(decoder, rows, end_index, bridge)
    states = (_two_pass if form == "two_pass" else _split)(decoder, rows.arranged(arrangement), arrangement, bridge)
    return arrangement.restore(states)


def encode_contexts(model: nn.Module, rows: DecoderRows, bridge: Bridge) -> BridgePrefix:
    """First pass, which several targets of a context can share: rows ``[A, E]``, the last token of each its E.

    Raises:
        InputError: What :func:`check_form` raises, or a cache that gradient checkpointing has dropped.
    """
    check_form(model, bridge, "two_pass")
    columns = torch.arange(rows.valid.shape[1], device=rows.valid.device)
    arrangement = arrange(rows.valid, torch.where(rows.valid, columns, 0).amax(1))
    return _first_pass(text_decoder(model), rows.arranged(arrangement), bridge_layout(bridge, arrangement))[0]


def decode_targets(model: nn.Module, rows: DecoderRows, prefix: BridgePrefix) -> Tensor:
    """Second pass: rows B, each behind the end token of its context; without positions they go on from it.

    Args:
        model: As in :func:`bridge_states`.
        rows: Targets, one for each row of the prefix.
        prefix: What they may see of the contexts; see :meth:`BridgePrefix.take`.

    Returns:
        Final states ``(M, L, D)``; ``prefix.end_states`` belong in front of them.

    Raises:
        InputError: Gradient checkpointing has dropped the cache.
    """
    if rows.position_ids is None:
        rows = replace(rows, position_ids=prefix.end_positions[..., None] + rows.valid.cumsum(1))
    return _second_pass(text_decoder(model), rows, prefix, bool(rows.valid.all()))


def _dense(decoder: Any, rows: DecoderRows, end_index: Tensor, bridge: Bridge) -> Tensor:
    mask = bridge_mask(bridge, rows.valid, end_index, _dtype(decoder, rows))
    return decoder(**rows.inputs, attention_mask=mask, use_cache=False).last_hidden_state


def _split(decoder: Any, rows: DecoderRows, arrangement: Arrangement, bridge: Bridge) -> Tensor:
    attention = _attention(decoder, rows, bridge_layout(bridge, arrangement), rows.valid.shape[1])
    return decoder(**rows.inputs, **attention, use_cache=False).last_hidden_state


def _two_pass(decoder: Any, rows: DecoderRows, arrangement: Arrangement, bridge: Bridge) -> Tensor:
    end, (full_head, full_tail) = arrangement.end, arrangement.full
    contexts, targets = rows.part(slice(0, end + 1)), rows.part(slice(end + 1, None))
    alone = replace(arrangement, valid=contexts.valid, full=(full_head, True))
    prefix, states = _first_pass(decoder, contexts, bridge_layout(bridge, alone))
    if arrangement.target == 0:
        return states
    return torch.cat([states, _second_pass(decoder, targets, prefix, full_tail)], dim=1)


def _first_pass(decoder: Any, rows: DecoderRows, layout: BridgeLayout) -> tuple[BridgePrefix, Tensor]:
    """Rows ``[padding, A, E]``; of the cache the last column is kept, with its graph. Also all final states."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()  # a plain one: that of a model with sliding windows would forget columns
    length = rows.valid.shape[1]
    attention = _attention(decoder, rows, layout, length)
    states = decoder(**rows.inputs, **attention, use_cache=True, **{cache_name(decoder): cache}).last_hidden_state
    _check_cache(cache, length)
    columns = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers]
    return BridgePrefix(columns, states[:, -1], rows.positions[..., -1]), states


def _second_pass(decoder: Any, rows: DecoderRows, prefix: BridgePrefix, full: bool) -> Tensor:
    """All targets see the prefix and their own row; ``full``: there is no padding."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    length = rows.valid.shape[1]
    for layer, (key, value) in enumerate(prefix.keys_values):
        cache.update(key, value, layer)
    seen = torch.cat([torch.ones_like(rows.valid[:, :1]), rows.valid], dim=1)
    layout = BridgeLayout((Block(slice(0, length), slice(0, length + 1), None if full else key_mask(seen)),))
    attention = _attention(decoder, rows, layout, length + 1)
    states = decoder(**rows.inputs, **attention, use_cache=True, **{cache_name(decoder): cache}).last_hidden_state
    _check_cache(cache, length + 1)
    return states


def _check_cache(cache: Any, length: int) -> None:
    if cache.get_seq_length() != length:  # a dropped cache raises no error: targets would just not see their contexts
        raise InputError("form two_pass needs the key-value cache: use form split with gradient checkpointing")


def _attention(decoder: Any, rows: DecoderRows, layout: BridgeLayout, keys: int) -> dict[str, Any]:
    """Arguments that make a decoder follow a layout."""
    device = rows.valid.device
    if decoder.config._attn_implementation == NAME:  # a 4D mask is handed through; the layers ignore it
        return {"attention_mask": torch.zeros(1, 1, 1, 1, device=device), "bridge": layout}
    return {"attention_mask": layout.additive(len(rows.valid), keys, device, _dtype(decoder, rows))}


def _dtype(decoder: Any, rows: DecoderRows) -> torch.dtype:
    embeds = rows.inputs_embeds
    return decoder.get_input_embeddings().weight.dtype if embeds is None else embeds.dtype
