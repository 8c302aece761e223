"""Combined gradients of a small model on two processes, as a program that `torchrun` starts."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_rl.modules.surgery import GradientSurgery

DOMAINS = ("chat", "if", "math")
PULL = (3.0, -3.0, 1.0)  # where each domain draws the outputs
ROWS = 12  # of which rank 0 has the first six


class Net(nn.Module):
    """Two layers, a head that is tied or stays whole on every rank, and sizes that two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs).tanh()
        return self.head(inputs)


def rows() -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=generator), torch.randn(ROWS, 3, generator=generator)


UNEVEN = [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 0, 1]  # rank 0 has five of chat and one of if, rank 1 some of each
SYNCHRONOUS = [0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 2]


def losses(model: nn.Module, domains: Sequence[int], own: range) -> dict[str, Tensor]:
    """Each domain's share of the mean over all rows, of the rows of this rank; a loss of 0 where there is none."""
    inputs, targets = rows()
    found = {}
    for number, name in enumerate(DOMAINS):
        mine = [row for row in own if domains[row] == number]
        if mine:
            found[name] = (model(inputs[mine]) - targets[mine] - PULL[number]).square().sum() / ROWS
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name.removeprefix("module.")] = whole.clone()
    return found


def run(kind: str, granularity: Any, domains: Sequence[int], method: Any = "pcgrad") -> dict[str, Any]:
    """Two steps; the combined gradient and the Gram matrices of the second."""
    model: nn.Module = Net()
    inner, rank, ranks = model, 0, 1
    sync: AbstractContextManager[Any] = nullcontext()
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks > 1 and kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
        sync = model.no_sync()
    elif ranks > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        if kind == "hybrid":  # rows of ranks are repeated over the first dimension, weights cut over the second
            mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        for layer in inner.layers if isinstance(inner, Net) else ():
            fully_shard(layer, mesh=mesh)
        if kind != "fsdp, plain head":
            fully_shard(model, mesh=mesh)
    own = range(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    with torch.no_grad():
        losses(model, domains, own)  # as log-probabilities are taken before a step; a sharded root stays whole then
    surgery = GradientSurgery(inner, DOMAINS, granularity, method, seed=3)
    with sync:
        for _ in range(2):
            shares = {name: ranks * loss for name, loss in losses(model, domains, own).items()}  # the mean is taken
            surgery.backward(shares)
    assert surgery.gram is not None
    assert surgery.weights is not None
    return {"gradients": gradients(inner), "gram": surgery.gram, "weights": surgery.weights}


def refused() -> str:
    """What is said where rank 0 takes chat first and rank 1 math."""
    domains = [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    try:
        run("fsdp", "param", domains)
    except ValueError as error:
        return str(error)
    return ""


CASES: dict[str, tuple[str, str, Sequence[int], str]] = {
    "ddp param": ("ddp", "param", UNEVEN, "pcgrad"),
    "ddp global": ("ddp", "global", UNEVEN, "pcgrad"),
    "ddp gradvac": ("ddp", "linear", UNEVEN, "gradvac"),
    "fsdp param": ("fsdp", "param", SYNCHRONOUS, "pcgrad"),
    "fsdp linear": ("fsdp", "linear", SYNCHRONOUS, "pcgrad"),
    "fsdp global": ("fsdp", "global", SYNCHRONOUS, "pcgrad"),
    "fsdp mgda": ("fsdp", "layer", SYNCHRONOUS, "mgda"),
    "fsdp, plain head": ("fsdp, plain head", "global", SYNCHRONOUS, "pcgrad"),
    "hybrid": ("hybrid", "linear", SYNCHRONOUS, "pcgrad"),
}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {name: run(*case) for name, case in CASES.items()}
    found["refused"] = refused()
    if dist.get_rank() == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
