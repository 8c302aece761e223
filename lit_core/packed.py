"""Linear layers in oneDNN's own layout, for inference on a CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MOST_BYTES = 1 << 30  # of weights that are copied


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Lay out the weights of a model's linear layers once, for all calls inside the block.

    PyTorch's float32 product reorders the weights at every call, and on AMD processors takes a slower kernel; oneDNN's
    gives the same to rounding (1e-6). Only plain float32 layers on a CPU are touched, and only where a second copy of
    their weights stays below 1 GiB. Gradients cannot flow, and the weights must not change inside the block.

    Args:
        model: Anything with linear layers, adapters included.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _plain(module.weight)]
    size = sum(layer.weight.numel() * 4 for layer in layers)
    with ExitStack() as stack:
        if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu") and size <= MOST_BYTES:
            for layer in layers:
                layer.forward = _packed_forward(layer)  # type: ignore[method-assign]
                stack.callback(layer.__dict__.pop, "forward")
        yield


def _plain(weight: Any) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not isinstance(weight, DTensor)


def _packed_forward(layer: nn.Linear) -> Any:
    ops = torch.ops.mkldnn
    weight = ops._reorder_linear_weight(layer.weight.detach(), None)
    bias = None if layer.bias is None else layer.bias.detach()

    def forward(states: Tensor) -> Tensor:
        return ops._linear_pointwise(states, weight, bias, "none", [], "")

    return forward
