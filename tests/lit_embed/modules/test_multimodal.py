from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_core.backbones import BackboneConfig, Lora, load_backbone, text_model, transformer_blocks
from lit_core.errors import InputError
from lit_core.lm_head import token_log_probs
from lit_embed.functional import masks
from lit_embed.functional.losses import info_nce
from lit_embed.items import ImageFile, ImageSource, Item
from lit_embed.modules.gradcache import cached_backward
from lit_embed.modules.multimodal import MultimodalEncoder, build_multimodal_encoder
from lit_embed.modules.multimodal_tokenization import MultimodalConfig
from lit_embed.modules.multimodal_tokens import PaddedRows

NAMES = ("tiny-qwen2-vl", "tiny-qwen2_5-vl")
Make = Callable[..., ImageSource]


@pytest.fixture(
    scope="module", params=[(name, way) for name in NAMES for way in ("bidirectional", "causal")], ids="-".join
)
def encoder(request: pytest.FixtureRequest) -> MultimodalEncoder:
    name, attention = request.param
    return build_multimodal_encoder(name, MultimodalConfig(attention=attention), BackboneConfig(init_std=0.05)).eval()


def _all(encoder: MultimodalEncoder, items: Sequence[Item], left: bool = False) -> PaddedRows:
    tokens = encoder.tokenize(items, "query")
    return tokens.pad(range(len(tokens)), encoder.tokenizer.pad_token_id, left)


@torch.no_grad()
def test_an_item_has_the_vector_it_has_alone(encoder: MultimodalEncoder, mixed_items: list[Item]) -> None:
    single = torch.cat([encoder.encode_padded(_all(encoder, [item])) for item in mixed_items])
    assert single.shape == (len(mixed_items), 96)
    torch.testing.assert_close(single.norm(dim=1), torch.ones(len(mixed_items)))
    for left in (False, True):
        torch.testing.assert_close(encoder.encode_padded(_all(encoder, mixed_items, left)), single, atol=1e-5, rtol=0)
    backwards = encoder.encode_padded(_all(encoder, mixed_items[::-1])).flip(0)
    torch.testing.assert_close(backwards, single, atol=1e-5, rtol=0)
    similarity = single @ single.T - torch.eye(len(single))
    assert float(similarity.max()) < 0.99  # the items are told apart


@torch.no_grad()
def test_chunks_change_nothing(
    encoder: MultimodalEncoder, mixed_items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = encoder.tokenize(mixed_items, "query")
    found = []
    for budget, chunks in ((1, 8), (60, 3), (10_000, 1)):
        monkeypatch.setattr(encoder.config, "chunk_tokens", budget)
        assert len(encoder.plan(tokens)[0]) == chunks  # an image's tokens count
        found.append(encoder(tokens))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_states_are_those_of_the_model_itself(name: str, attention: Any, left: bool, mixed_items: list[Item]) -> None:
    """It computes its own positions and mask from a 2D mask; eager attention takes its mask as it is."""
    loading = BackboneConfig(attention="eager", init_std=0.05)
    encoder = build_multimodal_encoder(name, MultimodalConfig(attention=attention), loading).eval()
    model = text_model(encoder.model)
    padded = _all(encoder, mixed_items, left)
    found = encoder.states(padded, encoder.attention_mask(padded))
    model.config.text_config.is_causal = attention == "causal"  # what it makes of a 2D mask
    theirs = model(
        input_ids=padded.ids,
        attention_mask=padded.mask,
        pixel_values=padded.pixels,
        image_grid_thw=padded.grids,
        mm_token_type_ids=(padded.ids == model.config.image_token_id).int(),
    ).last_hidden_state
    valid = padded.mask.bool()
    torch.testing.assert_close(found[valid], theirs[valid], atol=1e-5, rtol=1e-5)
    at = torch.arange(len(found))
    expected = nn.functional.normalize(theirs[at, padded.ends])
    torch.testing.assert_close(encoder.encode_padded(padded), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_directions_differ_and_the_encoder_says_which(name: str, mixed_items: list[Item]) -> None:
    model = load_backbone(name).eval()
    both = build_multimodal_encoder(name, model=model)
    causal = build_multimodal_encoder(name, MultimodalConfig(attention="causal"), model=model)
    assert both.config.attention == "bidirectional"
    padded = _all(both, mixed_items)
    difference = both.encode_padded(padded) - causal.encode_padded(padded)
    assert float(difference.norm(dim=1).min()) > 0.01
    assert causal.attention_mask(padded) is None
    explicit = causal.states(padded, masks.causal(padded.mask.bool()))  # the mask that is left out says nothing
    at = torch.arange(len(mixed_items))
    torch.testing.assert_close(
        nn.functional.normalize(explicit[at, padded.ends]), causal.encode_padded(padded), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_only_bidirectional_images_see_the_text_behind_them(encoder: MultimodalEncoder, noise: Make) -> None:
    one, other = (_all(encoder, [Item(text, noise(56, 56))]) for text in ("the man", "the and"))
    found, changed = (encoder.states(padded, encoder.attention_mask(padded))[0] for padded in (one, other))
    change = changed - found
    assert (float(change[:7].abs().max()) > 1e-3) == (encoder.config.attention == "bidirectional")
    assert float(change[7:].abs().max(dim=1).values.min()) > 1e-3


@torch.no_grad()
def test_the_image_is_read(encoder: MultimodalEncoder, noise: Make) -> None:
    vectors = encoder.encode([Item("the", noise(56, 56, seed)) for seed in (1, 2)], "query", progress=False)
    assert float((vectors[0] - vectors[1]).norm()) > 0.01
    padded = _all(encoder, [Item("the", noise(56, 56, 1)), Item("the", noise(56, 56, 2))])
    assert padded.pixels is not None
    swapped = replace(padded, pixels=padded.pixels.view(2, 16, -1).flip(0).flatten(0, 1))  # as a stage may corrupt them
    torch.testing.assert_close(encoder.encode_padded(swapped).flip(0), vectors, atol=1e-5, rtol=0)


@torch.no_grad()
def test_texts_alone_leave_the_vision_tower_out(encoder: MultimodalEncoder, noise: Make) -> None:
    calls: list[int] = []
    handle = text_model(encoder.model).visual.register_forward_hook(lambda *_: calls.append(1))
    encoder(encoder.tokenize([Item("the man"), Item("the vessel of the kind")], "query"))
    assert calls == []
    encoder(encoder.tokenize([Item("the man"), Item("", noise(56, 56))], "query"))
    assert calls == [1]
    handle.remove()


def test_equal_items_are_encoded_once(
    encoder: MultimodalEncoder, mixed_items: list[Item], noise: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal means both: the same text with another image, or the same image with another text, is another item."""
    items = [*mixed_items, *mixed_items[::-1], Item("", noise(60, 60, 1)), Item("the 42", noise(60, 60, 2))]
    seen: list[Item] = []
    rows = encoder.item_tokenizer.rows
    monkeypatch.setattr(encoder.item_tokenizer, "rows", lambda part, kind: seen.extend(part) or rows(part, kind))
    encoder.train()
    vectors = encoder.encode(items, "query", block=3, progress=False)
    assert encoder.training  # the mode is put back
    encoder.eval()
    assert len(seen) == len({item.key for item in seen}) == 10
    with torch.no_grad():
        expected = encoder(encoder.tokenize(items, "query"))
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    assert encoder.encode([], "query").shape == (0, 96)


def test_an_item_that_was_left_out_is_similar_to_nothing(mixed_items: list[Item], tmp_path: Any) -> None:
    missing = Item("the", ImageFile(tmp_path / "none.png"))
    strict = build_multimodal_encoder("tiny-qwen2-vl")
    with pytest.raises(InputError, match=r"none.png: no such image"):
        strict.encode([missing, *mixed_items], "query")
    lenient = build_multimodal_encoder("tiny-qwen2-vl", MultimodalConfig(skip_unreadable=True), model=strict.model)
    with pytest.warns(UserWarning, match=r"left out: .*none.png: no such image"):
        found = lenient.encode([mixed_items[0], missing, *mixed_items[1:]], "query", block=1)
    assert float(found[1].abs().max()) == 0
    found = torch.cat([found[:1], found[2:]])
    torch.testing.assert_close(found, strict.encode(mixed_items, "query"), atol=1e-5, rtol=0)


def test_cut_texts_are_counted_over_all_blocks() -> None:
    encoder = build_multimodal_encoder("tiny-qwen2-vl", MultimodalConfig(max_tokens=5))
    items = [Item("the" + " the" * length) for length in range(10)]
    with pytest.warns(UserWarning, match="6 of 10 texts were cut to keep within 5 tokens"):
        encoder.encode(items, "query", block=2, progress=False)


# --- gradients


def _loss(vectors: Tensor) -> Tensor:
    return info_nce(vectors[:3], vectors[3:], temperature=0.1)


def _gradients(encoder: nn.Module, step: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    encoder.zero_grad()
    loss = step()
    return loss, {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def _plain(encoder: MultimodalEncoder, tokens: Any) -> Tensor:
    loss = _loss(encoder(tokens))
    loss.backward()
    return loss.detach()


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    error = sum(float((found[name] - value).pow(2).sum()) for name, value in expected.items())
    return (error / sum(float(value.pow(2).sum()) for value in expected.values())) ** 0.5


def _adapted(name: str, dropout: float, **settings: Any) -> MultimodalEncoder:
    encoder = build_multimodal_encoder(name, MultimodalConfig(**settings), lora=Lora(r=2, dropout=dropout)).train()
    for key, parameter in encoder.named_parameters():  # fresh adapters are zero
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.05)
    return encoder


@pytest.mark.parametrize("name", NAMES)
def test_cached_gradients_are_those_of_the_plain_step(name: str, mixed_items: list[Item]) -> None:
    """Card 2.3: also with dropout on, which is replayed chunk by chunk."""
    encoder = _adapted(name, 0.1, chunk_tokens=60)
    tokens = encoder.tokenize(mixed_items, "query")
    torch.manual_seed(5)
    loss, expected = _gradients(encoder, lambda: _plain(encoder, tokens))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    cached, found = _gradients(encoder, lambda: cached_backward(encoder, tokens, _loss))
    torch.testing.assert_close(cached, loss, atol=1e-6, rtol=0)
    assert _relative(found, expected) < 1e-5
    assert torch.equal(torch.get_rng_state(), after)
    assert any(".visual." in key and float(value.abs().sum()) > 0 for key, value in found.items())
    other, _ = _gradients(encoder, lambda: cached_backward(encoder, tokens, _loss))
    assert abs(float(other - loss)) > 1e-3  # there is dropout


@pytest.mark.parametrize("name", NAMES)
def test_one_chunk_and_many_give_the_same_gradient(
    name: str, mixed_items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _adapted(name, 0.0)
    tokens = encoder.tokenize(mixed_items, "query")
    monkeypatch.setattr(encoder.config, "chunk_tokens", 10_000)
    loss, expected = _gradients(encoder, lambda: _plain(encoder, tokens))
    for budget in (1, 60):
        monkeypatch.setattr(encoder.config, "chunk_tokens", budget)
        cached, found = _gradients(encoder, lambda: cached_backward(encoder, tokens, _loss))
        torch.testing.assert_close(cached, loss, atol=0, rtol=2e-6)
        assert _relative(found, expected) < 1e-5


# --- what other stages build on


@torch.no_grad()
def test_the_head_gives_the_models_own_logits(mixed_items: list[Item]) -> None:
    model: Any = load_backbone("tiny-qwen2-vl", "causal_lm").eval()
    encoder = build_multimodal_encoder("tiny-qwen2-vl", model=model)
    padded = _all(encoder, mixed_items)
    mask = encoder.attention_mask(padded)
    states = encoder.states(padded, mask)
    inputs = {"input_ids": padded.ids, "position_ids": padded.positions, "attention_mask": mask}
    logits = model(**inputs, pixel_values=padded.pixels, image_grid_thw=padded.grids).logits
    torch.testing.assert_close(states @ encoder.head_weight.T, logits, atol=1e-5, rtol=1e-5)
    flat, targets = states.flatten(0, 1), padded.ids.flatten()
    expected = logits.flatten(0, 1).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = token_log_probs(flat, encoder.head_weight, targets, None).log_probs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="the model was loaded without its language-model head"):
        build_multimodal_encoder("tiny-qwen2-vl").head_weight  # noqa: B018


@pytest.mark.filterwarnings("ignore:.*does not support.*:UserWarning")
@torch.no_grad()
def test_a_layout_reaches_an_attention_function_of_the_language_model_alone(mixed_items: list[Item]) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[str] = []

    def probe(module: nn.Module, *args: Any, layout: str | None = None, **kwargs: Any) -> Any:
        seen.append(f"{type(module).__name__} {layout}")
        return sdpa_attention_forward(module, *args, **kwargs)  # type: ignore[arg-type]

    AttentionInterface.register("probe", probe)
    encoder = build_multimodal_encoder("tiny-qwen2-vl")
    padded = _all(encoder, mixed_items)
    mask = encoder.attention_mask(padded)
    expected = encoder.states(padded, mask)
    text_model(encoder.model).set_attn_implementation({"text_config": "probe"})
    found = encoder.states(padded, mask, layout="here")
    assert seen == ["Qwen2VLAttention here"] * 3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_sharded_chunk_without_an_image_still_runs_the_vision_tower(
    encoder: MultimodalEncoder, mixed_items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that shard a model gather its weights in step, so all run the same modules."""
    tokens = encoder.tokenize(mixed_items, "query")
    monkeypatch.setattr(encoder.config, "chunk_tokens", 20)
    expected = encoder(tokens)
    calls: list[int] = []
    monkeypatch.setattr(encoder, "equal_chunks", True)
    handle = transformer_blocks(encoder.model)[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(encoder(tokens), expected, atol=1e-5, rtol=0)
    handle.remove()
    assert len(calls) == len(encoder.plan(tokens)[0])


# --- building


def test_settings_reach_the_vectors(mixed_items: list[Item]) -> None:
    model = load_backbone("tiny-qwen2_5-vl")
    full = build_multimodal_encoder("tiny-qwen2_5-vl", MultimodalConfig(normalize=False), model=model)
    cut = build_multimodal_encoder("tiny-qwen2_5-vl", MultimodalConfig(dimensions=8), model=model)
    assert (full.embedding_dimension, cut.embedding_dimension) == (96, 8)
    expected = nn.functional.normalize(full.encode(mixed_items, "query")[:, :8])
    torch.testing.assert_close(cut.encode(mixed_items, "query"), expected, atol=1e-5, rtol=0)
    prompted = build_multimodal_encoder("tiny-qwen2_5-vl", MultimodalConfig(query_prompt="so "), model=model)
    query, passage = (prompted.encode([Item("the 42")], kind) for kind in ("query", "passage"))  # type: ignore[arg-type]
    assert not torch.allclose(query, passage, atol=1e-3)
    torch.testing.assert_close(prompted.encode([Item("so the 42")], "passage"), query, atol=1e-5, rtol=0)
    assert cut.config.max_tokens == 256


@torch.no_grad()
def test_lower_precision_gives_float32_vectors_nearby(mixed_items: list[Item]) -> None:
    full = build_multimodal_encoder("tiny-qwen2-vl").encode(mixed_items, "query")
    half = build_multimodal_encoder("tiny-qwen2-vl", loading=BackboneConfig(dtype="bfloat16")).encode(
        mixed_items, "query"
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        InputError, match="backbone 'tiny-qwen3' is a qwen3 model; images need one of qwen2_vl, qwen2_5_vl"
    ):
        build_multimodal_encoder("tiny-qwen3")
    with pytest.raises(InputError, match="dimensions must be at most the backbone's width 96, got 97"):
        build_multimodal_encoder("tiny-qwen2-vl", MultimodalConfig(dimensions=97))
    model: Any = load_backbone("tiny-qwen2-vl")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash attention takes no mask that lets tokens see those behind them"):
        build_multimodal_encoder("tiny-qwen2-vl", model=model)
    build_multimodal_encoder("tiny-qwen2-vl", MultimodalConfig(attention="causal"), model=model)
