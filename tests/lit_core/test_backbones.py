from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_core.backbones import (
    BackboneConfig,
    Lora,
    Quantization,
    Task,
    load_backbone,
    load_tokenizer,
    text_model,
    transformer_blocks,
    unwrap,
)
from lit_core.errors import InputError
from lit_core.presets import preset_config, preset_tokenizer

NAMES = ("tiny-qwen3", "tiny-llama", "tiny-bert")
IDS = torch.tensor([[5, 6, 7, 8]])


def _trained_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    (model(input_ids=IDS).last_hidden_state.float() ** 2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_preset_weights_depend_on_their_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    first = load_backbone(name, lora=Lora(r=2)).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = load_backbone(name, lora=Lora(r=2)).state_dict()
    other = load_backbone(name, config=BackboneConfig(seed=1), lora=Lora(r=2)).state_dict()
    for key, value in first.items():
        torch.testing.assert_close(value, again[key], rtol=0, atol=0)
    matrices = [key for key, value in first.items() if value.ndim == 2 and "lora_B" not in key]  # those start at zero
    assert all(not torch.equal(first[key], other[key]) for key in matrices)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the caller's random state is left alone


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_weights_have_the_dtype_asked_for(dtype: Any, expected: torch.dtype) -> None:
    model = load_backbone("tiny-qwen3", config=BackboneConfig(dtype=dtype), lora=Lora(r=2))
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {expected}


@pytest.mark.parametrize(("task", "head"), [("encoder", False), ("causal_lm", True)])
def test_task_decides_on_the_head(task: Task, head: bool) -> None:
    model = load_backbone("tiny-llama", task, lora=Lora(r=2))
    assert (unwrap(model).get_output_embeddings() is not None) == head
    assert type(text_model(model)).__name__ == "LlamaModel"
    assert [type(block).__name__ for block in transformer_blocks(model)] == ["LlamaDecoderLayer"] * 3


def test_adapters_sit_where_they_are_asked_for() -> None:
    model = load_backbone("tiny-qwen3", lora=Lora(r=4, targets=["q_proj", "mlp.up_proj"]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 2 * 2  # layers, targets, A and B
    assert all(("q_proj.lora_" in name) or ("up_proj.lora_" in name) for name in trained)


def test_a_target_without_a_match_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"LoRA target 'query' matches no module; .*down_proj, .*q_proj, .*v_proj$"):
        load_backbone("tiny-qwen3", lora=Lora(r=4, targets=["q_proj", "query"]))


def test_dora_trains_magnitudes_and_starts_as_the_base() -> None:
    plain = load_backbone("tiny-qwen3").eval()
    dora = load_backbone("tiny-qwen3", lora=Lora(r=4, dora=True)).eval()
    torch.testing.assert_close(
        dora(input_ids=IDS).last_hidden_state, plain(input_ids=IDS).last_hidden_state, atol=1e-5, rtol=0
    )
    gradients = _trained_gradients(dora)
    assert any("magnitude" in name for name in gradients)
    assert all(".lora_" in name for name in gradients)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-bert"])
@pytest.mark.parametrize("lora", [None, Lora(r=4, dropout=0.0)])
def test_checkpointing_gives_the_same_gradients(name: str, lora: Lora | None) -> None:
    found = []
    for checkpointing in (False, True):
        model = load_backbone(name, config=BackboneConfig(gradient_checkpointing=checkpointing), lora=lora)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.constant_(parameter, 0.01)
        model.train()
        found.append(_trained_gradients(model))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert plain
    for key, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_all_that_is_trainable_gets_a_gradient(lora: Lora | None) -> None:
    """DDP refuses weights without one, such as those of BERT's unused pooler."""
    model = load_backbone("tiny-bert", lora=lora)
    gradients = _trained_gradients(model)
    assert gradients.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning")  # it casts float32 inputs
def test_quantised_backbone_is_close_and_trains_its_adapters(quantization: Quantization) -> None:
    pytest.importorskip("bitsandbytes", reason="quantisation needs bitsandbytes")
    full = load_backbone("tiny-llama", "causal_lm")
    model = load_backbone("tiny-llama", "causal_lm", lora=Lora(r=4, dropout=0.0), quantization=quantization)
    linear = unwrap(model).model.layers[0].self_attn.q_proj.base_layer
    assert type(linear).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization]
    exact, rough = full(input_ids=IDS).logits.detach(), model(input_ids=IDS).logits.float()
    similarity = torch.cosine_similarity(exact.flatten(), rough.detach().flatten(), dim=0)
    assert 0.95 < float(similarity) < 1 - 1e-6
    rough.logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all(".lora_" in name for name in gradients)
    assert all(g is not None and bool(g.abs().sum() > 0) for name, g in gradients.items() if "lora_B" in name)


def test_a_folder_loads_as_what_was_saved(tmp_path: Path) -> None:
    model = load_backbone("tiny-llama")
    model.save_pretrained(tmp_path)
    preset_tokenizer("tiny-llama").save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[key], rtol=0, atol=0)
    assert load_tokenizer(str(tmp_path)).pad_token == "<pad>"


def test_a_tokenizer_without_padding_pads_with_the_end_token(tmp_path: Path) -> None:
    tokenizer = preset_tokenizer("tiny-qwen3")
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    preset_config("tiny-qwen3").save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.pad_token, loaded.padding_side) == ("<|im_end|>", "right")


def test_bad_backbones_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"this folder holds no model: config\.json is missing"):
        load_backbone(str(tmp_path))
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(InputError, match=r"backbone .no/such-model. is none of the presets \(tiny-qwen3") as caught:
            load("no/such-model")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"preset .tiny-qwen3. cannot be built as encoder"):
        load_backbone("tiny-qwen3", "encoder", BackboneConfig(attention="none"))  # type: ignore[arg-type]


def test_adapters_of_a_bfloat16_backbone_are_float32() -> None:
    model = load_backbone("tiny-qwen3", config=BackboneConfig(dtype="bfloat16"), lora=Lora(r=4))
    types = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    model(input_ids=torch.arange(5)[None]).last_hidden_state.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash attention is installed")
def test_an_attention_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    config = BackboneConfig(attention="flash_attention_2")
    load_backbone("tiny-bert", "encoder").save_pretrained(tmp_path)
    for backbone in ("tiny-qwen3", str(tmp_path)):
        with pytest.raises(InputError, match="FlashAttention2 has been toggled on"):
            load_backbone(backbone, "encoder", config)
