"""Encoders as folders that sentence-transformers and transformers load."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lit_core.backbones import unwrap
from lit_core.export import new_folder, save_model
from lit_core.files import write_json, write_text
from lit_embed.modules.encoder import Encoder

_PACKAGE = "sentence_transformers.models"


def export_encoder(encoder: Encoder, output: Path, form: str, model: Any, card: str, base: str) -> None:
    """Write the classic sentence-transformers layout, which old and new versions load.

    Args:
        encoder: Gives tokenizer, pooling, prompts, lengths.
        output: Folder to write; must not exist, or be empty.
        form: ``merged`` writes whole weights, ``adapter`` the peft adapter alone.
        model: What to save: the encoder's own model, or a larger one that contains it (a causal language model).
        card: Text of the model card, without its header.
        base: Name of the backbone that was trained.

    Raises:
        InputError: As in :func:`new_folder` and :func:`save_model`.
    """
    with new_folder(output) as folder:
        save_model(model, folder, form, base, output)
        encoder.tokenizer.save_pretrained(folder)
        _save_layout(encoder, folder)
        write_text(folder / "README.md", _header(base) + card)


def _save_layout(encoder: Encoder, folder: Path) -> None:
    config = encoder.config
    modules = ["Transformer", "Pooling"]
    modules += ["Dense"] if config.dimensions else []
    modules += ["Normalize"] if config.normalize else []
    paths = {name: f"{number}_{name}" if number else "" for number, name in enumerate(modules)}
    described = [
        {"idx": number, "name": str(number), "path": paths[name], "type": f"{_PACKAGE}.{name}"}
        for number, name in enumerate(modules)
    ]
    write_json(folder / "modules.json", described)
    length = max(config.query_length or 0, config.passage_length or 0)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    modes = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "eos": "lasttoken"}
    mode = modes[config.pooling or "mean"]
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    width = unwrap(encoder.model).config.hidden_size
    pooling = {"word_embedding_dimension": width} | {f"pooling_mode_{name}": name == mode for name in names}
    write_json(folder / "1_Pooling" / "config.json", pooling | {"include_prompt": True})
    if config.dimensions:
        _save_truncation(folder / paths["Dense"], width, config.dimensions)
    if config.normalize:
        (folder / paths["Normalize"]).mkdir()
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": config.query_prompt, "document": config.passage_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if config.normalize else "dot",
        },
    )


def _save_truncation(folder: Path, width: int, dimensions: int) -> None:
    """Truncation as an identity projection: a folder's own truncate_dim would cut after the normalisation."""
    folder.mkdir()
    settings = {"in_features": width, "out_features": dimensions, "bias": False}
    write_json(folder / "config.json", settings | {"activation_function": "torch.nn.modules.linear.Identity"})
    save_file({"linear.weight": torch.eye(dimensions, width)}, folder / "model.safetensors")


def _header(base: str) -> str:
    lines = ["---", "library_name: sentence-transformers", f"base_model: {base}", "pipeline_tag: sentence-similarity"]
    return "\n".join([*lines, "tags: [sentence-transformers, feature-extraction]", "---", "", ""])
