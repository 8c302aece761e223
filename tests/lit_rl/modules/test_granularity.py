"""Every trainable parameter in exactly one part, and which ones belong together."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

from lit_core.backbones import BackboneConfig, Lora
from lit_core.presets import preset_config
from lit_rl.modules.granularity import Partition, kind_of, partition
from lit_rl.modules.policy import Policy

GRANULARITIES = ("param", "linear", "block", "layer", "global")
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 30,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "qwen2": lambda: AutoModelForCausalLM.from_config(Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=False)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30)),
    "qwen3": lambda: AutoModelForCausalLM.from_config(preset_config("nano-qwen3")),
    "adapters": lambda: Policy("nano-qwen3", BackboneConfig(), Lora(r=4)),
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
}


def members(found: Partition) -> dict[str, set[str]]:
    """Names of the parameters of each part."""
    parts: dict[str, set[str]] = {part.name: set() for part in found.parts}
    for name, number in zip(found.names, found.index, strict=True):
        parts[found.parts[number].name].add(name)
    return parts


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model", MODELS)
def test_a_partition_of_the_trainable_parameters(model: str, granularity: Any) -> None:
    module = MODELS[model]()
    found = partition(module, granularity)
    trainable = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    assert Counter(map(id, found.parameters)) == Counter(trainable)
    assert sorted(set(found.index)) == list(range(len(found.parts)))
    assert sum(part.size for part in found.parts) == sum(
        parameter.numel() for parameter in module.parameters() if parameter.requires_grad
    )
    assert len({part.name for part in found.parts}) == len(found.parts)
    finer = [partition(module, kind) for kind in GRANULARITIES]  # each takes parts of the one before together
    for fine, coarse in pairwise(finer):
        assert len(set(zip(fine.index, coarse.index, strict=True))) == len(fine.parts)


def test_counts_of_the_paper() -> None:
    """28 x 12 + 3 modules of Qwen2.5-7B and 32 x 9 + 3 of Llama-3.1-8B, here with two layers."""
    qwen = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL, tie_word_embeddings=False))
    assert len(partition(qwen).parts) == 2 * 12 + 3
    assert len(partition(MODELS["llama"]()).parts) == 2 * 9 + 3
    assert len(partition(MODELS["llama"](), "block").parts) == 2 * 2 + 3
    assert len(partition(MODELS["llama"](), "layer").parts) == 2 + 3
    assert len(partition(MODELS["llama"](), "global").parts) == 1


def test_weight_and_bias_are_one_linear_layer() -> None:
    parts = members(partition(MODELS["qwen2"](), "linear"))
    name = "model.layers.1.self_attn.q_proj"
    assert parts[name] == {f"{name}.weight", f"{name}.bias"}
    assert parts["model.layers.1.input_layernorm"] == {"model.layers.1.input_layernorm.weight"}


def test_adapters_of_a_target_are_one_linear_layer() -> None:
    found = partition(MODELS["adapters"](), "linear")
    parts = members(found)
    assert len(parts) == 2 * 7
    for name, parameters in parts.items():
        assert parameters == {f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"}
    assert {part.place for part in found.parts} == {
        *(f"self_attn.{letter}_proj" for letter in "qkvo"), *(f"mlp.{what}_proj" for what in ("gate", "up", "down"))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "attention", "mlp"),
    [
        ("qwen2", {"input_layernorm"}, {"post_attention_layernorm"}),
        ("qwen3", {"input_layernorm"}, {"post_attention_layernorm"}),
        (
            "gemma2",
            {"input_layernorm", "post_attention_layernorm"},
            {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
        ),
        ("gpt2", {"ln_1"}, {"ln_2"}),
    ],
)
def test_a_norm_joins_its_block(model: str, attention: set[str], mlp: set[str]) -> None:
    found = partition(MODELS[model](), "block")
    own = {"attention": {"attn", "self_attn"}, "mlp": {"mlp"}}
    for part in found.parts:
        if part.layer is not None:
            assert part.kind == part.place
            inside = {name.split(f".{part.layer}.")[1].split(".")[0] for name in members(found)[part.name]}
            assert inside - own[part.place] == {"attention": attention, "mlp": mlp}[part.place]
            assert inside & own[part.place]
    assert all(len(names) <= 2 for name, names in members(found).items() if ".0." not in name and ".1." not in name)


def test_tied_weights_are_there_once() -> None:
    tied, untied = (members(partition(MODELS[name](), "block")) for name in ("qwen2", "llama"))
    assert "lm_head" not in tied
    assert tied["model.embed_tokens"] == {"model.embed_tokens.weight"}
    assert untied["lm_head"] == {"lm_head.weight"}


def test_kinds() -> None:
    found = partition(MODELS["llama"](), "param")
    kinds = Counter(part.kind for part in found.parts)
    assert kinds == {"attention": 8, "mlp": 6, "norm": 5, "embedding": 1, "head": 1}
    assert [part.layer for part in found.parts if part.kind == "head"] == [None]
    assert {part.layer for part in found.parts if part.kind == "mlp"} == {0, 1}
    assert partition(MODELS["llama"](), "layer").parts[1].kind == "other"
    assert kind_of("transformer.h.0.ln_2.weight") == "norm"
    assert kind_of("transformer.wpe.weight") == "embedding"


def test_any_module_and_any_mapping() -> None:
    module = MODELS["plain"]()
    assert members(partition(module, "block")) == {"0": {"0.weight", "0.bias"}, "2": {"2.weight", "2.bias"}}
    mapping = {"0.weight": "weights", "2.weight": "weights", "0.bias": "biases", "2.bias": "biases"}
    found = partition(module, mapping)
    assert members(found) == {"weights": {"0.weight", "2.weight"}, "biases": {"0.bias", "2.bias"}}
    module[0].requires_grad_(False)
    assert partition(module).names == ("2.weight", "2.bias")


def test_what_is_no_partition_is_refused() -> None:
    module = MODELS["plain"]()
    with pytest.raises(ValueError, match=r"does not know '0\.bias'"):
        partition(module, dict.fromkeys(("0.weight", "2.weight", "2.bias"), "all"))
    with pytest.raises(ValueError, match="not trainable here: '3"):
        partition(module, dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias", "3.bias"), "all"))
    with pytest.raises(ValueError, match="granularity must be"):
        partition(module, "blocks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing is trainable"):
        partition(module.requires_grad_(False))


def test_a_parameter_of_the_module_itself() -> None:
    found = partition(nn.Linear(2, 2), "linear")
    assert len(found.parts) == 1
    assert torch.equal(torch.tensor(found.index), torch.zeros(2, dtype=torch.long))
