"""Encoders as folders that sentence-transformers and transformers load."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file

from lit_core.backbones import unwrap
from lit_core.errors import InputError
from lit_core.files import read_json, write_json, write_text
from lit_core.presets import is_preset
from lit_embed.modules.encoder import Encoder

ExportForm = Literal["merged", "adapter"]
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


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside ``output`` to fill; it becomes ``output`` when the block ends without an error.

    Raises:
        InputError: There is something at ``output`` already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("the output folder exists and is not empty; name another", output)
    beside = output.with_name(f".{output.name}.tmp")
    rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if output.exists():
            output.rmdir()
        beside.rename(output)
    finally:
        rmtree(beside, ignore_errors=True)


def save_model(model: Any, folder: Path, form: str, base: str, output: Path) -> None:
    """Write a transformers model, whole or its adapter alone.

    An adapter names the model that it belongs to. Where that is no folder or hub id (a preset, or a base with an
    adapter merged in before), the base is written to ``base`` inside the folder.

    Args:
        model: The model, with adapters or without.
        folder: Where to write.
        form: ``merged`` or ``adapter``.
        base: Name of the backbone that was trained.
        output: Where the folder will stand in the end.

    Raises:
        InputError: Unknown form, a quantised model to be merged, or no adapter to write.
    """
    if form not in get_args(ExportForm):
        raise InputError(f"form must be one of {', '.join(get_args(ExportForm))}, got '{form}'")
    from peft import PeftModel  # takes seconds to import, and help needs none of it

    if form == "adapter":
        if not isinstance(model, PeftModel):
            raise InputError("there is no adapter to export: the model was trained without --model.lora.r")
        model.save_pretrained(str(folder))
        settings = folder / "adapter_config.json"
        write_json(settings, read_json(settings) | {"base_model_name_or_path": _base(model, folder, base, output)})
        return
    if getattr(unwrap(model), "quantization_method", None) is not None:
        raise InputError("a quantised model cannot be merged; export the adapter (--form adapter)")
    if isinstance(model, PeftModel):
        model = deepcopy(model).merge_and_unload()  # the model in memory keeps its adapters
    attention = model.config._attn_implementation
    model.save_pretrained(folder)
    model.config._attn_implementation = attention


def _base(model: Any, folder: Path, base: str, output: Path) -> str:
    path = Path(base)
    if (path / "config.json").is_file():
        return str(path.resolve())
    if not path.exists() and not is_preset(base):
        return base
    deepcopy(model).unload().save_pretrained(folder / "base")
    return str(output.resolve() / "base")


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
