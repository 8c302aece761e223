"""Everything that couples ranks: sharding a model, gathering rows with gradients, averaging gradients.

Every function is the identity in a single process, so that callers never ask how many ranks there are.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_core.errors import InputError


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def shard(module: nn.Module, mesh: Any, blocks: Iterable[nn.Module] = ()) -> None:
    """Shard a module's parameters over the data-parallel ranks (FSDP2), one unit a block, the rest with the root.

    Args:
        module: The module whose ``forward`` is the unit of work; it gathers what no block holds.
        mesh: Device mesh of lightning's ``ModelParallelStrategy``.
        blocks: Its repeated layers.

    Raises:
        InputError: The mesh asks for tensor parallelism, which these models do not have.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise InputError(
            "tensor parallelism is not available: set the strategy's data_parallel_size to the number of devices and "
            "tensor_parallel_size to 1"
        )
    data = mesh["data_parallel"]
    frozen = next((p.dtype for p in module.parameters() if not p.requires_grad), None)
    for parameter in module.parameters():
        if parameter.requires_grad and frozen is not None and parameter.dtype != frozen:
            parameter.data = parameter.data.to(frozen)  # a unit has one type, so adapters take their backbone's
    for block in blocks:
        fully_shard(block, mesh=data)
    fully_shard(module, mesh=data)


def tie_head(model: Any) -> None:
    """Tie the head of a causal language model, whose inner model was sharded, to the embeddings again.

    Sharding replaces the embedding's parameter; a tied head would keep the old, unsharded one. An untied head stays
    whole on every rank (:func:`average_gradients` keeps it equal).
    """
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """Whole weights on every rank inside the block, for work that does not go through ``forward`` (FSDP2's hooks).

    Each rank may then do as many forward passes as it likes; the memory is that of the whole model.
    """
    from torch.distributed.fsdp import FSDPModule

    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded parameter as a plain tensor on every rank; its gradient is averaged over the ranks, as FSDP does."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)  # for the type checker; hasattr has decided
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order, with gradients: the backward pass sums what every rank asks of a row.

    The ranks may hold different numbers of rows. Losses that are averaged over ranks afterwards (DDP, FSDP) get the
    exact gradient of the mean loss.

    Args:
        rows: ``(n, ...)`` on this rank.

    Returns:
        ``(sum of n over ranks, ...)``; this rank's rows start at :func:`row_offset`.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows, row_counts(len(rows), rows.device))  # type: ignore[no-untyped-call]


def row_counts(count: int, device: torch.device | None = None) -> list[int]:
    """``count`` of every rank."""
    if world_size() == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(number) for number in counts]


def row_offset(count: int, device: torch.device | None = None) -> int:
    """Rows on the ranks before this one."""
    return sum(row_counts(count, device)[: rank()])


def share_of_mean(count: int, device: torch.device | None = None) -> float:
    """What to multiply a mean over ``count`` terms by, so that its average over ranks is the mean over all terms."""
    counts = row_counts(count, device)
    return len(counts) * count / sum(counts)


def summed(tensor: Tensor) -> Tensor:
    """Sum of a tensor over the ranks; no gradient flows."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """A picklable value of every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def maximum(value: int, device: torch.device | None = None) -> int:
    """Largest ``value`` over the ranks."""
    return max(row_counts(value, device))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, for steps that ran their backward passes without DDP's hooks.

    Parameters without a gradient on this rank take part with zeros, so that ranks may differ. Sharded parameters are
    left alone: FSDP has reduced them already.
    """
    if world_size() == 1:
        return
    plain = [p for p in parameters if p.requires_grad and not hasattr(p, "full_tensor")]
    for parameter in plain:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in plain:
        assert parameter.grad is not None
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():  # one collective a dtype
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= world_size()
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded)
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = sum(ctx.counts[: rank()])
        return gradient[start : start + ctx.counts[rank()]], None
