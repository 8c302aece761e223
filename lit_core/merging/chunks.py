"""One tensor of several models, read side by side a chunk of entries at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from lit_core.errors import InputError

CHUNK_BYTES = 2**25
COPIES = 8  # of a chunk in float64: the one read ahead, and what a method makes of it


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
        ahead: Read the next chunk in a thread while one is worked on.

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
        ahead: bool = False,
    ) -> None:
        self.name, self.models, self.base, self.ahead = name, models, base, ahead
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

    def values(self, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
        """Chunks ``(models, n)`` of the models; each lasts until the next."""

        def fill(chunk: Tensor, start: int, stop: int) -> None:
            for row, model in zip(chunk, self.models, strict=True):
                row.copy_(model.part(start, stop))

        yield from self._filled(len(self.models), dtype, fill)

    def deltas(self, which: slice = slice(None), dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks ``(n,)`` of the base and ``(models, n)`` of differences from it; each lasts until the next.

        Args:
            which: Models to read.
            dtype: Type of the chunks.

        Raises:
            InputError: A value is not finite.
        """
        assert self.base is not None  # the caller asks for one
        root, models = self.base, self.models[which]

        def fill(chunk: Tensor, start: int, stop: int) -> None:
            base = chunk[0].copy_(root.part(start, stop))
            for row, model in zip(chunk[1:], models, strict=True):
                row.copy_(model.part(start, stop)).sub_(base)
            self._check_finite(chunk[1:])

        for chunk in self._filled(len(models) + 1, dtype, fill):
            yield chunk[0], chunk[1:]

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

        def fill(chunk: Tensor, start: int, stop: int) -> None:
            for row, source in zip(chunk, sources, strict=True):
                row.copy_(source.part(start, stop))

        for chunk in self._filled(len(sources), self.work, fill):
            merged = chunk[0].mul_(factors[0])
            for factor, row in zip(factors[1:], chunk[1:], strict=True):
                merged.add_(row, alpha=factor)
            self._check_finite(merged)  # what is not finite in a model is not finite here
            yield merged

    def _filled(self, rows: int, dtype: torch.dtype, fill: Callable[[Tensor, int, int], None]) -> Iterator[Tensor]:
        """Chunks ``(rows, n)``, each filled anew; the next one by a thread where it is to be read ahead."""
        count = -(-self.numel // self.step)
        ahead = self.ahead and count > 1
        held = [torch.empty(rows, self.step, dtype=dtype, device=self.device) for _ in range(1 + ahead)]

        def filled(number: int) -> Tensor:
            start = number * self.step
            stop = min(start + self.step, self.numel)
            chunk = held[number % len(held)][:, : stop - start]
            fill(chunk, start, stop)
            return chunk

        if not ahead:
            yield from map(filled, range(count))
            return
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(filled, 0)
            for number in range(count):
                chunk = coming.result()
                if number + 1 < count:
                    coming = reader.submit(filled, number + 1)
                yield chunk

    def _check_finite(self, values: Tensor) -> None:
        # a sum is quick; it may leave float32 where no value does
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise InputError(f"tensor '{self.name}' has values that are not finite")
