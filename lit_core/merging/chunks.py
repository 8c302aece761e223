"""One tensor of several models, read side by side a chunk of entries at a time."""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lit_core.errors import InputError

CHUNK_BYTES = 2**26
COPIES = 8  # of a chunk in float64: what was read, and what a method makes of it


class Entries(Protocol):
    """A tensor that can be read in parts."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""

    def part(self, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` in row-major order; they last until the next call."""


class TensorEntries:
    """A tensor in memory.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.flat = tensor.detach().reshape(-1)

    def part(self, start: int, stop: int) -> Tensor:
        """A view."""
        return self.flat[start:stop]


class Stack:
    """One floating tensor of all models, in memory that does not grow with the models.

    Args:
        name: Name of the tensor.
        models: It in each model, in one shape.
        base: It in the base.
        chunk_bytes: Most memory for chunks of all models together, and for what methods make of them.
        device: Where to compute; one that has no float64 is replaced by the CPU.
        result: Type of the result, where it is not that of the models.

    Attributes:
        work: Type for sums over models: float64, or float32 where nothing has more than 16 bits, since the rounding
            of the result is then 2^12 times as coarse. Sums over a tensor are float64 always.
        notes: What a method has to say about this tensor, such as a fallback.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[Entries],
        base: Entries | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        device: torch.device | str = "cpu",
        result: torch.dtype | None = None,
    ) -> None:
        self.name, self.models, self.base = name, models, base
        self.numel = math.prod(models[0].shape)
        types = {tensor.dtype for tensor in (*models, *([] if base is None else [base]))}
        self.double = torch.float64 in {model.dtype for model in models}
        sizes = [dtype.itemsize for dtype in types | (set() if result is None else {result})]
        self.work = torch.float64 if max(sizes) > 2 else torch.float32
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        rows = len(models) + (base is not None)
        self.step = max(1, min(self.numel, chunk_bytes // (8 * COPIES * rows)))
        self.notes: list[str] = []

    def spans(self) -> Iterator[tuple[int, int]]:
        """Bounds of the chunks, in order."""
        for start in range(0, self.numel, self.step):
            yield start, min(start + self.step, self.numel)

    def values(self) -> Iterator[Tensor]:
        """Chunks ``(models, n)`` of the models, float64; each lasts until the next."""
        held = self._empty(len(self.models), torch.float64)
        for start, stop in self.spans():
            chunk = held[:, : stop - start]
            for row, model in zip(chunk, self.models, strict=True):
                row.copy_(model.part(start, stop))
            yield chunk

    def deltas(self, which: slice = slice(None), dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks ``(n,)`` of the base and ``(models, n)`` of differences from it; each lasts until the next.

        Args:
            which: Models to read.
            dtype: Type of the chunks.

        Raises:
            InputError: A value is not finite.
        """
        assert self.base is not None  # the caller asks for one
        models = self.models[which]
        held = self._empty(len(models) + 1, dtype)
        for start, stop in self.spans():
            chunk = held[:, : stop - start]
            base, deltas = chunk[0], chunk[1:]
            base.copy_(self.base.part(start, stop))
            for row, model in zip(deltas, models, strict=True):
                row.copy_(model.part(start, stop)).sub_(base)
            self._check_finite(deltas)
            yield base, deltas

    def gram(self, of_deltas: bool) -> Tensor:
        """Dot products ``(models, models)`` of the models, or of their differences from the base, float64.

        Raises:
            InputError: A value is not finite.
        """
        gram = torch.zeros(len(self.models), len(self.models), dtype=torch.float64, device=self.device)
        for chunk in (deltas for _, deltas in self.deltas()) if of_deltas else self.values():
            gram.addmm_(chunk, chunk.T)
        self._check_finite(gram)
        return gram.cpu()

    def combine(self, coefficients: Sequence[float], of_deltas: bool) -> Iterator[Tensor]:
        """Chunks ``(n,)`` of ``sum_i c_i model_i``, or of ``base + sum_i c_i (model_i - base)``.

        Raises:
            InputError: A value is not finite.
        """
        factors, sources = list(coefficients), list(self.models)
        if of_deltas:
            assert self.base is not None  # the caller asks for one
            factors, sources = [1 - sum(coefficients), *factors], [self.base, *sources]
        total, row = self._empty(2, self.work)
        for start, stop in self.spans():
            merged, read = total[: stop - start], row[: stop - start]
            merged.copy_(sources[0].part(start, stop)).mul_(factors[0])
            for factor, source in zip(factors[1:], sources[1:], strict=True):
                merged.add_(read.copy_(source.part(start, stop)), alpha=factor)
            self._check_finite(merged)  # what is not finite in a model is not finite here
            yield merged

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, self.step, dtype=dtype, device=self.device)

    def _check_finite(self, values: Tensor) -> None:
        # a sum is quick; it may leave float32 where no value does
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise InputError(f"tensor '{self.name}' has values that are not finite")
