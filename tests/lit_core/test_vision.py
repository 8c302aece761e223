"""Backbones with two towers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from lit_core.backbones import (
    BackboneConfig,
    Lora,
    Quantization,
    load_backbone,
    load_tokenizer,
    text_model,
    transformer_blocks,
    unwrap,
)
from lit_core.presets import preset_config, preset_tokenizer
from lit_core.vision import default_targets, is_vision_language

NAMES = ("tiny-qwen2-vl", "tiny-qwen2_5-vl")
CLASSES = dict(zip(NAMES, (Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration), strict=True))
LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = {"tiny-qwen2-vl": ["qkv", "fc1", "fc2"], "tiny-qwen2_5-vl": ["qkv", "gate_proj", "up_proj", "down_proj"]}


def _inputs(name: str) -> dict[str, Tensor]:
    """A row with one image of 4 x 4 patches, which are 4 tokens."""
    config: Any = preset_config(name)
    start, image, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    ids = torch.tensor([[start, image, image, image, image, end, 5, 6, 7]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == image).long(),
        "pixel_values": torch.randn(16, 1176, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    (model(**_inputs(name)).last_hidden_state.float() ** 2).sum().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_sit_in_both_towers(name: str, dora: bool) -> None:
    """Card CoCoA, sections 3 and 10: language q,k,v,o,gate,up,down; vision qkv and its MLP, whatever its names."""
    model = load_backbone(name, lora=Lora(r=2, dora=dora, dropout=0.0))
    adapted = [key.partition(".lora_A")[0] for key, _ in model.named_parameters() if "lora_A" in key]
    language = [path.rpartition(".")[2] for path in adapted if ".language_model.layers." in path]
    tower = [path.rpartition(".")[2] for path in adapted if ".visual.blocks." in path]
    assert (sorted(language), sorted(tower)) == (sorted(LANGUAGE * 3), sorted(TOWER[name] * 2))
    assert len(adapted) == len(language) + len(tower)
    for key, parameter in model.named_parameters():  # fresh adapters hide the gradient of their first matrix
        if "lora_B" in key:
            nn.init.constant_(parameter, 0.01)
    gradients = _gradients(model, name)
    assert gradients.keys() == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients.values())
    assert any("magnitude" in key for key in gradients) == dora


def test_named_targets_win() -> None:
    model = load_backbone("tiny-qwen2-vl", lora=Lora(r=2, targets=["attn.proj"]))
    adapted = {key.partition(".lora_A")[0][-9:] for key, _ in model.named_parameters() if "lora_A" in key}
    assert adapted == {"attn.proj"}


def test_adapters_start_gaussian_where_asked() -> None:
    """peft's two starts: uniform within 1 / sqrt(width), and normal with standard deviation 1 / rank."""
    for gaussian in (False, True):
        model = load_backbone("tiny-qwen2-vl", lora=Lora(r=4, gaussian=gaussian, targets=["down_proj"]))
        drawn = torch.cat([p.detach().flatten() for key, p in model.named_parameters() if "lora_A" in key])
        bound = (1 / 256) ** 0.5
        assert (float(drawn.abs().max()) > 2 * bound) == gaussian
        if gaussian:
            assert float(drawn.std()) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_the_task_decides_on_the_head(name: str) -> None:
    model: Any = load_backbone(name, "causal_lm", lora=Lora(r=2))
    assert isinstance(unwrap(model), CLASSES[name])
    assert unwrap(model).lm_head.weight is text_model(model).get_input_embeddings().weight
    assert type(text_model(model)) is type(load_backbone(name))
    assert model(**_inputs(name)).logits.shape == (1, 9, 4096)


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_of_both_towers_are_units_of_sharding(name: str) -> None:
    for model in (load_backbone(name), load_backbone(name, "causal_lm", lora=Lora(r=2))):
        inner = text_model(model)
        assert transformer_blocks(model) == [*inner.visual.blocks, *inner.language_model.layers]
        assert len(transformer_blocks(model)) == 5


def test_text_backbones_are_none_of_this() -> None:
    assert not is_vision_language(preset_config("tiny-qwen3"))
    assert is_vision_language(preset_config("tiny-qwen2_5-vl"))
    assert default_targets(load_backbone("tiny-bert")) == []
    model = load_backbone("tiny-qwen3", lora=Lora(r=2))
    assert len([key for key, _ in model.named_parameters() if "lora_A" in key]) == 3 * 7  # every linear layer, as ever


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_their_seed_and_spread_alone(name: str) -> None:
    first, again = load_backbone(name).state_dict(), load_backbone(name).state_dict()
    other = load_backbone(name, config=BackboneConfig(seed=1)).state_dict()
    wide = load_backbone(name, config=BackboneConfig(init_std=0.1)).state_dict()
    for key, value in first.items():
        torch.testing.assert_close(value, again[key], rtol=0, atol=0)
        if value.ndim > 1:
            assert not torch.equal(value, other[key])
            assert float(wide[key].std()) == pytest.approx(0.1, rel=0.1), key
            assert float(value.std()) == pytest.approx(0.02, rel=0.1), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lora", [None, Lora(r=2, dropout=0.0)])
def test_checkpointing_gives_the_same_gradients(name: str, lora: Lora | None) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = load_backbone(name, config=BackboneConfig(gradient_checkpointing=checkpointing), lora=lora)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.constant_(parameter, 0.01)
        calls: list[int] = []
        layers: list[Any] = transformer_blocks(model)
        for layer in (layers[0], layers[-1]):
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append(_gradients(model.train(), name))
        assert len(calls) == (4 if checkpointing else 2)  # in both towers the forward pass runs a second time
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert plain
    for key, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saved", ["with head", "without head", "merged adapter"])
def test_a_folder_loads_as_what_was_saved(name: str, saved: str, tmp_path: Path) -> None:
    lora = Lora(r=2, gaussian=True) if saved == "merged adapter" else None
    model: Any = load_backbone(name, "encoder" if saved == "without head" else "causal_lm", lora=lora)
    if lora is not None:
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.constant_(parameter, 0.01)
        model = model.merge_and_unload()
    model.save_pretrained(tmp_path)
    preset_tokenizer(name).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == preset_config(name).model_type
    expected = text_model(model).state_dict()
    for task in ("encoder", "causal_lm"):
        again = load_backbone(str(tmp_path), task)  # type: ignore[arg-type]
        found = text_model(again).state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    assert load_tokenizer(str(tmp_path)).convert_tokens_to_ids("<|image_pad|>") == preset_config(name).image_token_id


def test_weights_have_the_dtype_asked_for() -> None:
    model = load_backbone("tiny-qwen2_5-vl", config=BackboneConfig(dtype="bfloat16"), lora=Lora(r=2))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model(**_inputs("tiny-qwen2_5-vl")).last_hidden_state.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning")  # it casts float32 inputs
def test_quantised_towers_are_close_and_train_their_adapters(quantization: Quantization) -> None:
    pytest.importorskip("bitsandbytes", reason="quantisation needs bitsandbytes")
    name = "tiny-qwen2-vl"
    model = load_backbone(name, lora=Lora(r=2, dropout=0.0), quantization=quantization)
    exact = load_backbone(name)(**_inputs(name)).last_hidden_state.detach()
    rough = model(**_inputs(name)).last_hidden_state.float()
    assert 0.9 < float(torch.cosine_similarity(exact.flatten(), rough.detach().flatten(), dim=0)) < 1 - 1e-6
    gradients = _gradients(model, name)
    assert all(".lora_" in key for key in gradients)
    assert any(".visual." in key and float(g.abs().sum()) > 0 for key, g in gradients.items())
