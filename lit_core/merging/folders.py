"""Merging model folders, a few tensors in memory at a time."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_core.errors import InputError
from lit_core.export import new_folder
from lit_core.files import read_json, write_json
from lit_core.merging.states import check_arguments, check_keys, merge_tensors
from lit_core.progress import track

SHARD_BYTES = 5 * 10**9
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


class SafetensorsFolder:
    """Tensors of a folder, read one at a time.

    Args:
        path: Folder with ``config.json`` and ``model.safetensors``, or an index and its parts.

    Raises:
        InputError: It is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            raise InputError("is an adapter; export it with --form merged" if adapter else "is no model folder: it has "
                             "no config.json", path)  # fmt: skip
        self.path, self.config = path, read_json(path / "config.json")
        if (path / INDEX).is_file():
            self.file_of: dict[str, str] = read_json(path / INDEX).get("weight_map", {})
        elif (path / WEIGHTS).is_file():
            with self._open(WEIGHTS) as file:
                self.file_of = dict.fromkeys(file.keys(), WEIGHTS)
        else:
            raise InputError(f"has neither {WEIGHTS} nor {INDEX}; save it with safe_serialization", path)
        self.files = ExitStack()
        self.opened: dict[str, Any] = {}

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.files.close()

    def tensor(self, key: str) -> Tensor:
        """Read a tensor.

        Raises:
            InputError: The file that the index names lacks it, or cannot be read.
        """
        name = self.file_of[key]
        if name not in self.opened:
            self.opened[name] = self.files.enter_context(self._open(name))
        try:
            return self.opened[name].get_tensor(key)
        except Exception as error:  # safetensors has no class of its own for each mistake
            raise InputError(f"tensor '{key}' cannot be read ({error})", self.path / name) from None

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        try:
            return safe_open(str(self.path / name), framework="pt")
        except Exception as error:  # the same
            raise InputError(f"cannot be read ({error})", self.path / name) from None


def merge_folders(
    folders: Sequence[Path | str],
    output: Path | str,
    method: str,
    weights: Sequence[float] | None = None,
    base: Path | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Merge model folders into one that ``AutoModelForCausalLM`` and its like load.

    One tensor of each model and one file of the result are in memory at a time. Configuration, tokenizer and whatever
    else is no weight are those of the base, or of the first folder. The result is written beside ``output``, which it
    becomes when it is whole.

    Args:
        folders: Models of one architecture.
        output: Folder to write.
        method: Key of ``METHODS``.
        weights: One a model, 1 each by default; ``linear`` divides them by their sum.
        base: Folder that the models were trained from; ``task_arithmetic`` needs it.
        shard_bytes: Most bytes of a file of weights, unless a single tensor has more.

    Raises:
        InputError: A folder is none of a model, the models do not fit together, or there is something at ``output``.
    """
    chosen, factors = check_arguments(len(folders), method, weights, base is not None)
    with ExitStack() as stack:
        models = [stack.enter_context(SafetensorsFolder(Path(folder))) for folder in folders]
        root = None if base is None else stack.enter_context(SafetensorsFolder(Path(base)))
        like = models[0] if root is None else root
        for model in [*models, *([] if root is None else [root])]:
            check_keys(like.file_of.keys(), model.file_of.keys(), str(model.path))
            for field in ("model_type", "tie_word_embeddings"):
                if model.config.get(field) != like.config.get(field):
                    raise InputError(f"is {model.config.get(field)}, but {like.config.get(field)} in {like.path}",
                                     model.path / "config.json", field=field)  # fmt: skip
        folder = stack.enter_context(new_folder(Path(output)))
        for source in like.path.iterdir():
            if source.is_file() and not source.name.endswith((*WEIGHT_FILES, ".index.json")):
                shutil.copyfile(source, folder / source.name)
        keys = sorted(like.file_of, key=lambda key: (like.file_of[key], key))

        def merged() -> Iterator[tuple[str, Tensor]]:
            for key in track(keys, "merging", unit="tensor"):
                tensors = [model.tensor(key) for model in models]
                yield key, merge_tensors(key, chosen, tensors, factors, None if root is None else root.tensor(key))

        _write(folder, merged(), shard_bytes)


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    from safetensors.torch import save_file

    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, str(folder / f"part-{len(parts)}"), metadata={"format": "pt"})
        parts.append(list(held))
        held.clear()

    for key, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[key] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(parts) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
