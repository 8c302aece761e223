"""GradCache: the exact gradient of a loss that couples a large batch, with the memory of one chunk."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_embed.modules.chunks import Batch, ChunkedEncoder


class _RandomState:
    """Random state before a chunk's first pass, so that its second pass draws the same dropout."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def cached_backward(
    encoder: ChunkedEncoder[Batch],
    tokens: Batch,
    loss_of: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> Tensor:
    """Accumulate the gradient of ``loss_of(encoder(tokens))`` chunk by chunk (Gao et al. 2021, section 3).

    First every chunk is encoded without a graph; then the loss and its gradient with respect to the vectors are
    formed; then each chunk is encoded again, with the same random state, and pulled back through its vectors' gradient.

    Args:
        encoder: Its length-sorted chunks are the units.
        tokens: The whole batch.
        loss_of: Vectors ``(N, D)`` to a scalar loss; may gather vectors of other ranks.
        backward: Runs a backward pass, once a chunk; lightning's ``manual_backward`` in training. It must not average
            over ranks more than once: under DDP run inside ``no_sync`` and average afterwards.

    Returns:
        The loss, without a graph.
    """
    chunks, idle = encoder.plan(tokens)
    states, parts = [], []
    with torch.no_grad():
        for rows in chunks + idle:
            states.append(_RandomState(tokens.ids.device))
            parts.append(encoder.encode_chunk(tokens, rows))
    vectors = encoder.in_order(parts[: len(chunks)], chunks).requires_grad_()
    loss = loss_of(vectors)
    (gradient,) = torch.autograd.grad(loss, vectors)
    after = _RandomState(tokens.ids.device)
    for number, (rows, state) in enumerate(zip(chunks + idle, states, strict=True)):
        state.restore()
        weight = gradient[rows] if number < len(chunks) else 0.0
        backward((encoder.encode_chunk(tokens, rows) * weight).sum())
    after.restore()
    return loss.detach()
