"""Losses of content reconstruction on a multimodal encoder (CoCoA, card sections 2.1 and 2.2)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lit_core.lm_head import IGNORE_INDEX, cross_entropy
from lit_core.tokens import Tokens
from lit_embed.functional import masks
from lit_embed.functional.masks import Bridge, bridge_mask
from lit_embed.functional.reconstruction import label_states, masked_patch_loss, place_hidden
from lit_embed.modules.bridge_attention import (
    NAME,
    arrange,
    bridge_layout,
    pairs_per_token,
    split_saves,
    text_decoder,
)
from lit_embed.modules.bridge_decoder import BridgeForm, DecoderRows, bridge_states, check_form
from lit_embed.modules.image_reconstruction import ImageReconstruction, position_embeddings
from lit_embed.modules.multimodal import MultimodalEncoder
from lit_embed.modules.multimodal_batches import ReconstructionBatch
from lit_embed.modules.multimodal_tokens import PaddedRows


class Chunk(NamedTuple):
    """Rows of one forward pass with their labels.

    Args:
        padded: What is read.
        labels: Long ``(B, L)``, -100 where nothing is predicted.
        rows: Their numbers in the batch.
    """

    padded: PaddedRows
    labels: Tensor
    rows: list[int]


def chunks_of(encoder: MultimodalEncoder, batch: ReconstructionBatch) -> Iterator[Chunk]:
    """Length-sorted chunks of a batch; idle ones, which sharded ranks run to stay in step, predict nothing."""
    plan, idle = encoder.plan(batch.tokens)
    labels = Tokens(batch.labels, batch.tokens.lengths)
    for number, rows in enumerate(plan + idle):
        padded, spare = encoder.pad_chunk(batch.tokens, rows)
        found, _ = labels.pad(rows, IGNORE_INDEX)
        if spare or number >= len(plan):
            kept = torch.full_like(padded.ids, IGNORE_INDEX)
            if number < len(plan):
                kept[: len(rows), : found.shape[1]] = found
            found = kept
        yield Chunk(padded, found, list(rows) if number < len(plan) else [])


def caption_loss(encoder: MultimodalEncoder, batch: ReconstructionBatch) -> Tensor:
    """Next-token prediction under causal attention, the mean over the labels, shape ``()``."""
    return _token_loss(encoder, batch, lambda chunk: encoder.states(chunk.padded, None))


def warmup_losses(
    encoder: MultimodalEncoder, head: ImageReconstruction, batch: ReconstructionBatch
) -> tuple[Tensor, Tensor]:
    """Masked next-token prediction and the regression of hidden pixels, all tokens seeing all: ``L_mntp, L_mae``.

    Args:
        encoder: With a language-model head.
        head: Predicts pixels.
        batch: With hidden text, and hidden patches or none.
    """
    predicted: list[Tensor] = []
    chosen: list[Tensor] = []
    flags, targets = _by_image(batch)

    def states_of(chunk: Chunk) -> Tensor:
        padded, rows = chunk.padded, chunk.rows
        mask = masks.bidirectional(padded.mask.bool(), dtype=encoder.dtype)
        states = encoder.states(padded, mask)
        numbers = [batch.tokens.images[row] for row in rows if batch.tokens.images[row] >= 0]
        image_tokens = padded.ids == encoder.image_token
        image_tokens[len(rows) :] = False
        shown = [flags[number] for number in numbers] if flags else []
        hidden = place_hidden(image_tokens, torch.cat(shown)) if shown else torch.zeros_like(image_tokens)
        rotations = position_embeddings(encoder.model, states, padded.positions)
        predicted.append(head(states, mask, rotations, hidden))
        chosen.extend(targets[number] for number in numbers if flags)
        return states

    text = _token_loss(encoder, batch, states_of)
    predictions = torch.cat(predicted)
    wanted = torch.cat(chosen) if chosen else predictions.new_zeros(0, predictions.shape[1])
    return text, masked_patch_loss(predictions, wanted) + predictions.sum() * 0


def bridge_loss(
    encoder: MultimodalEncoder, batch: ReconstructionBatch, bridge: Bridge = "collaborative", form: BridgeForm = "auto"
) -> Tensor:
    """Masked next-token prediction of targets that only their bridge token tells of their contexts: ``L2``.

    Args:
        encoder: With a language-model head.
        batch: Rows ``[A, E, B]``.
        bridge: Who sees whom.
        form: How it is computed; all are exact.
    """
    return _token_loss(encoder, batch, lambda chunk: bridged_states(encoder, chunk.padded, bridge, form))


def bridged_states(encoder: MultimodalEncoder, padded: PaddedRows, bridge: Bridge, form: BridgeForm) -> Tensor:
    """Final states ``(B, L, width)`` of rows ``[A, E, B]`` under a bridge; those of padding mean nothing."""
    check_form(encoder.model, bridge, form)
    valid, decoder = padded.mask.bool(), text_decoder(encoder.model)
    if form == "two_pass":
        rows = DecoderRows(valid, inputs_embeds=encoder.embed(padded), position_ids=padded.positions)
        return bridge_states(encoder.model, rows, padded.ends, bridge, form)
    if form != "dense" and decoder.config._attn_implementation == NAME:
        arrangement = arrange(valid, padded.ends)
        lengths = arrangement.context, arrangement.target, valid.shape[1]
        if form == "split" or split_saves(bridge, *lengths, pairs_per_token(decoder)):
            moved = replace(
                padded,
                ids=arrangement.move(padded.ids),
                mask=arrangement.valid.long(),
                positions=torch.stack([arrangement.move(one) for one in padded.positions]),
            )
            unused = torch.zeros(1, 1, 1, 1, device=valid.device)  # handed through; the layers follow the layout
            states = encoder.states(moved, unused, bridge=bridge_layout(bridge, arrangement))
            return arrangement.restore(states)
    return encoder.states(padded, bridge_mask(bridge, valid, padded.ends, encoder.dtype))


@torch.no_grad()
def end_shift(encoder: MultimodalEncoder, batch: ReconstructionBatch, bridge: Bridge, form: BridgeForm) -> Tensor:
    """Cosine distance between the bridge token's state beside its target and that without one, the mean, ``()``.

    It is what the encoder meets in training and not when it is used: 0 under ``strict`` and ``one_way``.
    """
    distances = []
    for chunk in chunks_of(encoder, batch):
        padded, number = chunk.padded, torch.arange(len(chunk.padded.ids), device=chunk.padded.ids.device)
        beside = bridged_states(encoder, padded, bridge, form)[number, padded.ends]
        columns = torch.arange(padded.ids.shape[1], device=padded.ids.device)
        context = padded.mask * (columns <= padded.ends[:, None])
        rule = masks.one_way if bridge == "one_way" else masks.strict  # what A and E see without B
        alone = encoder.states(replace(padded, mask=context), rule(context.bool(), padded.ends, encoder.dtype))
        similar = torch.cosine_similarity(beside.float(), alone[number, padded.ends].float())
        distances.append((1 - similar)[: len(chunk.rows)])
    return torch.cat(distances).mean()


@torch.no_grad()
def reconstruct(encoder: MultimodalEncoder, batch: ReconstructionBatch, bridge: Bridge, form: BridgeForm) -> Tensor:
    """The likeliest token wherever one is hidden, Long ``(sum of lengths,)``; -100 elsewhere."""
    found = torch.full_like(batch.labels, IGNORE_INDEX)
    starts = torch.tensor([0, *batch.tokens.lengths], device=found.device).cumsum(0)
    weight = encoder.head_weight
    for chunk in chunks_of(encoder, batch):
        if not chunk.rows:
            continue
        valid = chunk.padded.mask.bool()
        states = bridged_states(encoder, chunk.padded, bridge, form)
        predicting, _ = label_states(states, chunk.labels, valid)
        rows, columns = (chunk.labels != IGNORE_INDEX).nonzero(as_tuple=True)
        first = starts[torch.tensor(chunk.rows, device=found.device)]
        found[first[rows] + columns] = (predicting @ weight.to(predicting.dtype).T).argmax(1)
    return found


def _token_loss(encoder: MultimodalEncoder, batch: ReconstructionBatch, states_of: Callable[[Chunk], Tensor]) -> Tensor:
    """Mean cross-entropy of the labels, each predicted from the state before it; chunk by chunk, one head."""
    predicting, targets, idle = [], [], []
    for chunk in chunks_of(encoder, batch):
        states = states_of(chunk)
        found, wanted = label_states(states, chunk.labels, chunk.padded.mask.bool())
        predicting.append(found)
        targets.append(wanted)
        idle.append(states.sum() * 0)
    return cross_entropy(torch.cat(predicting), encoder.head_weight, torch.cat(targets)) + torch.stack(idle).sum()


def _by_image(batch: ReconstructionBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Flags and targets of each image; empty where nothing is hidden."""
    if batch.images is None:
        return [], []
    tokens = batch.tokens
    counts = [frames * rows * columns // tokens.merge**2 for frames, rows, columns in tokens.grids]
    flags = list(batch.images.hidden.split(counts))
    return flags, list(batch.images.targets.split([int(flag.sum()) for flag in flags]))
