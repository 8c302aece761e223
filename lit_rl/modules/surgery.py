"""Gradients of several domains in one backward pass each, and the gradient that surgery makes of them.

It works on any module with several losses, on one process or several, with plain or sharded (FSDP2) parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_core.samplers import mix_seed
from lit_core.sharding import gather_objects, world_size
from lit_rl.functional.interference import conflicts, module_cosines
from lit_rl.functional.surgery import SurgeryMethod, draw_orders, fixed_orders, gradvac_weights, surgery_weights
from lit_rl.modules.granularity import Granularity, Part, Partition, partition

BLOCK = {"cpu": 1 << 16}  # numbers of a gradient that are worked on at a time: on a CPU they stay in the caches
DEVICE_BLOCK = 1 << 22


@dataclass(frozen=True)
class _Span:
    """Where a parameter stands in the buffers of its group."""

    parameter: int
    part: int
    start: int
    end: int


@dataclass
class _Group:
    """Parameters whose gradients are held in the same buffers: of one type and device, sharded in the same way."""

    dtype: torch.dtype
    device: torch.device
    sharded: bool
    meshes: tuple[Any, ...]  # process groups over which its parameters are cut
    spans: list[_Span]
    buffers: list[Tensor]  # a flat one a domain

    @property
    def size(self) -> int:
        return self.spans[-1].end


class DomainGradients:
    """A copy of the gradient for each domain, float32 at least, flat and in the order of the parts.

    Gradients of plain float32 parameters are written there by the backward pass itself; others are added, so that
    those of 16 bits are summed in float32.

    Args:
        split: The parameters and their parts.
        domains: Names of the domains, the same on all ranks.
    """

    def __init__(self, split: Partition, domains: Sequence[str]) -> None:
        if len(set(domains)) != len(domains) or not domains:
            raise ValueError(f"need different names of domains, got {list(domains)}")
        self.split, self.domains = split, tuple(domains)
        self.groups: list[_Group] = []

    @property
    def sharded(self) -> bool:
        """Whether any parameter is cut over ranks."""
        return any(hasattr(parameter, "full_tensor") for parameter in self.split.parameters)

    def check_in_step(self, order: Sequence[str]) -> None:
        """Refuse backward passes that sharded ranks would take in different orders of domains.

        FSDP averages each pass over the ranks: with a different domain on each, every rank would keep its shard of
        the mixture under its own name. The sum would still be right, so that nothing would tell.

        Args:
            order: Domain of each backward pass of this step, on this rank.

        Raises:
            ValueError: Another rank has another order.
        """
        if not self.sharded:
            return
        orders = gather_objects(list(order))
        if any(other != orders[0] for other in orders):
            raise ValueError(
                "sharded ranks must take their backward passes domain by domain in the same order, got "
                + " and ".join(map(str, orders))
            )

    @contextmanager
    def record(self, domain: str) -> Iterator[None]:
        """Backward passes inside add to the gradient of this domain; those of DDP go inside its ``no_sync``."""
        number = self.domains.index(domain)
        if not self.groups:
            self._allocate()
        direct = [group for group in self.groups if not group.sharded]
        for parameter in self.split.parameters:
            parameter.grad = None
        for group in direct:
            for span, parameter in self._members(group):
                if parameter.dtype == group.dtype:
                    parameter.grad = group.buffers[number][span.start : span.end].view(parameter.shape)
        yield
        for group in self.groups:
            for span, parameter in self._members(group):
                gradient = parameter.grad
                if gradient is not None and (group.sharded or parameter.dtype != group.dtype):
                    target = group.buffers[number][span.start : span.end]
                    target.add_(_local(gradient).reshape(-1))
                parameter.grad = None

    def average(self) -> None:
        """Mean over the ranks, one collective a domain; sharded gradients have been averaged by FSDP already."""
        if not self.groups:
            self._allocate()  # a rank without a backward pass takes part with zeros
        if world_size() == 1:
            return
        for group in self.groups:
            for buffer in () if group.sharded else group.buffers:
                dist.all_reduce(buffer)
                buffer /= world_size()

    def gram(self) -> Tensor:
        """Scalar products of the domains' gradients in each part, float64 ``(M, T, T)``, equal on all ranks."""
        domains, device = len(self.domains), self.groups[0].device
        total = torch.zeros(len(self.split.parts), domains, domains, dtype=torch.float64, device=device)
        reduced: dict[tuple[Any, ...], Tensor] = {}
        for group in self.groups:
            found = reduced.setdefault(group.meshes, torch.zeros_like(total))
            for part, start, end in _blocks(group):
                block = torch.stack([buffer[start:end] for buffer in group.buffers]).double()
                found[part].addmm_(block, block.T)
        for meshes, found in reduced.items():
            for mesh in meshes:
                dist.all_reduce(found, group=mesh)
            total += found
        return total

    def combine(self, weights: Tensor) -> None:
        """Leave ``sum_t w_t g_t`` in ``p.grad``, made in the first domain's buffer; the others are given up.

        Args:
            weights: ``(M, T)``.
        """
        rows: list[list[float]] = weights.tolist()  # one copy to the host a step
        for group in self.groups:
            first, *others = group.buffers
            for part, start, end in _blocks(group):
                own, *rest = rows[part]
                target = first[start:end]
                if own != 1:
                    target.mul_(own)
                for buffer, weight in zip(others, rest, strict=True):
                    target.add_(buffer[start:end], alpha=weight)
            for span, parameter in self._members(group):
                parameter.grad = _like(first[span.start : span.end], parameter)
        self.groups = []

    def clear(self) -> None:
        """Forget what was recorded."""
        self.groups = []

    def _members(self, group: _Group) -> Iterator[tuple[_Span, nn.Parameter]]:
        return ((span, self.split.parameters[span.parameter]) for span in group.spans)

    def _allocate(self) -> None:
        order = sorted(range(len(self.split.parameters)), key=lambda number: self.split.index[number])
        groups: dict[Any, _Group] = {}
        for number in order:
            parameter = self.split.parameters[number]
            local = _local(parameter)
            dtype = torch.float32 if local.dtype in (torch.bfloat16, torch.float16) else local.dtype
            key = (dtype, local.device, hasattr(parameter, "full_tensor"), _shard_groups(parameter))
            group = groups.setdefault(key, _Group(*key, spans=[], buffers=[]))
            start = group.size if group.spans else 0
            group.spans.append(_Span(number, self.split.index[number], start, start + local.numel()))
        for group in groups.values():
            group.buffers = [torch.zeros(group.size, dtype=group.dtype, device=group.device) for _ in self.domains]
        self.groups = list(groups.values())


@dataclass(frozen=True)
class ConflictTable:
    """What a step's gradients had to do with each other, part by part.

    Args:
        parts: Of the model.
        domains: Names.
        cosines: Between domains ``(M, T, T)``.
        conflicts: Pairs of domains whose scalar product is negative ``(M,)``.
        pairs: Pairs of domains that both have a gradient ``(M,)``.
    """

    parts: tuple[Part, ...]
    domains: tuple[str, ...]
    cosines: Tensor
    conflicts: Tensor
    pairs: Tensor


class GradientSurgery:
    """Surgery on the gradients of several losses of any module.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> surgery = GradientSurgery(model, ["first", "second"], granularity="linear")
    >>> outputs = model(torch.ones(3, 4))
    >>> surgery.backward({"first": outputs[:, 0].mean(), "second": -outputs.square().mean()})
    >>> model[0].weight.grad.shape  # the combined gradient: clip, and take an optimizer step
    torch.Size([8, 4])

    With DDP the losses come from the wrapped model and ``backward`` is called inside its ``no_sync()``; it averages
    over the ranks by itself. With FSDP2 every rank needs the same losses in the same order.

    Args:
        module: Its trainable parameters get the combined gradient.
        domains: Names of the losses, the same on all ranks.
        granularity: What surgery treats as one module.
        method: How gradients are combined.
        compat: See :func:`lit_rl.functional.surgery.surgery_weights`.
        order: In which order gradients meet: drawn anew for each part and step, or by number.
        radius: c of ``cagrad``.
        decay: beta of ``gradvac``.
        seed: Of the orders.

    Raises:
        ValueError: See :func:`lit_rl.modules.granularity.partition`.
    """

    def __init__(
        self,
        module: nn.Module,
        domains: Sequence[str],
        granularity: Granularity | Mapping[str, str] = "param",
        method: SurgeryMethod = "pcgrad",
        compat: bool = False,
        order: Literal["random", "fixed"] = "random",
        radius: float = 0.5,
        decay: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.split = partition(module, granularity)
        self.gradients = DomainGradients(self.split, domains)
        self.method, self.compat, self.order = method, compat, order
        self.radius, self.decay, self.seed = radius, decay, seed
        self.steps = 0
        self.cosines: Tensor | None = None  # running means of gradvac
        self.gram: Tensor | None = None  # of the last step (M, T, T)
        self.weights: Tensor | None = None  # of the last step (M, T)

    def backward(self, losses: Mapping[str, Tensor], last: bool = True) -> None:
        """Backward passes of the losses, which may share a graph; one that is missing has a gradient of 0.

        Args:
            losses: By domain.
            last: Combine what was recorded since the last time, into ``p.grad``; False only records, so that a step
                may have several micro-batches.

        Raises:
            ValueError: An unknown domain, or sharded ranks with different ones.
        """
        unknown = set(losses) - set(self.gradients.domains)
        if unknown:
            raise ValueError(f"unknown domain '{min(unknown)}', known are {list(self.gradients.domains)}")
        self.gradients.check_in_step(list(losses))
        for number, (domain, loss) in enumerate(losses.items()):
            with self.gradients.record(domain):
                loss.backward(retain_graph=number + 1 < len(losses))
        if last:
            self.finish(mix_seed(self.seed, self.steps))

    def finish(self, seed: int) -> None:
        """Combine what was recorded, into ``p.grad``.

        Args:
            seed: Of the orders in this step, the same on all ranks.
        """
        self.gradients.average()
        gram = self.gradients.gram()
        self.gram, self.weights = gram, self._weights(gram, seed)
        self.gradients.combine(self.weights)
        self.steps += 1

    def table(self) -> ConflictTable:
        """Conflicts of the last step."""
        if self.gram is None:
            raise ValueError("no step has been taken")
        return ConflictTable(self.split.parts, self.gradients.domains, module_cosines(self.gram), *conflicts(self.gram))

    def _weights(self, gram: Tensor, seed: int) -> Tensor:
        modules, domains = gram.shape[:2]
        orders = fixed_orders(domains) if self.order == "fixed" else draw_orders(seed, modules, domains)
        if self.method != "gradvac":
            return surgery_weights(gram, orders, self.method, self.compat, self.radius)
        found = gradvac_weights(gram, self.cosines, orders, self.decay, self.compat)
        # a step that is left out must not spoil the means of later ones
        before = torch.zeros_like(gram) if self.cosines is None else self.cosines
        self.cosines = torch.where(found.cosines.isfinite(), found.cosines, before)
        return found.weights


def _blocks(group: _Group) -> Iterator[tuple[int, int, int]]:
    """Part, start and end of pieces that fit the caches."""
    size = BLOCK.get(group.device.type, DEVICE_BLOCK)
    bounds: dict[int, list[int]] = {}
    for span in group.spans:  # those of a part follow one another
        bounds.setdefault(span.part, [span.start, span.end])[1] = span.end
    for part, (first, end) in bounds.items():
        for start in range(first, end, size):
            yield part, start, min(start + size, end)


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "full_tensor") else tensor


def _shard_groups(parameter: Tensor) -> tuple[Any, ...]:
    """Process groups over which a parameter is cut; those over which it is repeated are not among them."""
    if not hasattr(parameter, "full_tensor"):
        return ()
    sharded = cast(Any, parameter)
    mesh = sharded.device_mesh
    return tuple(mesh.get_group(number) for number, kind in enumerate(sharded.placements) if kind.is_shard())


def _like(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """A flat gradient in the form of its parameter."""
    local = flat.view(_local(parameter).shape).to(parameter.dtype)
    if not hasattr(parameter, "full_tensor"):
        return local
    from torch.distributed.tensor import DTensor

    sharded = cast(Any, parameter)
    return DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )
