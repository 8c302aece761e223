"""Merging model folders, in memory that grows neither with their sizes nor with their number."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_core.export import new_folder
from lit_core.files import write_json
from lit_core.merging.chunks import CHUNK_BYTES, Stack
from lit_core.merging.methods import method_of
from lit_core.merging.model_folder import (
    INDEX,
    MANIFEST,
    WEIGHTS,
    ModelFolder,
    check_configs,
    check_type,
    copy_rest,
    set_dtype,
)
from lit_core.merging.states import check_bytes, check_keys, floating_type, merged_parts, merged_type
from lit_core.merging.tensor_file import TensorSpec, write_tensors
from lit_core.report import versions

SHARD_BYTES = 5 * 10**9


def merge_folders(
    folders: Sequence[Path | str],
    output: Path | str,
    method: str,
    weights: Sequence[float] | None = None,
    base: Path | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    **options: Any,
) -> dict[str, Any]:
    """Merge model folders into one that ``AutoModelForCausalLM``, ``SentenceTransformer`` and their like load.

    Tensors are read, merged and written a chunk at a time, more than once where a method first needs sums over the
    whole tensor; the result is that of :func:`lit_core.merging.merge`. Configuration, tokenizer, modules and whatever
    else is no weight are those of the base, or of the first model if the base has not the modules of the models. The
    result is written beside ``output``, which it becomes when it is whole; ``merge.json`` in it says how it was made.

    Args:
        folders: Models of one architecture.
        output: Folder to write.
        method: Key of ``METHODS``.
        weights: One a model, 1 each by default.
        base: Folder that the models were trained from; its floating types may be others.
        shard_bytes: Most bytes of a file of weights, unless a single tensor has more.
        dtype: Floating type of the result; then those of the models may differ. None takes theirs.
        chunk_bytes: Most memory for chunks.
        **options: Fields of the method's class.

    Returns:
        The content of ``merge.json``.

    Raises:
        InputError: A folder is none of a model, the models do not fit together, an option is wrong, or there is
            something at ``output``.
    """
    chosen = method_of(method, options)
    factors = chosen.check(len(folders), weights, base is not None)
    wanted = floating_type(dtype)
    check_bytes("chunk_bytes", chunk_bytes)
    check_bytes("shard_bytes", shard_bytes)
    with ExitStack() as stack:
        models = [stack.enter_context(ModelFolder(Path(folder))) for folder in folders]
        root = None if base is None else stack.enter_context(ModelFolder(Path(base)))
        like = models[0] if root is None or root.parts != models[0].parts else root
        for model in [*models, *([] if root is None else [root])]:
            check_type(like, model)
            check_keys(like.tensors.keys(), model.tensors.keys(), str(model.path))
            check_configs(like, model)
        specs: dict[str, list[TensorSpec]] = {part: [] for part in like.parts}
        for key, tensor in like.tensors.items():
            entries = [model.tensors[key] for model in models]
            kind = merged_type(key, entries, None if root is None else root.tensors[key], wanted)
            specs[like.part_of(key)].append(TensorSpec(key, tensor.shape, kind))
        folder = stack.enter_context(new_folder(Path(output)))
        copy_rest(like.path, folder)
        notes: dict[str, list[str]] = {}

        def merged(spec: TensorSpec) -> Iterator[Tensor]:
            entries = [model.tensors[spec.name] for model in models]
            like_base = None if root is None else root.tensors[spec.name]
            chunks = Stack(spec.name, entries, like_base, chunk_bytes, result=spec.dtype)
            yield from merged_parts(chunks, chosen, factors)
            if chunks.notes:
                notes[spec.name] = chunks.notes

        for part, tensors in specs.items():
            _write(folder / part, part, tensors, shard_bytes, merged)
        kinds = {spec.dtype for spec in specs[""] if spec.dtype.is_floating_point}
        if len(kinds) == 1 and (folder / "config.json").is_file():
            set_dtype(folder, str(kinds.pop()).removeprefix("torch."))
        manifest = {
            "method": method,
            "weights": factors if chosen.weighted else None,
            "options": asdict(chosen),
            "base": None if root is None else root.describe(),
            "models": [model.describe() for model in models],
            "files_from": str(like.path),
            "dtypes": {
                "before": [_type_counts(model.tensors.values()) for model in models],
                "after": _type_counts(spec for part in specs.values() for spec in part),
            },
            "notes": notes,
            "versions": versions(),
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def _type_counts(tensors: Iterable[TensorSpec]) -> dict[str, int]:
    """How many tensors have each type."""
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def _write(
    folder: Path,
    part: str,
    tensors: Sequence[TensorSpec],
    shard_bytes: int,
    merged: Callable[[TensorSpec], Iterable[Tensor]],
) -> None:
    """Write the weights of a module, in files of a bounded size; in a file the names have not the module's before."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in tensors:
        if not shards or size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        named = {spec.name.removeprefix(f"{part}/") if part else spec.name: spec for spec in shard}
        renamed = [replace(spec, name=key) for key, spec in named.items()]

        def parts(spec: TensorSpec, named: dict[str, TensorSpec] = named) -> Iterable[Tensor]:
            return merged(named[spec.name])

        about = "merging" if len(shards) == 1 else f"merging, file {number} of {len(shards)}"
        write_tensors(folder / name, renamed, parts, about)
        weight_map |= dict.fromkeys(named, name)
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
