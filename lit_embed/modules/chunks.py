"""Encoders that run over length-sorted chunks of a batch, which GradCache and bounded memory rest on."""

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lit_core.tokens import plan_chunks, plan_equal_chunks

CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 32768


class Ragged(Protocol):
    """A batch of sequences of unequal lengths."""

    ids: Tensor
    lengths: list[int]


Batch = TypeVar("Batch", bound=Ragged)


class ChunkedEncoder(nn.Module, Generic[Batch]):
    """Base of encoders; a subclass says how a chunk is encoded, and its ``config`` has ``chunk_tokens``."""

    config: Any
    equal_chunks = False  # sharded models: every rank must run the same number of forward passes

    def encode_chunk(self, tokens: Batch, rows: Sequence[int]) -> Tensor:
        """Vectors of some of the rows in one padded forward pass."""
        raise NotImplementedError

    def forward(self, tokens: Batch) -> Tensor:
        """Vectors ``(N, D)``, float32, in the order of the rows; the backbone runs over length-sorted chunks."""
        chunks, idle = self.plan(tokens)
        vectors = self.in_order([self.encode_chunk(tokens, rows) for rows in chunks], chunks)
        for rows in idle:
            vectors = vectors + self.encode_chunk(tokens, rows).sum() * 0
        return vectors

    def plan(self, tokens: Batch) -> tuple[list[list[int]], list[list[int]]]:
        """Rows of each forward pass, and idle passes of weight zero, which sharded models alone have."""
        budget = self.config.chunk_tokens or (CPU_CHUNK_TOKENS if tokens.ids.device.type == "cpu" else GPU_CHUNK_TOKENS)
        if self.equal_chunks:
            return plan_equal_chunks(tokens.lengths, budget, tokens.ids.device)
        return plan_chunks(tokens.lengths, budget), []

    @staticmethod
    def in_order(parts: list[Tensor], chunks: list[list[int]]) -> Tensor:
        """The chunks' vectors in the order of the rows."""
        stacked = torch.cat(parts)
        order = torch.tensor([row for rows in chunks for row in rows], device=stacked.device)
        return torch.empty_like(stacked).index_copy(0, order, stacked)
