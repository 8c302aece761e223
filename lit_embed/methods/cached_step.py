"""A training step of contrastive methods by GradCache."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_core.module import Method
from lit_core.sharding import average_gradients
from lit_embed.modules.gradcache import cached_backward


def cached_step(module: Method, batch: Any, loss_of: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """One optimizer step by GradCache; under DDP the gradients are averaged once, after the last chunk.

    Args:
        module: Its ``encoder`` is trained, by manual optimisation.
        batch: Its ``tokens`` are encoded.
        loss_of: Vectors and batch to a scalar loss.

    Returns:
        The loss, without a graph.
    """
    optimizer, scheduler = module.optimizers(), module.lr_schedulers()
    assert not isinstance(optimizer, list)
    optimizer.zero_grad()
    encoder: Any = module.encoder
    with module.no_sync():
        loss = cached_backward(encoder, batch.tokens, lambda vectors: loss_of(vectors, batch), module.manual_backward)
    average_gradients(module.parameters())
    optimizer.step()
    scheduler.step()  # type: ignore[union-attr]
    return loss
