"""What is special about backbones that read images: a second tower, and where adapters go."""

from typing import Any

from torch import nn

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "fc1", "fc2")


def is_vision_language(config: Any) -> bool:
    """Whether a transformers configuration is that of a vision-language model."""
    return getattr(config, "vision_config", None) is not None


def default_targets(model: nn.Module) -> list[str]:
    """Linear layers that get an adapter unless others are named (CoCoA, card section 3).

    Attention and MLP of the language model, the vision tower's ``qkv`` and its MLP, which is ``fc1`` and ``fc2`` in
    Qwen2-VL and ``gate_proj``, ``up_proj`` and ``down_proj`` in Qwen2.5-VL. The tower's output projections and the
    merger, which leads from one tower to the other, are left alone.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name in ADAPTED if name in linear]


def towers(model: nn.Module) -> list[nn.Module]:
    """The parts of a vision-language model, without its head, that hold its repeated layers."""
    return list(model.children())
