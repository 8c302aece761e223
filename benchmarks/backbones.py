"""Backbones of the benchmarks: Hugging Face classes with random weights, saved to a folder that both sides load."""

from pathlib import Path
from typing import Any

from lit_core.presets import preset_config, preset_tokenizer

PRESET = {"bert": "tiny-bert", "qwen3": "tiny-qwen3"}
POOLING = {"bert": ("mean", "mean"), "qwen3": ("last", "lasttoken")}  # our name, that of sentence-transformers


def save_backbone(family: str, layers: int, width: int, folder: Path) -> tuple[str, Any]:
    """Write a random model without dropout (so that both sides compute the same) and its tokenizer.

    Args:
        family: ``bert`` or ``qwen3``.
        layers: Hidden layers.
        width: Hidden size; 64 a head for qwen3, 32 for bert (as in MiniLM).
        folder: Where to write.

    Returns:
        The folder as text, and the tokenizer.
    """
    import torch
    from transformers import AutoModel

    sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "attention_probs_dropout_prob": 0.0}
    if family == "bert":
        sizes |= {"num_attention_heads": width // 32, "intermediate_size": 4 * width, "hidden_dropout_prob": 0.0}
    else:
        del sizes["attention_probs_dropout_prob"]  # qwen3 has no dropout
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64}
        sizes |= heads | {"intermediate_size": 3 * width}
    torch.manual_seed(0)
    model = AutoModel.from_config(preset_config(PRESET[family], **sizes))
    for parameter in model.parameters():  # larger than the usual start, so that vectors of texts differ clearly
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.06)
    tokenizer = preset_tokenizer(PRESET[family])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer


def sentence_transformer(family: str, folder: str) -> Any:
    """The peer's model from the same folder: transformer, pooling, normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(folder)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=POOLING[family][1])
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
