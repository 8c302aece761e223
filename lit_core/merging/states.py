"""Merging state dicts."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging.linear import linear
from lit_core.merging.task_arithmetic import task_arithmetic

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge.

    Args:
        combine: ``(models, weights, base)`` to the merged tensor, all in one type of at least 32 bits.
        needs_base: Whether it cannot do without a base.
        averages: Whether weights are divided by their sum, which then must not be 0.
    """

    combine: Callable[[Sequence[Tensor], Sequence[float], Tensor | None], Tensor]
    needs_base: bool = False
    averages: bool = False


METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(linear, averages=True),
    "task_arithmetic": MergeMethod(task_arithmetic, needs_base=True),
}


def merge(
    models: Sequence[State], method: str, weights: Sequence[float] | None = None, base: State | None = None
) -> dict[str, Tensor]:
    """Merge state dicts of models of one architecture.

    Sums are taken in float32 (float64 where the tensors are), on the device of the first model. Integers and Booleans
    have to be equal in all models. Tensors that are tied in the base, or the first model, are merged once and tied
    again.

    Args:
        models: State dicts with the same names and shapes.
        method: Key of ``METHODS``.
        weights: One a model, 1 each by default; ``linear`` divides them by their sum.
        base: State dict that the models were trained from; ``task_arithmetic`` needs it.

    Returns:
        New tensors, of the types of the base, or of the first model where there is none.

    Raises:
        InputError: The models do not fit together; the error names the tensor. Or a wrong argument.
    """
    chosen, factors = check_arguments(len(models), method, weights, base is not None)
    like = models[0] if base is None else base
    others = {f"model {number}": model for number, model in enumerate(models)} | (
        {} if base is None else {"base": base}
    )
    for name, other in others.items():
        check_keys(like.keys(), other.keys(), name)
    first_of = _tied(like)
    for name, other in others.items():
        _check_tied(first_of, _tied(other), other, name)
    merged: dict[str, Tensor] = {}
    for key in like:
        first = first_of[key]
        if first != key:
            merged[key] = merged[first]
            continue
        merged[key] = merge_tensors(
            key, chosen, [model[key] for model in models], factors, None if base is None else base[key]
        )
    return merged


def check_arguments(
    count: int, method: str, weights: Sequence[float] | None, has_base: bool
) -> tuple[MergeMethod, list[float]]:
    """The method of a name, and a weight for each model.

    Raises:
        InputError: A name that is not known, weights that do not fit, no model, or no base.
    """
    if method not in METHODS:
        raise InputError(f"must be one of {', '.join(METHODS)}, got '{method}'", field="method")
    if count < 1:
        raise InputError("need at least one model to merge", field="models")
    chosen, factors = METHODS[method], [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(factors) != count or not all(map(math.isfinite, factors)):
        raise InputError(f"need a finite number for each of {count} models, got {factors}", field="weights")
    if chosen.averages and abs(sum(factors)) < 1e-12:
        raise InputError(f"{method} divides by the sum of the weights, which is 0: {factors}", field="weights")
    if chosen.needs_base and not has_base:
        raise InputError(f"{method} needs the base that the models were trained from", field="base")
    return chosen, factors


def check_keys(wanted: Collection[str], found: Collection[str], name: str) -> None:
    """Refuse a model that lacks a tensor or has one too many."""
    for key in wanted:
        if key not in found:
            raise InputError(f"{name} has no tensor '{key}'")
    for key in found:
        if key not in wanted:
            raise InputError(f"{name} has a tensor '{key}' that the others lack")


def merge_tensors(
    key: str, method: MergeMethod, models: Sequence[Tensor], weights: Sequence[float], base: Tensor | None
) -> Tensor:
    """Merge one tensor of all models.

    Args:
        key: Its name, for errors.
        method: How.
        models: It in each model.
        weights: One a model.
        base: It in the base.

    Raises:
        InputError: Shapes differ, or whole numbers do.
    """
    like = models[0] if base is None else base
    every = [*models, *([] if base is None else [base])]
    for tensor in every:
        if tensor.shape != like.shape:
            raise InputError(f"tensor '{key}' has the shapes {tuple(like.shape)} and {tuple(tensor.shape)}")
        if tensor.is_floating_point() != like.is_floating_point():
            raise InputError(f"tensor '{key}' has the types {like.dtype} and {tensor.dtype}")
    device = models[0].device
    if not like.is_floating_point():
        if like.is_complex():
            raise InputError(f"tensor '{key}' is complex, which cannot be merged")
        if not all(torch.equal(tensor.to(device), like.to(device)) for tensor in every):
            raise InputError(f"tensor '{key}' holds whole numbers ({like.dtype}) that are not equal in all models")
        return like.to(device, copy=True)
    wide = torch.float64 if torch.float64 in {tensor.dtype for tensor in every} else torch.float32
    tensors = [tensor.to(device, wide) for tensor in models]
    merged = method.combine(tensors, weights, None if base is None else base.to(device, wide))
    return merged.to(like.dtype)


def _tied(state: State) -> dict[str, str]:
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
