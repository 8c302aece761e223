"""Safetensors files, read and written a part of a tensor at a time.

The format is eight bytes with the length of a header (little-endian), the header, which is JSON, and the tensors'
bytes: https://huggingface.co/docs/safetensors. The library's own readers map a file into memory, so that what was
read counts as memory of the process until it ends, and its writer takes whole tensors.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.progress import track

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}
LONGEST_HEADER = 10**8  # bytes, as in the library


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values.

    Args:
        name: Its name.
        shape: Its shape.
        dtype: Its type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileTensor(TensorSpec):
    """A tensor in a file.

    Args:
        file: The file.
        offset: Where its values start.
    """

    file: "TensorFile"
    offset: int

    def part(self, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` in row-major order; they last until something else is read from the file."""
        size = self.dtype.itemsize
        return self.file.read(self.offset + start * size, (stop - start) * size).view(self.dtype)


class TensorFile:
    """A file that is open for reading; :meth:`close` it.

    Args:
        path: The file.

    Attributes:
        tensors: Its tensors by name, in the order of their values.

    Raises:
        InputError: It cannot be read, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = torch.empty(0, dtype=torch.uint8)
        try:
            self._stream = path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", path) from None
        if hasattr(os, "posix_fadvise"):  # the kernel then reads further ahead
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        try:
            self.tensors = self._parse()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self.close()
            raise InputError(f"cannot be read ({error})", path) from None

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def read(self, offset: int, size: int) -> Tensor:
        """``size`` bytes from ``offset``, in a buffer that the next call overwrites."""
        if len(self._held) < size:
            self._held = torch.empty(size, dtype=torch.uint8)
        held = self._held[:size]
        view = memoryview(cast(Any, held.numpy()))
        self._stream.seek(offset)
        while view.nbytes:
            count = self._stream.readinto(view)
            if not count:
                raise InputError("ended before its last tensor", self.path)
            view = view[count:]
        return held

    def _parse(self) -> dict[str, FileTensor]:
        total = self.path.stat().st_size
        length = int.from_bytes(self._stream.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, total - 8):
            raise ValueError("it does not start with the header of a safetensors file")
        found = [self._entry(name, value, 8 + length) for name, value in self._header(length) if name != "__metadata__"]
        found.sort(key=lambda tensor: tensor.offset)
        for tensor in found:
            if tensor.offset + tensor.nbytes > total:
                raise ValueError(f"it ends before the end of tensor '{tensor.name}'")
        return {tensor.name: tensor for tensor in found}

    def _header(self, length: int) -> list[tuple[str, Any]]:
        header = b""
        while len(header) < length:
            header += self._stream.read(length - len(header))
        return list(json.loads(header).items())

    def _entry(self, name: str, value: Any, start: int) -> FileTensor:
        if value["dtype"] not in TYPES:
            raise ValueError(f"tensor '{name}' has the type {value['dtype']}, which is not known")
        begin, end = value["data_offsets"]
        shape = tuple(int(size) for size in value["shape"])
        tensor = FileTensor(name, shape, TYPES[value["dtype"]], self, start + int(begin))
        if begin < 0 or min(shape, default=0) < 0 or end - begin != tensor.nbytes:
            raise ValueError(f"tensor '{name}' has {end - begin} bytes, but {tensor.nbytes} for its shape and type")
        return tensor


def write_tensors(
    path: Path, tensors: Sequence[TensorSpec], parts: Callable[[TensorSpec], Iterable[Tensor]], about: str = "writing"
) -> None:
    """Write a file.

    Args:
        path: The file; what is there is overwritten.
        tensors: What is in it. Wide types come first, so that every tensor is aligned to its type.
        parts: Called for each; gives its entries in order, a part after the other, in any floating type if it has one.
        about: What the progress bar says.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        offsets = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as stream:
        _write(stream, len(text).to_bytes(8, "little") + text)
        for tensor in track(ordered, about, unit="tensor"):
            written = 0
            for part in parts(tensor):
                raw = part.to("cpu", tensor.dtype).contiguous().view(torch.uint8).numpy()
                _write(stream, raw)
                written += raw.nbytes
            if written != tensor.nbytes:
                raise ValueError(f"tensor '{tensor.name}' has {tensor.nbytes} bytes, but got {written}")


def _write(stream: Any, data: Any) -> None:
    view = memoryview(data)
    while view.nbytes:
        view = view[stream.write(view) :]
