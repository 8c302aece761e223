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
from torch.distributed.fsdp import FSDPModule

from lit_core.samplers import mix_seed
from lit_core.sharding import gather_objects, world_size
from lit_rl.functional.interference import conflicts, module_cosines
from lit_rl.functional.surgery import SurgeryMethod, draw_orders, fixed_orders, gradvac_weights, surgery_weights
from lit_rl.modules.granularity import Granularity, Part, Partition, partition

BLOCK = 1 << 17  # numbers of a gradient that are worked on at a time: on a CPU they stay in the caches
DEVICE_BLOCK = 1 << 22
BUCKET = 1 << 24  # numbers that are averaged over ranks at a time
WIDE = (torch.float32, torch.float64)


class DomainGradients:
    """The gradient of each domain, float32 at least.

    What the backward pass makes of plain parameters of 32 bits is kept as it is, and later passes add to it; other
    gradients are added up in float32.

    Args:
        split: The parameters and their parts.
        domains: Names of the domains, the same on all ranks.
    """

    def __init__(self, split: Partition, domains: Sequence[str]) -> None:
        if len(set(domains)) != len(domains) or not domains:
            raise ValueError(f"need different names of domains, got {list(domains)}")
        self.split, self.domains = split, tuple(domains)
        self.kept: list[list[Tensor | None]] = []  # of each domain by parameter, this rank's part; None is 0
        self.clear()

    @property
    def sharded(self) -> bool:
        """Whether any parameter is cut over ranks."""
        return any(map(_is_sharded, self.split.parameters))

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
        kept = self.kept[self.domains.index(domain)]
        direct = [parameter.dtype in WIDE and not _is_sharded(parameter) for parameter in self.split.parameters]
        for place, parameter in enumerate(self.split.parameters):
            parameter.grad = kept[place] if direct[place] else None
        try:
            yield
        except BaseException:
            self.split.drop_gradients()
            raise
        for place, parameter in enumerate(self.split.parameters):
            gradient, before = parameter.grad, kept[place]
            parameter.grad = None
            if gradient is None:
                continue
            if direct[place]:
                kept[place] = gradient
                continue
            found = _local(gradient)
            found = found if found.dtype in WIDE else found.float()
            kept[place] = found if before is None else before.add_(found)

    def average(self) -> None:
        """Mean over the ranks; a rank without a gradient takes part with zeros. FSDP has averaged by itself."""
        if world_size() == 1:
            return
        plain = [place for place, parameter in enumerate(self.split.parameters) if not _is_sharded(parameter)]
        for kept in self.kept:
            for places in _buckets(plain, self.split.parameters):
                parts = [self._or_zeros(kept, place) for place in places]
                flat = torch.cat([_flat(part) for part in parts])
                dist.all_reduce(flat)
                flat /= world_size()
                for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                    _flat(part).copy_(mean)

    def gram(self) -> Tensor:
        """Scalar products of the domains' gradients in each part, float64 ``(M, T, T)``, equal on all ranks.

        Blocks are multiplied in the gradients' own type, without TF32, and added up in float64.
        """
        domains = len(self.domains)
        device = _local(self.split.parameters[0]).device
        pairs = [(one, other) for one in range(domains) for other in range(one + 1)]
        found: dict[tuple[Any, ...], list[tuple[int, int, int, Tensor]]] = {}  # by the groups that cut the parameter
        for place, parameter in enumerate(self.split.parameters):
            rows = [None if kept[place] is None else _flat(cast(Tensor, kept[place])) for kept in self.kept]
            products = found.setdefault(_shard_groups(parameter), [])
            for start, end in _blocks(_local(parameter)):
                cut = [None if row is None else row[start:end] for row in rows]
                for one, other in pairs:
                    left, right = cut[one], cut[other]
                    if left is not None and right is not None:
                        products.append((self.split.index[place], one, other, torch.dot(left, right)))
        total = torch.zeros(len(self.split.parts), domains, domains, dtype=torch.float64, device=device)
        for groups, products in found.items():
            lower = torch.zeros_like(total)
            if products:
                *places, values = zip(*products, strict=True)
                index = [torch.tensor(place, device=device) for place in places]
                lower.index_put_(tuple(index), torch.stack([v.to(device) for v in values]).double(), accumulate=True)
            for group in groups:
                dist.all_reduce(lower, group=group)
            total += lower
        return total + total.tril(-1).mT

    def combine(self, weights: Tensor) -> None:
        """Leave ``sum_t w_t g_t`` in ``p.grad``, made in the first gradient that is there; the others are given up.

        Args:
            weights: ``(M, T)``.
        """
        rows: list[list[float]] = weights.tolist()  # one copy to the host a step
        for place, parameter in enumerate(self.split.parameters):
            factors = rows[self.split.index[place]]
            present = [(kept[place], factor) for kept, factor in zip(self.kept, factors, strict=True)]
            terms = [(gradient, factor) for gradient, factor in present if gradient is not None]
            if not terms:
                parameter.grad = None
                continue
            (first, own), *others = [(_flat(gradient), factor) for gradient, factor in terms]
            for start, end in _blocks(_local(parameter)):
                target = first[start:end]
                if own != 1:
                    target.mul_(own)
                for gradient, factor in others:
                    target.add_(gradient[start:end], alpha=factor)
            parameter.grad = _like(terms[0][0], parameter)
            for kept in self.kept:
                kept[place] = None

    def clear(self) -> None:
        """Forget what was recorded."""
        self.kept = [[None] * len(self.split.parameters) for _ in self.domains]

    def _or_zeros(self, kept: list[Tensor | None], place: int) -> Tensor:
        """A gradient that is written to where it is missing."""
        found = kept[place]
        if found is None:
            parameter = self.split.parameters[place]
            found = torch.zeros_like(parameter, dtype=parameter.dtype if parameter.dtype in WIDE else torch.float32)
            kept[place] = found
        return found


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

    With DDP the losses come from the wrapped model, and both they and ``backward`` are called inside its ``no_sync()``;
    it averages over the ranks by itself. With FSDP2 every rank needs the same losses in the same order.

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
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # a root that has just run shows whole parameters, which get no gradient
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


def _blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Start and end of pieces that fit the caches."""
    size = BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK
    return ((start, min(start + size, tensor.numel())) for start in range(0, tensor.numel(), size))


def _buckets(places: Sequence[int], parameters: Sequence[nn.Parameter]) -> Iterator[list[int]]:
    """Places of parameters whose gradients are averaged together: of one type and device, and not too many."""
    bucket, size = list[int](), 0
    for place in places:
        parameter = parameters[place]
        if bucket:
            first = parameters[bucket[0]]
            alike = (parameter.dtype, parameter.device) == (first.dtype, first.device)
            if not alike or size + parameter.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
        bucket.append(place)
        size += parameter.numel()
    if bucket:
        yield bucket


def _flat(tensor: Tensor) -> Tensor:
    """A gradient as one row, in the order of its memory; gradients of a parameter are laid out as it is."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return cast(Any, tensor).to_local() if _is_sharded(tensor) else tensor


def _shard_groups(parameter: Tensor) -> tuple[Any, ...]:
    """Process groups over which a parameter is cut; those over which it is repeated are not among them."""
    if not _is_sharded(parameter):
        return ()
    sharded = cast(Any, parameter)
    mesh = sharded.device_mesh
    return tuple(mesh.get_group(number) for number, kind in enumerate(sharded.placements) if kind.is_shard())


def _like(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
    """A gradient in the type of its parameter, and sharded as it is."""
    local = gradient.to(parameter.dtype)
    if not _is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    sharded = cast(Any, parameter)
    return DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )
