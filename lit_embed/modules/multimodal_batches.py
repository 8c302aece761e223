"""Rows of multimodal data to batches: what each stage of CoCoA learns from, and items to encode."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.lm_head import IGNORE_INDEX
from lit_core.samplers import mix_seed
from lit_core.tokens import Tokens
from lit_embed.functional.reconstruction import draw_masked, hide_patches, mask_tokens, maskable_tokens
from lit_embed.items import Item, Kind
from lit_embed.modules.batches import PairBatch, document_key
from lit_embed.modules.multimodal_tokenization import MultimodalTokenizer
from lit_embed.modules.multimodal_tokens import MultimodalTokens, Row
from lit_embed.multimodal import ContrastiveRow, EncodeRow, ReconstructionRow, WarmupRow


@dataclass
class HiddenImages:
    """Merged image tokens that were overwritten by noise.

    Args:
        hidden: Bool ``(merged tokens,)``, image after image, True = overwritten.
        targets: Float ``(overwritten, merge**2 * pixels of a patch)``, what stood there.
    """

    hidden: Tensor
    targets: Tensor


@dataclass
class ReconstructionBatch:
    """Rows with hidden content, ragged like their tokens.

    Args:
        tokens: What is read: hidden tokens replaced by the mask token, hidden patches by noise.
        labels: Long ``(sum of lengths,)``, the hidden token where one is hidden, -100 elsewhere; not shifted.
        images: What was hidden of the images, in the order of ``tokens.grids``; None where nothing was.
        shuffled: The same targets behind the content of other rows, in validation; None where there is no other one.
    """

    tokens: MultimodalTokens
    labels: Tensor
    images: HiddenImages | None = None
    shuffled: "ReconstructionBatch | None" = field(default=None)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def count(self) -> int:
        """Tokens to predict."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass
class EncodeBatch:
    """Items to encode.

    Args:
        numbers: Of each item.
        tokens: Their rows.
    """

    numbers: list[int]
    tokens: MultimodalTokens


@dataclass(frozen=True)
class Hiding:
    """How much is hidden, and by what.

    Args:
        mask_id: Token that stands for a hidden one.
        never: Ids that are never hidden.
        text: Share of the text's tokens; 0 hides none and predicts them all, one by one.
        image: Share of the image's merged tokens; 0 hides none.
        shared_noise: One row of noise for all hidden patches of an image (MoCa) instead of one each.
    """

    mask_id: int
    never: tuple[int, ...]
    text: float
    image: float = 0.0
    shared_noise: bool = False


class WarmupCollator:
    """Images with captions to a :class:`ReconstructionBatch` (CoCoA, section 2.1); with nothing to hide, captioning.

    Args:
        tokenizer: Of the encoder.
        hiding: How much is hidden.
    """

    def __init__(self, tokenizer: MultimodalTokenizer, hiding: Hiding) -> None:
        self.tokenizer, self.hiding = tokenizer, hiding

    def __call__(self, rows: Sequence[WarmupRow]) -> ReconstructionBatch:
        found = self.tokenizer.rows([row.item for row in rows], "passage")
        kept = [(made, row.seed) for made, row in zip(found, rows, strict=True) if made is not None]
        _check_any(kept)
        # every row has its image to itself: what is hidden of it must not hang on the rows beside
        tokens = self.tokenizer.pack([replace(made, image=copy(made.image)) for made, _ in kept])
        hiding, seeds = self.hiding, [seed for _, seed in kept]
        if hiding.text == 0:
            return ReconstructionBatch(tokens, caption_labels(tokens))
        tokens, labels = hide_tokens(tokens, hiding, seeds, self.tokenizer.tokenizer.pad_token_id)
        if hiding.image == 0 or tokens.pixels is None:
            return ReconstructionBatch(tokens, labels)
        image_seeds = [mix_seed(seed, 1) for number, seed in zip(tokens.images, seeds, strict=True) if number >= 0]
        grids = torch.tensor(tokens.grids)
        patches = hide_patches(tokens.pixels, grids, hiding.image, image_seeds, tokens.merge, hiding.shared_noise)
        images = HiddenImages(patches.hidden, patches.targets)
        return ReconstructionBatch(replace(tokens, pixels=patches.pixel_values), labels, images)


class BridgeCollator:
    """Queries with target texts to rows ``[A, E, B]`` whose B is hidden in part (CoCoA, section 2.2).

    Where a row is too long, the text of A is cut first, never its image or E, and then B, but for its first token.

    Args:
        tokenizer: Of the encoder.
        hiding: How much of B is hidden.
        shuffled: Whether each target also stands behind the query of another row.
    """

    def __init__(self, tokenizer: MultimodalTokenizer, hiding: Hiding, shuffled: bool = False) -> None:
        self.tokenizer, self.hiding, self.shuffled = tokenizer, hiding, shuffled

    def __call__(self, rows: Sequence[ReconstructionRow]) -> ReconstructionBatch:
        ids = self.tokenizer.tokenizer([row.target for row in rows], add_special_tokens=False)["input_ids"]
        contexts = self.tokenizer.rows([row.query for row in rows], "query", list(map(len, ids)))
        whole = [
            (context, target, row)
            for context, target, row in zip(contexts, ids, rows, strict=True)
            if context is not None and target
        ]
        _check_any(whole)
        for context, target, row in whole:
            self.tokenizer.check_text(row.target, target)
            self._check_room(context, row)
        made, targets = [context for context, _, _ in whole], [target for _, target, _ in whole]
        seeds = [row.seed for _, _, row in whole]
        batch = self._batch(made, targets, seeds)
        others = self._others([row.query for _, _, row in whole]) if self.shuffled else None
        if others is not None:
            batch.shuffled = self._batch([made[number] for number in others], targets, seeds)
        return batch

    def _batch(
        self, contexts: Sequence[Row], targets: Sequence[list[int]], seeds: Sequence[int]
    ) -> ReconstructionBatch:
        most = self.tokenizer.max_tokens
        rows = [replace(row, ids=[*row.ids, *ids][:most]) for row, ids in zip(contexts, targets, strict=True)]
        tokens = self.tokenizer.pack(rows)
        hidden, labels = hide_tokens(tokens, self.hiding, seeds, self.tokenizer.tokenizer.pad_token_id, behind_end=True)
        return ReconstructionBatch(hidden, labels)

    def _check_room(self, context: Row, row: ReconstructionRow) -> None:
        most, least = self.tokenizer.max_tokens, len(context.ids) + 1
        if least > most:  # of an image: text makes room
            raise InputError(
                f"its tokens, their two marks, the end and one token of the target make {least}, more than max_tokens "
                f"{most}; lower image_size or max_pixels",
                None if row.query.image is None else row.query.image.key,
            )

    @staticmethod
    def _others(items: Sequence[Item]) -> list[int] | None:
        """For each row the next one with another query; None where all are the same."""
        keys = [item.key for item in items]
        if len(set(keys)) < 2:
            return None
        count = len(keys)
        return [
            next(other % count for other in range(row + 1, row + count) if keys[other % count] != keys[row])
            for row in range(count)
        ]


class ItemPairCollator:
    """Pairs of items to a :class:`PairBatch`; an item that answers several queries is encoded once.

    Args:
        tokenizer: Of the encoder.
    """

    def __init__(self, tokenizer: MultimodalTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[ContrastiveRow]) -> PairBatch:
        made = self.tokenizer.rows([row.query for row in rows], "query")
        candidates = [item for row in rows for item in (row.positive, row.negative) if item is not None]
        distinct = {item.key: item for item in candidates}
        targets = dict(zip(distinct, self.tokenizer.rows(list(distinct.values()), "passage"), strict=True))
        kept = [
            (query, row)
            for query, row in zip(made, rows, strict=True)
            if query is not None and targets[row.positive.key] is not None
        ]
        _check_any(kept)
        column: dict[tuple[str, str], int] = {}
        for _, row in kept:
            for item in (row.positive, row.negative):
                if item is not None and targets[item.key] is not None:
                    column.setdefault(item.key, len(column))
        own = torch.zeros(len(kept), len(column), dtype=torch.bool)
        for number, (_, row) in enumerate(kept):
            drawn = [item.key for item in (row.positive, row.negative) if item is not None]
            own[number, [column[key] for key in drawn if key in column]] = True
        keys = {key: document_key("\0".join(key)) for key in column}
        packed = [query for query, _ in kept] + [targets[key] for key in column]
        return PairBatch(
            tokens=cast(Any, self.tokenizer.pack([row for row in packed if row is not None])),  # ragged, as texts are
            queries=len(kept),
            targets=torch.tensor([column[row.positive.key] for _, row in kept]),
            passage_keys=torch.tensor([keys[key] for key in column]),
            positive_keys=torch.tensor([[keys[row.positive.key]] for _, row in kept]),
            own=own,
            own_only=torch.zeros(len(kept), dtype=torch.bool),
        )


class EncodeCollator:
    """Items to an :class:`EncodeBatch`; those whose image cannot be read are left out where the settings allow it.

    Args:
        tokenizer: Of the encoder.
    """

    def __init__(self, tokenizer: MultimodalTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[EncodeRow]) -> EncodeBatch:
        made: dict[int, Row | None] = {}
        for kind in get_args(Kind):
            chosen = [row for row in rows if row.kind == kind]
            prepared = self.tokenizer.rows([row.item for row in chosen], kind)
            made |= zip((row.number for row in chosen), prepared, strict=True)
        kept = [(row.number, found) for row in rows if (found := made[row.number]) is not None]
        return EncodeBatch([number for number, _ in kept], self.tokenizer.pack([found for _, found in kept]))


def _check_any(rows: Sequence[Any]) -> None:
    if not rows:
        raise InputError("of a whole batch no image can be read, or no target has a token")


def hide_tokens(
    tokens: MultimodalTokens, hiding: Hiding, seeds: Sequence[int], pad_id: int, behind_end: bool = False
) -> tuple[MultimodalTokens, Tensor]:
    """Replace tokens by the mask token; what a row loses depends on its seed alone.

    Args:
        tokens: Rows on the CPU.
        hiding: How much.
        seeds: One for each row.
        pad_id: Of the tokenizer.
        behind_end: Only behind the bridge token.

    Returns:
        The rows, and labels ``(sum of lengths,)``.

    Raises:
        InputError: There is nothing to hide in any of the rows.
    """
    ids, mask = Tokens(tokens.ids, tokens.lengths).pad(range(len(tokens)), pad_id)
    valid = mask.bool()
    ends = torch.tensor(tokens.ends) if behind_end else None
    masked = draw_masked(maskable_tokens(ids, valid, hiding.never, ends), hiding.text, seeds)
    if not masked.any():
        raise InputError(f"the texts of a batch of {len(tokens)} rows hold special tokens alone: nothing can be hidden")
    hidden = mask_tokens(ids, masked, hiding.mask_id)
    return replace(tokens, ids=hidden.input_ids[valid]), hidden.labels[valid]


def caption_labels(tokens: MultimodalTokens) -> Tensor:
    """Every token behind a row's image as a label, the end token among them, ``(sum of lengths,)``."""
    labels = []
    for ids, number, start in zip(tokens.ids.split(tokens.lengths), tokens.images, tokens.image_starts, strict=True):
        frames, rows, columns = tokens.grids[number] if number >= 0 else (0, 0, 0)
        first = start + frames * rows * columns // tokens.merge**2 + 1 if number >= 0 else 0
        labels.append(torch.cat([torch.full_like(ids[:first], IGNORE_INDEX), ids[first:]]))
    return torch.cat(labels)
