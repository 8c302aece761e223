from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from lit_core.errors import InputError
from lit_core.presets import (
    MAX_LENGTH,
    PRESETS,
    VISION_TOKENS,
    VOCAB_SIZE,
    is_preset,
    merges,
    preset_config,
    preset_images,
    preset_tokenizer,
)

NAMES = list(PRESETS)
TEXTS = ["plain words", "", "naïve café 日本語 🤗 e\u0301", "\x00\x7f\ttabs\r\nlines  two", "x = ½² + 1234_5", "A" * 50]


def test_vocabulary_has_no_duplicates_and_leaves_room_for_the_special_tokens() -> None:
    pairs = merges()
    assert len({left + right for left, right in pairs}) == len(pairs) == VOCAB_SIZE - 256 - 8
    assert max(len(preset_tokenizer(name)) for name in NAMES) <= VOCAB_SIZE


@pytest.mark.parametrize("name", NAMES)
def test_any_text_survives_a_round_trip(name: str) -> None:
    tokenizer = preset_tokenizer(name)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(" x"), skip_special_tokens=True) == "x"  # the documented exception


def test_ordinary_text_has_the_same_ids_in_every_preset() -> None:
    large = [name for name in NAMES if PRESETS[name].vocab_size == VOCAB_SIZE]
    ids = [preset_tokenizer(name).encode("the same words", add_special_tokens=False) for name in large]
    assert len(large) == 5
    assert all(row == ids[0] for row in ids)
    first, again = preset_tokenizer("tiny-qwen3").encode("vessel vessel")
    assert first == again


@pytest.mark.parametrize(
    ("name", "tokens", "pad", "eos"),
    [
        ("tiny-qwen3", ["Ġthe", "Ġ", "4", "2"], "<|endoftext|>", "<|im_end|>"),
        ("tiny-llama", ["<s>", "Ġthe", "Ġ", "4", "2"], "<pad>", "</s>"),
        ("tiny-bert", ["[CLS]", "Ġthe", "Ġ", "4", "2", "[SEP]"], "[PAD]", "[SEP]"),
        ("tiny-qwen2-vl", ["Ġthe", "Ġ", "4", "2"], "<|endoftext|>", "<|im_end|>"),
        ("tiny-qwen2_5-vl", ["Ġthe", "Ġ", "4", "2"], "<|endoftext|>", "<|im_end|>"),
    ],
)
def test_special_tokens(name: str, tokens: list[str], pad: str, eos: str) -> None:
    tokenizer, config = preset_tokenizer(name), preset_config(name).get_text_config()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the 42")) == tokens
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (pad, eos, "right")
    assert tokenizer.pad_token_id == config.pad_token_id != tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.encode(f"a{eos}", add_special_tokens=False)[-1] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == MAX_LENGTH


def test_pairs_of_texts_are_marked() -> None:
    tokenizer = preset_tokenizer("tiny-bert")
    encoded = tokenizer("the", "the the")
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == ["[CLS]", "Ġthe", "[SEP]", "Ġthe", "Ġthe", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    llama = preset_tokenizer("tiny-llama")
    assert llama.convert_ids_to_tokens(llama("the", "the")["input_ids"]) == ["<s>", "Ġthe", "<s>", "Ġthe"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_folder_loads_with_equal_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = preset_tokenizer(name)
    tokenizer.save_pretrained(tmp_path / "alone")
    config = preset_config(name, num_hidden_layers=1)
    AutoModel.from_config(config).save_pretrained(tmp_path / "both")  # the model type must not pick another tokenizer
    tokenizer.save_pretrained(tmp_path / "both")
    for folder in ("alone", "both"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / folder)
        for text in TEXTS:
            assert dict(loaded(text, "pair")) == dict(tokenizer(text, "pair"))
            assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert (loaded.model_max_length, loaded.padding_side) == (MAX_LENGTH, "right")
        assert loaded.encode("<|im_start|>a") == tokenizer.encode("<|im_start|>a")
    assert AutoConfig.from_pretrained(tmp_path / "both").get_text_config().num_hidden_layers == 1


@pytest.mark.parametrize("name", NAMES)
def test_models_run(name: str) -> None:
    torch.manual_seed(0)
    tokenizer, config = preset_tokenizer(name), preset_config(name)
    batch = tokenizer(["one text", "a rather longer text"], padding=True, return_tensors="pt")
    rows, length = batch["input_ids"].shape
    states = AutoModel.from_config(config)(**batch).last_hidden_state
    text = config.get_text_config()
    assert states.shape == (rows, length, text.hidden_size)
    assert states.isfinite().all()
    if name != "tiny-bert":
        head = AutoModelForCausalLM if PRESETS[name].vision is None else AutoModelForImageTextToText
        model = head.from_config(config)
        assert model(**batch).logits.shape == (rows, length, text.vocab_size)
        assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-qwen2_5-vl"])
def test_presets_that_read_images_know_their_special_tokens(name: str) -> None:
    tokenizer, config = preset_tokenizer(name), preset_config(name)
    assert (tokenizer.mask_token, len(tokenizer)) == ("<mask>", VOCAB_SIZE)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id}) == 3
    for field, token in VISION_TOKENS.items():
        assert tokenizer.encode(f"a{token}", add_special_tokens=False)[-1] == getattr(config, field)
    assert preset_images(name)["size"] == {"shortest_edge": 3136, "longest_edge": 50176}
    assert preset_images("tiny-qwen3") == {}
    head = config.get_text_config().hidden_size // config.get_text_config().num_attention_heads
    assert sum(config.get_text_config().rope_parameters["mrope_section"]) == head // 2


def test_overrides_go_to_the_language_model() -> None:
    small = preset_config("tiny-qwen2-vl", num_hidden_layers=2, tie_word_embeddings=False)
    plain = preset_config("tiny-qwen2-vl")
    assert (small.text_config.num_hidden_layers, small.tie_word_embeddings) == (2, False)
    assert (plain.text_config.num_hidden_layers, plain.tie_word_embeddings) == (3, True)
    with pytest.raises(InputError, match="Qwen2VLConfig has no field 'depth'"):
        preset_config("tiny-qwen2-vl", depth=3)


def test_each_call_gives_its_own_tokenizer() -> None:
    changed = preset_tokenizer("tiny-qwen3")
    changed.add_tokens(["vesselvessel"])
    assert "vesselvessel" not in preset_tokenizer("tiny-qwen3").get_vocab()


def test_unknown_names_are_errors() -> None:
    assert is_preset("tiny-bert")
    assert not is_preset("bert-base-uncased")
    with pytest.raises(
        InputError, match="unknown preset 'tiny'; write one of tiny-qwen3, nano-qwen3, tiny-llama, tiny-bert"
    ):
        preset_tokenizer("tiny")
    with pytest.raises(InputError, match="Qwen3Config has no field 'layers'"):
        preset_config("tiny-qwen3", layers=2)
