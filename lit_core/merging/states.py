"""Merging state dicts."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging.chunks import CHUNK_BYTES, Entries, Stack, TensorEntries
from lit_core.merging.method import Method
from lit_core.merging.methods import method_of

State = Mapping[str, Tensor]


def merge(
    models: Sequence[State],
    method: str,
    weights: Sequence[float] | None = None,
    base: State | None = None,
    dtype: torch.dtype | str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge state dicts of models of one architecture.

    Sums are taken in float64, or over models in float32 where nothing has more than 16 bits, on the device of the first
    model. Integers and Booleans have to be equal in all models. Tensors that are tied in the base, or the first model,
    are merged once and tied again.

    Args:
        models: State dicts with the same names, shapes and types.
        method: Key of ``METHODS``.
        weights: One a model, 1 each by default.
        base: State dict that the models were trained from; it may be of other floating types. What
            methods do without one is told by their classes.
        dtype: Floating type of the result; then those of the models may differ. None takes theirs.
        chunk_bytes: Most memory beside the models and the result. The result does not depend on it, but for the last
            bits of float64 in sums over a tensor.
        **options: Fields of the method's class.

    Returns:
        New tensors.

    Raises:
        InputError: The models do not fit together; the error names the tensor. Or a wrong argument.
    """
    chosen = method_of(method, options)
    factors = chosen.check(len(models), weights, base is not None)
    wanted = floating_type(dtype)
    check_bytes("chunk_bytes", chunk_bytes)
    like = models[0] if base is None else base
    others = {f"model {number}": model for number, model in enumerate(models)} | (
        {} if base is None else {"base": base}
    )
    for name, other in others.items():
        check_keys(like.keys(), other.keys(), name)
    first_of = first_names(like)
    for name, other in others.items():
        _check_tied(first_of, first_names(other), other, name)
    merged: dict[str, Tensor] = {}
    for key in like:
        first = first_of[key]
        if first != key:
            merged[key] = merged[first]
            continue
        rows = [TensorEntries(model[key]) for model in models]
        root = None if base is None else TensorEntries(base[key])
        device = models[0][key].device
        out = torch.empty(models[0][key].shape, dtype=merged_type(key, rows, root, wanted), device=device)
        flat, start = out.view(-1), 0
        stack = Stack(key, rows, root, chunk_bytes, device, out.dtype)
        for part in merged_parts(stack, chosen, factors):
            flat[start : start + len(part)].copy_(part)
            start += len(part)
        merged[key] = out
    return merged


def floating_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type from itself or its name.

    Raises:
        InputError: It is no floating type.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"must be a floating type such as float32 or bfloat16, got '{dtype}'", field="dtype")
    return found


def check_bytes(name: str, count: int) -> None:
    """Refuse chunks or files of nothing.

    Raises:
        InputError: Fewer than one byte.
    """
    if count < 1:
        raise InputError(f"must be at least 1, got {count}", field=name)


def check_keys(wanted: Collection[str], found: Collection[str], name: str) -> None:
    """Refuse a model that lacks a tensor or has one too many.

    Raises:
        InputError: So it is.
    """
    for key in wanted:
        if key not in found:
            raise InputError(f"{name} has no tensor '{key}'")
    for key in found:
        if key not in wanted:
            raise InputError(f"{name} has a tensor '{key}' that the others lack")


def merged_type(
    key: str, models: Sequence[Entries], base: Entries | None, wanted: torch.dtype | None = None
) -> torch.dtype:
    """The type of a merged tensor.

    Args:
        key: Its name, for errors.
        models: It in each model.
        base: It in the base.
        wanted: Type that floating tensors shall have.

    Raises:
        InputError: Shapes differ, or types do.
    """
    like = models[0]
    for other in [*models, *([] if base is None else [base])]:
        if other.shape != like.shape:
            raise InputError(f"tensor '{key}' has the shapes {like.shape} and {other.shape}")
        floats = other.dtype.is_floating_point and like.dtype.is_floating_point
        if other.dtype != like.dtype and not (floats and (wanted is not None or other is base)):
            advice = "; name the dtype of the result" if floats else ""
            raise InputError(f"tensor '{key}' has the types {like.dtype} and {other.dtype}{advice}")
        if other.dtype.is_complex:
            raise InputError(f"tensor '{key}' is complex, which cannot be merged")
    return wanted if wanted is not None and like.dtype.is_floating_point else like.dtype


def merged_parts(stack: Stack, method: Method, weights: Sequence[float]) -> Iterator[Tensor]:
    """Merge one tensor.

    Args:
        stack: It in all models.
        method: How.
        weights: One a model.

    Returns:
        Its entries, a chunk after the other; each lasts until the next.

    Raises:
        InputError: Whole numbers differ, or a value is not finite.
    """
    first, *others = stack.models
    if first.dtype.is_floating_point:
        if stack.numel:
            yield from method.merge(stack, weights)
        return
    for start, stop in stack.spans():
        part = first.part(start, stop)
        for other in [*others, *([] if stack.base is None else [stack.base])]:
            if not torch.equal(other.part(start, stop).to(part.device), part):
                raise InputError(
                    f"tensor '{stack.name}' holds whole numbers ({first.dtype}) that are not equal in all models"
                )
        yield part


def first_names(state: State) -> dict[str, str]:
    """For each name the first one that shares its memory."""
    seen: dict[tuple[object, ...], str] = {}
    first_of = {}
    for key, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first_of[key] = seen.setdefault(place, key) if tensor.numel() and tensor.device.type != "meta" else key
    return first_of


def _check_tied(like: Mapping[str, str], other: Mapping[str, str], state: State, name: str) -> None:
    """Refuse a model in which tensors differ that are one in another, or the other way round."""
    for key, first in like.items():
        if first != key and other[key] != other[first] and not torch.equal(state[key], state[first]):
            raise InputError(f"tensor '{key}' is tied to '{first}', but not in {name}")
        if first == key and other[key] != key:
            raise InputError(f"tensor '{key}' is tied to '{other[key]}' in {name}, but not in the others")
