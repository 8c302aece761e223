"""Batches of CoCoA's stages from rows that are hard to make anything of."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_core.errors import InputError
from lit_core.lm_head import IGNORE_INDEX
from lit_embed.items import ImageFile, ImageSource, Item
from lit_embed.modules.multimodal import MultimodalEncoder, build_multimodal_encoder
from lit_embed.modules.multimodal_batches import (
    BridgeCollator,
    EncodeCollator,
    Hiding,
    ItemPairCollator,
    WarmupCollator,
)
from lit_embed.modules.multimodal_tokenization import MultimodalConfig
from lit_embed.multimodal import ContrastiveRow, EncodeRow, ReconstructionRow, WarmupRow

Make = Callable[..., ImageSource]


@cache
def _encoder(max_tokens: int = 64) -> MultimodalEncoder:
    config = MultimodalConfig(max_tokens=max_tokens, image_size=56, skip_unreadable=True)
    return build_multimodal_encoder("tiny-qwen2-vl", config).eval()


def _hiding(encoder: MultimodalEncoder) -> Hiding:
    mask: Any = encoder.tokenizer.mask_token_id
    return Hiding(mask, tuple(encoder.never_hidden), 0.7)


def _bridge(max_tokens: int = 64) -> BridgeCollator:
    encoder = _encoder(max_tokens)
    return BridgeCollator(encoder.item_tokenizer, _hiding(encoder), shuffled=True)


def test_a_target_brings_no_special_token_of_images(noise: Make) -> None:
    rows = [ReconstructionRow(Item("the man", noise(9, 9)), "a <|image_pad|> here", "", 0)]
    with pytest.raises(InputError, match=r"the text 'a <\|image_pad\|> here' holds <\|image_pad\|>"):
        _bridge()(rows)


def test_an_image_leaves_room_for_a_target(noise: Make) -> None:
    """Four tokens of the image, two marks, the end: with one more the target has its first token."""
    rows = [ReconstructionRow(Item("the man", noise(9, 9)), "so it is said", "", seed) for seed in range(3)]
    batch = _bridge(8)(rows)
    assert batch.tokens.lengths == [8] * 3
    assert batch.count == 3
    with pytest.raises(InputError, match=r"9 x 9, 0: its tokens, .* of the target make 8, more than max_tokens 7"):
        _bridge(7)(rows)


def test_special_tokens_alone_are_nothing_to_reconstruct() -> None:
    """Beside another row they have no label; by themselves there is nothing to learn from."""
    alone = ReconstructionRow(Item("the man"), "<|im_end|>", "", 0)
    batch = _bridge()([alone, ReconstructionRow(Item("and"), "so it is said", "", 1)])
    assert (batch.labels.split(batch.tokens.lengths)[0] == IGNORE_INDEX).all()
    with pytest.raises(InputError, match="a batch of 1 rows hold special tokens alone: nothing can be hidden"):
        _bridge()([alone])


@pytest.mark.filterwarnings("ignore:left out")
def test_a_batch_of_unreadable_images_is_told(tmp_path: Path) -> None:
    encoder, broken = _encoder(), Item("the man", ImageFile(tmp_path / "none.png"))
    tokenizer = encoder.item_tokenizer
    collators: list[tuple[Any, Any]] = [
        (WarmupCollator(tokenizer, _hiding(encoder)), WarmupRow(broken, 0)),
        (_bridge(), ReconstructionRow(broken, "so it is said", "", 0)),
        (ItemPairCollator(tokenizer), ContrastiveRow(broken, Item("and"), None, "", 0)),
    ]
    for collate, row in collators:
        with pytest.raises(InputError, match="of a whole batch no image can be read"):
            collate([row])
    batch = EncodeCollator(tokenizer)([EncodeRow(0, broken, "query")])
    assert batch.numbers == []
    with torch.no_grad():
        assert encoder(batch.tokens).shape == (0, encoder.embedding_dimension)


def test_candidates_are_encoded_as_the_targets_of_training() -> None:
    config = MultimodalConfig(max_tokens=64, query_prompt="the ", passage_prompt="and ")
    tokenizer = build_multimodal_encoder("tiny-qwen2-vl", config).item_tokenizer
    man, so = Item("man"), Item("so")
    rows = [EncodeRow(3, man, "passage"), EncodeRow(5, so, "query"), EncodeRow(4, man, "query")]
    batch = EncodeCollator(tokenizer)(rows)
    assert batch.numbers == [3, 5, 4]
    found = batch.tokens.ids.split(batch.tokens.lengths)
    wanted = [tokenizer([row.item], row.kind).ids for row in rows]
    assert all(map(torch.equal, found, wanted))
    pairs = ItemPairCollator(tokenizer)([ContrastiveRow(so, man, None, "", 0)])
    assert pairs.tokens.ids.tolist() == torch.cat([found[1], found[0]]).tolist()
