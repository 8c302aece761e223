"""Models as folders that transformers and peft load."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, get_args

from lit_core.backbones import unwrap
from lit_core.errors import InputError
from lit_core.files import read_json, write_json
from lit_core.presets import is_preset

ExportForm = Literal["merged", "adapter"]


def check_free(output: Path) -> None:
    """Refuse to write a folder where there is something.

    Raises:
        InputError: There is something at ``output`` already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("the output folder exists and is not empty; name another", output)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside ``output`` to fill; it becomes ``output`` when the block ends without an error.

    Raises:
        InputError: There is something at ``output`` already.
    """
    check_free(output)
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
