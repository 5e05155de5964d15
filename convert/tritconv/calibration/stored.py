"""Tensors in files, read when they are needed: whole, or some of their rows.

The files are read with pread, not mapped into memory: pages of a mapping would count as memory of the process.
"""

import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from tritcore import cache
from tritcore.errors import TritError
from tritcore.sizes import show

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored(Protocol):
    """A tensor that can be read again and again. The transformers library reads it with `stored[...]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""

    def is_floating_point(self) -> bool:
        """Whether its values are floats: asked for by the transformers library."""

    def __getitem__(self, _: object) -> torch.Tensor:
        """The whole tensor, on the CPU, in memory of its own. Raises TritError."""

    def rows(self, numbers: Sequence[int] | range) -> torch.Tensor:
        """The rows of these numbers, (numbers, ...). Raises TritError."""


class OpenFile:
    """A file that is open until this object is forgotten. Errors call it `name`."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor = descriptor
        self.name = name
        weakref.finalize(self, os.close, descriptor)

    @staticmethod
    def of(path: Path) -> "OpenFile":
        """A file that exists, for reading. Raises TritError."""
        try:
            return OpenFile(os.open(path, os.O_RDONLY), str(path))
        except OSError as error:
            raise TritError(f"cannot read {path}: {error.strerror}") from error

    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """uint8 (n_bytes,). Raises TritError."""
        out = np.empty(n_bytes, dtype=np.uint8)
        rest = memoryview(out.data)
        try:
            while rest:
                count = os.preadv(self.descriptor, [rest], offset)
                if not count:
                    raise TritError(f"{self.name} is truncated: download it again")
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise TritError(f"cannot read {self.name}: {error.strerror}") from error
        return out


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose values lie in a file as they are in memory."""

    file: OpenFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._read(0, self.shape)

    def rows(self, numbers: Sequence[int] | range) -> torch.Tensor:
        if isinstance(numbers, range) and numbers.step == 1:
            return self._read(numbers.start * math.prod(self.shape[1:]), (len(numbers), *self.shape[1:]))
        out = torch.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        at = 0
        for first, count in runs(numbers):
            out[at : at + count] = self._read(first * math.prod(self.shape[1:]), (count, *self.shape[1:]))
            at += count
        return out

    def _read(self, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Values from number `first` on, in a shape."""
        n_bytes = math.prod(shape) * self.dtype.itemsize
        values = torch.from_numpy(self.file.read(self.offset + first * self.dtype.itemsize, n_bytes))
        return values.view(self.dtype).view(shape) if n_bytes else torch.empty(shape, dtype=self.dtype)


def runs(numbers: Sequence[int] | range) -> Iterator[tuple[int, int]]:
    """The numbers in order, as runs of consecutive ones: (the first, how many)."""
    start, count = 0, 0
    for number in numbers:
        if count and number == start + count:
            count += 1
            continue
        if count:
            yield start, count
        start, count = number, 1
    if count:
        yield start, count


def in_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file that has been checked, by name. Raises TritError."""
    file = OpenFile.of(path)
    (length,) = file.read(0, 8).view("<u8").tolist()
    header = json.loads(file.read(8, length).tobytes())
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if (dtype := _SAFETENSORS.get(about["dtype"])) is None:
            raise TritError(f"{path}: tensor {name} is {about['dtype']}, which calibration does not read")
        start, _ = about["data_offsets"]
        found[name] = FileTensor(file, 8 + length + start, tuple(about["shape"]), dtype)
    return found


class Spill:
    """A temporary file for tensors that no file has as they are needed.

    It has no name, so nothing remains of it after the process ends, however it ends.
    """

    def __init__(self) -> None:
        self._file: OpenFile | None = None
        self._end = 0

    def check_space(self, n_bytes: int) -> None:
        """See that the disk holds so much more. Raises TritError."""
        with _disk_errors():
            free = shutil.disk_usage(_folder()).free
        if n_bytes > free:
            raise TritError(
                f"calibration needs {show(n_bytes)} for a temporary copy of the weights in {cache.folder()}, and "
                f"{show(free)} are free: set TRITCONV_CACHE to a folder on a larger disk"
            )

    def add(self, values: torch.Tensor) -> FileTensor:
        """Write a tensor on the CPU. Raises TritError."""
        self.check_space(values.nbytes)
        if self._file is None:
            self._file = _temporary()
        raw = values.detach().contiguous().view(-1)
        rest = memoryview(raw.view(torch.uint8).numpy()) if values.nbytes else memoryview(b"")
        found = FileTensor(self._file, self._end, tuple(values.shape), values.dtype)
        with _disk_errors():
            while rest:
                count = os.pwrite(self._file.descriptor, rest, self._end)
                rest, self._end = rest[count:], self._end + count
        self._end += -self._end % 64
        return found


def _folder() -> Path:
    place = cache.folder()
    place.mkdir(parents=True, exist_ok=True)
    return place


def _temporary() -> OpenFile:
    with _disk_errors(), tempfile.TemporaryFile(dir=_folder()) as file:
        return OpenFile(os.dup(file.fileno()), f"a temporary file in {cache.folder()}")


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn errors of the disk into TritError."""
    try:
        yield
    except OSError as error:
        raise TritError(
            f"cannot write a temporary copy of the weights to {cache.folder()}: {error.strerror or error}; "
            "set TRITCONV_CACHE to another folder"
        ) from error
