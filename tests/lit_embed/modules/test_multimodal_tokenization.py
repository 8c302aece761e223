import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_core.errors import InputError
from lit_core.images import ImageSettings, load_image_settings
from lit_core.presets import preset_config, preset_tokenizer
from lit_embed.items import MARKER, ImageFile, ImageSource, Item
from lit_embed.modules.multimodal_tokenization import MultimodalConfig, MultimodalTokenizer, VisionTokens

SETTLED: dict[str, Any] = {"max_tokens": 40, "image_size": 56, "attention": "bidirectional", "normalize": True}
Make = Callable[..., ImageSource]


def _tokenizer(**settings: Any) -> MultimodalTokenizer:
    name, config = "tiny-qwen2-vl", preset_config("tiny-qwen2-vl")
    tokens = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    vision = VisionTokens(*(getattr(config, field) for field in tokens))
    return MultimodalTokenizer(
        preset_tokenizer(name), MultimodalConfig(**{**SETTLED, **settings}), load_image_settings(name), vision
    )


def _words(tokenizer: MultimodalTokenizer, item: Item, kind: Any = "query") -> str:
    [row] = tokenizer.rows([item], kind)
    assert row is not None
    assert row.ids[row.end] == tokenizer.bridge_id
    names = {"<|vision_start|>": "[", "<|image_pad|>": "#", "<|vision_end|>": "]", "<|im_end|>": "E"}
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(row.ids)
    if row.image is not None:
        assert tokens[row.image_start - 1 : row.image_start + 1] == ["<|vision_start|>", "<|image_pad|>"]
        assert tokens.count("<|image_pad|>") == len(row.image.pixels) // 4
    return " ".join(names.get(token, token.replace("Ġ", "")) for token in tokens)


def test_where_text_image_and_bridge_stand(noise: Make) -> None:
    tokenizer = _tokenizer()
    image = noise(50, 70)
    assert _words(tokenizer, Item("the man")) == "the man E"
    assert _words(tokenizer, Item("", image)) == "[ # # # # ] E"
    assert _words(tokenizer, Item("the man", image)) == "[ # # # # ] the man E"
    assert _words(tokenizer, Item(f"the {MARKER} man", image)) == "the  [ # # # # ] man E"  # the space
    assert _words(tokenizer, Item(f"the man{MARKER}", image)) == "the man [ # # # # ] E"
    assert _words(tokenizer, Item(f"{MARKER}the man", image)) == "[ # # # # ] the man E"


def test_rows_are_what_the_tokenizer_makes_of_the_whole_string(noise: Make) -> None:
    tokenizer = _tokenizer()
    for text in ("the man", f"{MARKER}\nthe man", f"the {MARKER} man: 42", f"so it is{MARKER}"):
        [row] = tokenizer.rows([Item(text, noise(50, 70))], "query")
        image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
        whole = text.replace(MARKER, image) if MARKER in text else image + text
        assert row is not None
        assert row.ids == tokenizer.tokenizer(f"{whole}<|im_end|>")["input_ids"]


def test_prompts_stand_before_the_text_and_behind_a_leading_image(noise: Make) -> None:
    tokenizer = _tokenizer(query_prompt="so ", passage_prompt="")
    image = noise(50, 70)
    assert _words(tokenizer, Item("the")) == "so the E"
    assert _words(tokenizer, Item("the"), "passage") == "the E"
    assert _words(tokenizer, Item("", image)).startswith("[ # # # # ] so")
    assert _words(tokenizer, Item("the", image)) == "[ # # # # ] so the E"
    assert _words(tokenizer, Item(f"{MARKER}the", image)) == "[ # # # # ] so the E"
    assert _words(tokenizer, Item(f"the{MARKER}", image)) == "so the [ # # # # ] E"


def test_native_sizes_give_as_many_placeholders_as_tokens(noise: Make) -> None:
    tokenizer = _tokenizer(image_size=0, max_pixels=12 * 784)
    tokens = tokenizer([Item("", noise(56, 84)), Item("", noise(400, 400)), Item("the")], "query")
    assert tokens.grids == [(1, 4, 6), (1, 6, 6)]
    assert tokens.lengths == [6 + 3, 9 + 3, 2]
    assert tokens.pixels is not None
    assert len(tokens.pixels) == 4 * (6 + 9)


def test_text_is_cut_and_nothing_else(noise: Make) -> None:
    """4 image tokens, two marks and the bridge are 7; nine words remain of sixteen tokens."""
    tokenizer = _tokenizer(max_tokens=16, query_prompt="so ")
    image = noise(50, 70)
    with pytest.warns(UserWarning, match="3 of 5 texts were cut to keep within 16 tokens"):
        tokens = tokenizer(
            [
                Item("the " * 30, image),
                Item("the"),
                Item("the " * 4 + MARKER + " and" * 30, image),
                Item("the " * 30),
                Item("the", image),
            ],
            "query",
        )
    assert tokens.lengths == [16, 3, 16, 16, 9]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _words(tokenizer, Item("the " * 30, image)) == "[ # # # # ] so" + " the" * 8 + " E"
        assert _words(tokenizer, Item("the " * 30)) == "so" + " the" * 14 + " E"
        assert _words(tokenizer, Item("the " * 30 + MARKER + "and", image)) == "so" + " the" * 8 + " [ # # # # ] E"
        assert (
            _words(tokenizer, Item("the the" + MARKER + "and " * 30, image))
            == "so the the [ # # # # ]" + " and" * 6 + " E"
        )
        tokenizer([Item("the " * 30)], "query")  # said once


def test_an_image_that_fills_the_limit_is_kept_and_a_larger_one_refused(noise: Make) -> None:
    assert _words(_tokenizer(max_tokens=7), Item("", noise(9, 9))) == "[ # # # # ] E"
    row = _tokenizer(max_tokens=7).rows([Item("the man", noise(9, 9))], "query")[0]
    assert row is not None
    assert row.cut
    expected = (
        r"9 x 9, 0: its 4 tokens, their two marks and the end make 7, more than max_tokens 6; lower image_size or"
    )
    with pytest.raises(InputError, match=expected):
        _tokenizer(max_tokens=6).rows([Item("the man", noise(9, 9))], "query")


def test_an_unreadable_image_is_named_and_left_out_only_where_asked(tmp_path: Path, noise: Make) -> None:
    (tmp_path / "text.png").write_text("no image")
    missing, broken = ImageFile(tmp_path / "none.png"), ImageFile(tmp_path / "text.png")
    for source, message in ((missing, "none.png: no such image"), (broken, "text.png: cannot be read as an image")):
        with pytest.raises(InputError, match=message):
            _tokenizer().rows([Item("the", source)], "query")
        with pytest.warns(UserWarning, match=f"left out: .*{message}"):
            found = _tokenizer(skip_unreadable=True).rows([Item("the"), Item("the", source)], "query")
        assert [row is None for row in found] == [False, True]
    items = [Item("the"), Item("the", missing), Item("the", noise(9, 9)), Item("and", missing)]
    with pytest.warns(UserWarning, match="left out") as caught:
        assert _tokenizer(skip_unreadable=True)(items, "query").lengths == [2, 8]
    assert len(caught) == 1  # the image, not each of its items
    with pytest.raises(InputError, match="300 x 1, 0: sides of 1 x 300 pixels"):
        _tokenizer(image_size=0, skip_unreadable=True).rows([Item("the", noise(300, 1))], "query")


def test_an_image_is_prepared_once_a_batch(noise: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = type(noise(1, 1)).load
    monkeypatch.setattr(type(noise(1, 1)), "load", lambda self: loads.append(self.key) or load(self))
    tokens = _tokenizer()([Item("the", noise(9, 9)), Item("and", noise(9, 9)), Item("", noise(9, 8))], "query")
    assert loads == ["9 x 9, 0", "9 x 8, 0"]
    assert (tokens.images, tokens.pixels is not None and len(tokens.pixels)) == ([0, 0, 1], 32)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"])
def test_special_tokens_of_images_do_not_come_from_text(token: str, noise: Make) -> None:
    message = rf"the text 'the {token}'.* holds {token}, which only an image may bring".replace("|", r"\|")
    for item in (Item(f"the {token}"), Item(f"the {token}", noise(9, 9))):
        with pytest.raises(InputError, match=message):
            _tokenizer().rows([item], "query")


def test_a_marker_needs_an_image() -> None:
    with pytest.raises(InputError, match=r"has <\|image_1\|> in its text, but no image"):
        Item(f"{MARKER} the")


def test_bridge_token_is_chosen_by_name() -> None:
    assert _words(_tokenizer(), Item("the")) == "the E"
    [row] = _tokenizer(bridge="<|im_start|>").rows([Item("the")], "query")
    assert row is not None
    assert row.ids[-1] == preset_tokenizer("tiny-qwen2-vl").convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(InputError, match=r"the bridge token <eos> is not in the tokenizer"):
        _tokenizer(bridge="<eos>")
    with pytest.raises(InputError, match=r"the bridge token must differ from the padding token <\|endoftext\|>"):
        _tokenizer(bridge="<|endoftext|>")


def test_a_loader_worker_gets_a_copy(noise: Make) -> None:
    tokenizer = _tokenizer()
    items = [Item("the", noise(9, 9)), Item("man")]
    found, again = tokenizer(items, "query"), pickle.loads(pickle.dumps(tokenizer))(items, "query")
    assert torch.equal(found.ids, again.ids)
    assert torch.equal(found.pixels, again.pixels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"image_size": -1}, "image_size must be at least 0, got -1"),
        ({"attention": "both"}, "attention must be bidirectional or causal, got 'both'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MultimodalConfig(**settings)


def test_sizes_are_checked_against_the_backbone() -> None:
    with pytest.raises(InputError, match="image_size must be a multiple of 28 pixels, got 100"):
        _tokenizer(image_size=100)
    with pytest.raises(InputError, match="min_pixels must be at most max_pixels"):
        _tokenizer(max_pixels=784)
    assert _tokenizer(min_pixels=784, max_pixels=784).images == ImageSettings(min_pixels=784, max_pixels=784)
