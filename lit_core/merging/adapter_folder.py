"""Folders of LoRA adapters as peft writes them."""

import filecmp
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.files import read_json
from lit_core.merging.tensor_file import FileTensor, TensorFile

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.weight)?")
FOREIGN = (  # fields of a configuration with which an adapter is more, or something else, than a product B A
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
)  # fmt: skip
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # others start by changing the base


@dataclass(frozen=True)
class Factors:
    """A product ``B A``, float64.

    Args:
        a: ``(rank, columns)``.
        b: ``(rows, rank)``.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Layout:
    """Names of the factors of a module, and their shapes beyond rank and rows."""

    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


class Adapter:
    """A LoRA adapter, in memory.

    Args:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        config: Content of the former.
        updates: Factors by module, those of ``B`` times the scale.
        layouts: How peft stores them.

    Raises:
        InputError: It is no such folder, or the adapter is no product of two factors.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise InputError("there is no such folder", path)
        if not (path / CONFIG).is_file():
            raise InputError(f"is no adapter: it has no {CONFIG}", path)
        if not (path / ADAPTER).is_file():
            raise InputError(f"has no {ADAPTER}; save it with safe_serialization", path)
        self.path, self.config = path, read_json(path / CONFIG)
        self._check_kind()
        self.updates: dict[str, Factors] = {}
        self.layouts: dict[str, Layout] = {}
        file = TensorFile(path / ADAPTER)
        try:
            for module, (one, two) in self._pairs(file.tensors).items():
                self._read(module, one, two)
        finally:
            file.close()
        if not self.updates:
            raise InputError("has no LoRA factors", path / ADAPTER)

    def scale(self, module: str, rank: int) -> float:
        """Factor of a module's update: ``alpha / r``, or ``alpha / sqrt(r)`` for a rank-stabilised adapter.

        An ``alpha_pattern`` names modules by the ends of their names, as regular expressions.
        """
        patterns: Mapping[str, float] = self.config.get("alpha_pattern") or {}
        name = module.removeprefix(PREFIX)
        matched = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        alpha = next(matched, self.config.get("lora_alpha", 8))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def describe(self) -> dict[str, Any]:
        """Path, a hash of the configuration and sizes of files in bytes."""
        config = hashlib.sha256((self.path / CONFIG).read_bytes()).hexdigest()
        return {"path": str(self.path), "config_sha256": config,
                "files": {ADAPTER: (self.path / ADAPTER).stat().st_size}}  # fmt: skip

    def merged_config(self, adapters: Sequence["Adapter"], modules: Sequence[str], rank: int, base: str) -> Any:
        """Configuration of a merged adapter with scale 1, like this one's.

        Args:
            adapters: All that were merged.
            modules: Names of all their modules.
            rank: Rank of every module.
            base: Name of the base.
        """
        fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        targets = [[_plain(adapter.config.get(field)) for field in fields] for adapter in adapters]
        changed = {
            "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
            "init_lora_weights": True, "base_model_name_or_path": base,
        }  # fmt: skip
        if any(target != targets[0] for target in targets):  # then module by module
            changed |= dict.fromkeys(fields[1:])
            changed["target_modules"] = [module.removeprefix(PREFIX) for module in modules]
        return {**self.config, **changed}

    def _check_kind(self) -> None:
        place = self.path / CONFIG
        if self.config.get("peft_type") != "LORA":
            raise InputError(f"only LORA can be merged, got {self.config.get('peft_type')}", place, field="peft_type")
        for field in FOREIGN:
            if self.config.get(field):
                raise InputError(
                    "such an adapter is no product of two factors, and cannot be merged", place, field=field
                )
        if self.config.get("bias", "none") != "none":
            raise InputError("an adapter with biases cannot be merged", place, field="bias")
        if self.config.get("init_lora_weights") not in PLAIN_STARTS:
            raise InputError(f"'{self.config['init_lora_weights']}' changed the base, so that updates do not add up",
                             place, field="init_lora_weights")  # fmt: skip

    def _pairs(self, tensors: Mapping[str, FileTensor]) -> dict[str, tuple[FileTensor, FileTensor]]:
        found: dict[str, dict[str, FileTensor]] = {}
        for key, tensor in tensors.items():
            match = FACTOR.fullmatch(key)
            if match is None:
                raise InputError(f"tensor '{key}' is no LoRA factor", self.path / ADAPTER)
            found.setdefault(match["module"], {})[match["factor"]] = tensor
        for module, pair in found.items():
            if len(pair) < 2:
                raise InputError(f"module '{module}' has one factor of two", self.path / ADAPTER)
        return {module: (pair["A"], pair["B"]) for module, pair in found.items()}

    def _read(self, module: str, one: FileTensor, two: FileTensor) -> None:
        a, b = (_values(tensor) for tensor in (one, two))
        if len(one.shape) < 2 or len(two.shape) < 2 or one.shape[0] != two.shape[1] or math.prod(two.shape[2:]) != 1:
            raise InputError(
                f"module '{module}' has factors of shapes {one.shape} and {two.shape}", self.path / ADAPTER
            )
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise InputError(f"module '{module}' has values that are not finite", self.path / ADAPTER)
        rank = one.shape[0]
        self.updates[module] = Factors(a.reshape(rank, -1), b.reshape(-1, rank) * self.scale(module, rank))
        self.layouts[module] = Layout(one.name, two.name, one.shape[1:], two.shape[2:])


def check_adapters(adapters: Sequence[Adapter], base: str | None) -> str:
    """Refuse adapters that do not fit together.

    Args:
        adapters: The adapters.
        base: Name of their base, where they need not name the same.

    Returns:
        Name of their base.

    Raises:
        InputError: Bases, layouts or shapes differ.
    """
    first, *others = adapters
    name = str(first.config.get("base_model_name_or_path"))
    for other in others:
        another = str(other.config.get("base_model_name_or_path"))
        if base is None and another != name and not _same_files(Path(name), Path(another)):
            raise InputError(f"is for {another}, but {first.path} for {name}; name the base if they are one",
                             other.path / CONFIG, field="base_model_name_or_path")  # fmt: skip
        if bool(other.config.get("fan_in_fan_out")) != bool(first.config.get("fan_in_fan_out")):
            raise InputError(f"is not as in {first.path}", other.path / CONFIG, field="fan_in_fan_out")
    shapes: dict[str, tuple[Any, ...]] = {}
    for adapter in adapters:
        for module, layout in adapter.layouts.items():
            update = adapter.updates[module]
            shape = (len(update.b), *layout.a_shape)
            if shapes.setdefault(module, shape) != shape:
                raise InputError(
                    f"module '{module}' is {shape}, but {shapes[module]} in another", adapter.path / ADAPTER
                )
    return name if base is None else base


def _values(tensor: FileTensor) -> Tensor:
    return tensor.part(0, math.prod(tensor.shape)).to(torch.float64).reshape(tensor.shape)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _same_files(one: Path, two: Path) -> bool:
    """Whether two bases are folders with the same weights, byte for byte, and the same configuration."""
    files = [file for folder in (one, two) if folder.is_dir() for file in folder.glob("*.safetensors")]
    names = {file.name for file in files} | {"config.json"}
    return bool(files) and all(
        (one / name).is_file() and (two / name).is_file() and filecmp.cmp(one / name, two / name, shallow=False)
        for name in names
    )
