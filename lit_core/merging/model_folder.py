"""Folders of models: their tensors, their configurations, and what else lies in them."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from lit_core.errors import InputError
from lit_core.files import read_json, write_json
from lit_core.merging.tensor_file import FileTensor, TensorFile

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "merge.json"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
SAME = ("tie_word_embeddings",)  # fields of a configuration that have to be equal
SAME_IF_BOTH = ("num_attention_heads", "num_key_value_heads", "hidden_act")  # no shape of a tensor tells of them
TEMPLATES = "additional_chat_templates"  # folder of a tokenizer with several


class ModelFolder:
    """A folder as transformers writes it, or as sentence-transformers does, with a folder for each module.

    Args:
        path: Folder with ``config.json`` and ``model.safetensors``, or an index and its files; modules that
            ``modules.json`` names may have such files too.

    Attributes:
        parts: Folders of modules, relative to the path; the first is ``""``, the folder itself.
        config: The model's configuration.
        tensors: All tensors; the names of those in the folder of a module start with it.

    Raises:
        InputError: It is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise InputError("there is no such folder", path)
        self.path = path
        self.parts = list(module_folders(path))
        configs = [file for part in self.parts if (file := path / part / "config.json").is_file()]
        if (path / "adapter_config.json").is_file():
            raise InputError("is an adapter; export it with --form merged, or merge adapters with merge_adapters", path)
        if not configs:
            raise InputError("is no model folder: it has no config.json", path)
        found = [read_json(config) for config in configs]
        self.config: dict[str, Any] = next((config for config in found if "model_type" in config), found[0])
        self.files: list[Path] = []
        self.tensors: dict[str, FileTensor] = {}
        self._opened = ExitStack()
        try:
            for part in self.parts:
                self._open(part)
            if not self.tensors:
                raise InputError(f"has neither {WEIGHTS} nor {INDEX}; save it with safe_serialization", path)
        except InputError:
            self._opened.close()
            raise

    def __enter__(self) -> "ModelFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def _open(self, part: str) -> None:
        folder = self.path / part
        if (folder / INDEX).is_file():
            file_of: dict[str, str] | None = read_json(folder / INDEX).get("weight_map", {})
        elif (folder / WEIGHTS).is_file():
            file_of = None
        elif part and any(folder.glob("*.bin")):
            raise InputError(f"has neither {WEIGHTS} nor {INDEX}; save it with safe_serialization", folder)
        else:
            return
        for name in [WEIGHTS] if file_of is None else dict.fromkeys(file_of.values()):
            file = TensorFile(folder / name)
            self._opened.callback(file.close)
            self.files.append(folder / name)
            for key, tensor in file.tensors.items():
                if file_of is None or file_of.get(key) == name:
                    self.tensors[f"{part}/{key}" if part else key] = tensor
        for key, name in (file_of or {}).items():
            if (f"{part}/{key}" if part else key) not in self.tensors:
                raise InputError(f"has no tensor '{key}', which the index says it has", folder / name)

    def part_of(self, key: str) -> str:
        """The folder of the module that a tensor belongs to."""
        return next((part for part in self.parts if part and key.startswith(f"{part}/")), "")

    def describe(self) -> dict[str, Any]:
        """Path, a hash of the configuration and sizes of files in bytes."""
        config = hashlib.sha256()
        for part in self.parts:
            if (file := self.path / part / "config.json").is_file():
                config.update(file.read_bytes())
        sizes = {str(file.relative_to(self.path)): file.stat().st_size for file in self.files}
        return {"path": str(self.path), "config_sha256": config.hexdigest(), "files": sizes}


def module_folders(path: Path) -> Iterator[str]:
    """Folders of modules relative to a model's folder, which comes first, as an empty string.

    Raises:
        InputError: ``modules.json`` names a folder outside.
    """
    yield ""
    if not (path / "modules.json").is_file():
        return
    for module in read_json(path / "modules.json"):
        part = str(module.get("path", ""))
        inside = PurePosixPath(part)
        if inside.is_absolute() or ".." in inside.parts:
            raise InputError(f"names a folder outside, '{part}'", path / "modules.json")
        if part:
            yield part
        router = path / part / "router_config.json"
        for name in read_json(router).get("types", {}) if router.is_file() else ():
            yield str(PurePosixPath(part, PurePosixPath(name).name))


def copy_rest(path: Path, folder: Path) -> None:
    """Copy whatever of a model's folder is no weight: configuration, tokenizer, templates, modules."""
    for part in [*module_folders(path), *([TEMPLATES] if (path / TEMPLATES).is_dir() else [])]:
        (folder / part).mkdir(parents=True, exist_ok=True)
        for source in (path / part).iterdir() if (path / part).is_dir() else ():
            skipped = source.name == MANIFEST or source.name.endswith((*WEIGHT_FILES, ".index.json"))
            if source.is_file() and not skipped:
                shutil.copyfile(source, folder / part / source.name)


def check_type(like: ModelFolder, other: ModelFolder) -> None:
    """Refuse a model of another architecture, before its tensors are compared by name.

    Raises:
        InputError: They are not of the same type.
    """
    one, two = (folder.config.get("model_type") for folder in (like, other))
    if one != two:
        raise InputError(f"is {two}, but {one} in {like.path}", other.path / "config.json", field="model_type")


def check_configs(like: ModelFolder, other: ModelFolder) -> None:
    """Refuse a model that computes otherwise with the same tensors, or one whose tokenizer gives other ids.

    Raises:
        InputError: So it is; the error names the field.
    """
    both = [field for field in SAME_IF_BOTH if field in like.config and field in other.config]
    for field in (*SAME, *both):
        if other.config.get(field) != like.config.get(field):
            raise InputError(f"is {other.config.get(field)}, but {like.config.get(field)} in {like.path}",
                             other.path / "config.json", field=field)  # fmt: skip
    for part in (part for part in like.parts if part and part in other.parts):
        files = [folder.path / part / "config.json" for folder in (like, other)]
        if all(file.is_file() for file in files) and read_json(files[0]) != read_json(files[1]):
            raise InputError(f"is not as {files[0]}", files[1])
    tokens, others = _tokens(like.path), _tokens(other.path)
    for index in tokens.keys() & others.keys():
        if tokens[index] != others[index]:
            raise InputError(f"token {index} is {others[index]!r}, but {tokens[index]!r} in {like.path}",
                             other.path / "tokenizer.json")  # fmt: skip


def set_dtype(folder: Path, dtype: str) -> None:
    """Name the type of the weights in a configuration that names one, in its parts too.

    Args:
        folder: Folder with ``config.json``.
        dtype: Such as ``float32``.
    """

    def changed(config: dict[str, Any]) -> dict[str, Any]:
        nested = {key: changed(value) for key, value in config.items() if isinstance(value, dict)}
        named = {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
        return {**config, **nested, **named}

    before = read_json(folder / "config.json")
    if changed(before) != before:
        write_json(folder / "config.json", changed(before))


def _tokens(path: Path) -> dict[int, str]:
    """Tokens by id, as far as the folder has a fast tokenizer."""
    if not (path / "tokenizer.json").is_file():
        return {}
    content = read_json(path / "tokenizer.json")
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        found = {index: token for token, index in vocabulary.items()}
    else:  # pairs of token and score, in the order of ids
        found = {index: entry[0] for index, entry in enumerate(vocabulary)}
    return found | {added["id"]: added["content"] for added in content.get("added_tokens", ())}
