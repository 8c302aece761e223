import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lit_core.errors import InputError
from lit_core.presets import preset_tokenizer
from lit_embed.modules.tokenization import EncoderConfig, TextTokenizer

NAMES = ("tiny-qwen3", "tiny-llama", "tiny-bert")
CONFIG = EncoderConfig("eos", query_prompt="find:", suffix=" in short", query_length=12, passage_length=20)
LONG = "the vessel of the 42 and " * 20


def _plain(name: str, text: str) -> list[int]:
    return preset_tokenizer(name)(text, add_special_tokens=False)["input_ids"]


def _first(name: str) -> list[int]:
    tokenizer = preset_tokenizer(name)
    return {"tiny-qwen3": [], "tiny-llama": [tokenizer.bos_token_id], "tiny-bert": [tokenizer.cls_token_id]}[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_prompt_text_suffix_end(name: str) -> None:
    tokenizer = preset_tokenizer(name)
    rows = TextTokenizer(tokenizer, CONFIG)(["the 42"], "query").ids.tolist()
    assert rows == [*_first(name), *_plain(name, "find:the 42"), *_plain(name, " in short"), tokenizer.eos_token_id]
    rows = TextTokenizer(tokenizer, CONFIG)(["the 42"], "passage").ids.tolist()
    assert rows == [*_first(name), *_plain(name, "the 42"), *_plain(name, " in short"), tokenizer.eos_token_id]


@pytest.mark.parametrize("name", NAMES)
def test_over_long_texts_keep_suffix_and_end(name: str) -> None:
    tokenizer = preset_tokenizer(name)
    texts = TextTokenizer(tokenizer, CONFIG)
    tail = [*_plain(name, " in short"), tokenizer.eos_token_id]
    for kind, length, prompt in (("query", 12, "find:"), ("passage", 20, "")):
        tokens = texts([LONG, "the"], kind)  # type: ignore[arg-type]
        assert tokens.lengths[0] == length
        row = tokens.ids[:length].tolist()
        assert row[-len(tail) :] == tail
        whole = [*_first(name), *_plain(name, prompt + LONG)]
        assert row[: -len(tail)] == whole[: length - len(tail)]


@pytest.mark.parametrize("name", NAMES)
def test_without_eos_pooling_the_tokenizer_is_left_as_it_is(name: str) -> None:
    tokenizer = preset_tokenizer(name)
    assert TextTokenizer(tokenizer, EncoderConfig("mean")).tokenizer is tokenizer
    before = tokenizer("the 42")["input_ids"]
    TextTokenizer(tokenizer, CONFIG)
    assert tokenizer("the 42")["input_ids"] == before  # a copy was changed


@pytest.mark.parametrize("pooling", ["eos", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_tokenizer_needs_no_settings_and_never_gets_the_suffix_twice(
    name: str, pooling: Any, tmp_path: Path
) -> None:
    config = EncoderConfig(pooling, suffix=" in short", passage_length=20)
    ours = TextTokenizer(preset_tokenizer(name), config)
    ours.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = TextTokenizer(loaded, config)  # as the second stage of LLM-QL does with the first one's export
    for text in ("the 42", LONG, ""):
        ids = ours([text], "passage").ids.tolist()
        assert loaded([text], truncation=True, max_length=20)["input_ids"] == [ids]
        assert again([text], "passage").ids.tolist() == ids


@pytest.mark.parametrize("prompt", ["find:", "find: ", "", "find this\n"])
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_told_from_its_frame(name: str, prompt: str) -> None:
    config = EncoderConfig("eos", query_prompt=prompt, suffix=" in short", query_length=12)
    texts = TextTokenizer(preset_tokenizer(name), config)
    for text in ("the 42", LONG, ""):
        ids, start, stop = texts.framed(text, "query")
        assert ids == texts([text], "query").ids.tolist()
        assert ids[stop:] == [*_plain(name, " in short"), texts.eos_id]
        whole = texts.tokenizer.decode(ids[:stop], skip_special_tokens=True)
        assert texts.tokenizer.decode(ids[start:stop]).strip() == whole[len(prompt) :].strip()


def test_it_travels_to_loader_workers() -> None:
    texts = TextTokenizer(preset_tokenizer("tiny-qwen3"), CONFIG)
    again = pickle.loads(pickle.dumps(texts))
    assert again(["the 42", LONG], "query").ids.tolist() == texts(["the 42", LONG], "query").ids.tolist()
    assert texts([], "query").lengths == []


def test_bad_settings_are_errors() -> None:
    tokenizer = preset_tokenizer("tiny-llama")
    room = 2 + len(_plain("tiny-llama", " in short"))
    with pytest.raises(
        InputError, match=f"query_length must exceed the {room} tokens of prompt, suffix and end, got {room}"
    ):
        TextTokenizer(tokenizer, EncoderConfig("eos", suffix=" in short", query_length=room))
    for field in ("dimensions", "query_length", "passage_length", "chunk_tokens"):
        with pytest.raises(InputError, match=f"{field} must be at least 1, got 0"):
            EncoderConfig(**{field: 0})
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="eos pooling needs a tokenizer with an eos token"):
        TextTokenizer(tokenizer, EncoderConfig("eos"))
