"""Merging LoRA adapters as peft writes them, without the base: sums of updates ``s B A``, exact or of a lower rank."""

import filecmp
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.export import new_folder
from lit_core.files import write_json
from lit_core.merging.adapter_folder import ADAPTER, CONFIG, Adapter, Factors, check_adapters
from lit_core.merging.method import Combination
from lit_core.merging.methods import method_of
from lit_core.merging.model_folder import MANIFEST, WEIGHTS, copy_rest, module_folders
from lit_core.merging.spherical import Spherical
from lit_core.merging.tensor_file import TensorSpec, write_tensors
from lit_core.report import versions


def gram_of_updates(updates: Sequence[Factors | None]) -> Tensor:
    """Dot products of updates, ``<B_i A_i, B_j A_j> = tr((B_i' B_j)(A_j A_i'))``, without forming one.

    Args:
        updates: Factors, those of ``B`` with the scale; None stands for zero.

    Returns:
        ``(updates, updates)``, float64.
    """
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for row, one in enumerate(updates):
        for column, two in enumerate(updates[: row + 1]):
            if one is not None and two is not None:
                gram[row, column] = gram[column, row] = ((one.b.T @ two.b) * (one.a @ two.a.T)).sum()
    return gram


def stacked(updates: Sequence[Factors | None], coefficients: Sequence[float]) -> Factors:
    """``sum_i c_i B_i A_i`` as one product, whose rank is the sum of ranks; exact."""
    kept = [(one, c) for one, c in zip(updates, coefficients, strict=True) if one is not None]
    return Factors(torch.cat([one.a for one, _ in kept]), torch.cat([c * one.b for one, c in kept], dim=1))


def truncated(update: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest product of a rank, by QR of both factors and a singular value decomposition of the small core.

    Args:
        update: Factors of rank ``R``.
        rank: The rank wanted.

    Returns:
        Factors, and the distance (Frobenius norm), the root of the sum of the squared singular values left away.
    """
    outer_b, core_b = torch.linalg.qr(update.b)
    outer_a, core_a = torch.linalg.qr(update.a.T)
    left, values, right = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    roots = values[:rank].sqrt()
    found = Factors((right[:rank] * roots[:, None]) @ outer_a.T, outer_b @ left[:, :rank] * roots)
    return found, float(values[rank:].square().sum().sqrt())


def merge_adapters(
    folders: Sequence[Path | str],
    output: Path | str,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge LoRA adapters of one base into one that peft loads.

    Folded into the base it is the merge of the models with the adapters folded in, in differences from the base:
    ``W + sum_i c_i s_i B_i A_i`` with ``s = alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised adapters. Ranks,
    scales and modules may differ; a module that an adapter has not is one that it does not change. Factors are
    computed in float64 and written in float32, with scale 1. ``merge.json`` says how it was made.

    Args:
        folders: Adapters.
        output: Folder to write.
        method: Key of ``METHODS``, one whose result is a linear combination of differences: all but TIES, DARE, SCE.
        weights: One an adapter, 1 each by default.
        rank: Rank of the result; each update then is the nearest of that rank. None takes the sum of ranks, which is
            exact.
        base: Name of the base to write, where adapters name it differently and their bases are not files to compare.
        **options: Fields of the method's class.

    Returns:
        The content of ``merge.json``, with the distance of each truncated update from the exact one.

    Raises:
        InputError: A folder is no adapter or of a kind whose update is no such product, adapters do not fit together,
            a wrong argument, or there is something at ``output``.
    """
    chosen = method_of(method, options)
    factors = chosen.check(len(folders), weights, True)
    combine = _coefficients(chosen)
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise InputError(f"must be a whole number above 0, got {rank!r}", field="rank")
    adapters = [Adapter(Path(folder)) for folder in folders]
    name = check_adapters(adapters, base)
    names = list(dict.fromkeys(module for adapter in adapters for module in adapter.updates))
    merged: dict[str, Factors] = {}
    notes: dict[str, list[str]] = {}
    distances: dict[str, float] = {}
    for module in names:
        updates, told = [adapter.updates.get(module) for adapter in adapters], list[str]()
        try:
            coefficients = combine(gram_of_updates(updates), factors, told.append)
        except InputError as error:
            raise InputError(f"module '{module}': {error.message}", field=error.field) from None
        update = stacked(updates, coefficients)
        if rank is not None and len(update.a) > rank:
            update, distances[module] = truncated(update, rank)
        merged[module] = update
        if told:
            notes[module] = told
    most = max(len(update.a) for update in merged.values())
    manifest = {
        "method": method,
        "weights": factors if chosen.weighted else None,
        "options": asdict(chosen),
        "rank": most,
        "truncation": distances,
        "base": name,
        "models": [adapter.describe() for adapter in adapters],
        "notes": notes,
        "versions": versions(),
    }
    first = adapters[0]
    with new_folder(Path(output)) as folder:
        copy_rest(first.path, folder)
        _copy_modules(adapters, folder)
        tensors = dict(_tensors(adapters, merged, most))
        specs = [TensorSpec(key, tuple(tensor.shape), torch.float32) for key, tensor in tensors.items()]
        write_tensors(folder / ADAPTER, specs, lambda spec: [tensors[spec.name].reshape(-1)])
        write_json(folder / CONFIG, first.merged_config(adapters, names, most, name))
        write_json(folder / MANIFEST, manifest)
    return manifest


def _coefficients(method: Any) -> Callable[[Tensor, Sequence[float], Callable[[str], None]], list[float]]:
    """The coefficients of a method in differences from the base."""
    if not isinstance(method, Combination):
        raise InputError(f"{method.name} is no sum of updates; export the models with --form merged and merge these",
                         field="method")  # fmt: skip
    if isinstance(method, Spherical) and method.space == "weight":
        raise InputError("adapters are differences; 'weight' needs their base", field="space")
    if method.name == "linear" and not method.averages:
        raise InputError("would scale the base too; take task_arithmetic", field="normalize")
    return method.coefficients


def _tensors(adapters: Sequence[Adapter], merged: dict[str, Factors], rank: int) -> Iterator[tuple[str, Tensor]]:
    """Factors under peft's names and in its shapes, filled up with zeros to one rank."""
    for module, update in merged.items():
        layout = next(adapter.layouts[module] for adapter in adapters if module in adapter.layouts)
        a = torch.zeros(rank, update.a.shape[1], dtype=torch.float64)
        b = torch.zeros(update.b.shape[0], rank, dtype=torch.float64)
        a[: len(update.a)], b[:, : len(update.a)] = update.a, update.b
        yield layout.a, a.reshape(rank, *layout.a_shape)
        yield layout.b, b.reshape(b.shape[0], rank, *layout.b_shape)


def _copy_modules(adapters: Sequence[Adapter], folder: Path) -> None:
    """Copy weights in folders of modules, which adapters have in common or cannot be merged."""
    first, *others = adapters
    for part in module_folders(first.path):
        source = first.path / part / WEIGHTS
        if not part or not source.is_file():
            continue
        for other in others:
            twin = other.path / part / WEIGHTS
            if not twin.is_file() or not filecmp.cmp(source, twin, shallow=False):
                raise InputError(f"is not {source}; modules with weights of their own are not merged", twin)
        shutil.copyfile(source, folder / part / WEIGHTS)
