"""Importances that llama-imatrix measured: the mean square of each input of a matrix."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType

from tritconv.sources.source import SourceTensor
from tritcore.console import one_line
from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile, Tensor, read_model_file

_SUMS, _COUNTS = ".in_sum2", ".counts"
_ADVICE = "make it again with llama-imatrix"

# Of the old format: beyond what any model has, as a sparse file may claim any size.
_MAX_ENTRIES, _MAX_NAME, _MAX_VALUES = 1 << 16, 1 << 10, 1 << 28
_I32, _I32_MAX = struct.Struct("<i"), 2**31 - 1


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Read an imatrix file of llama.cpp, in its GGUF format or in the old one (.dat).

    Returns:
        For each GGUF tensor name float32 (matrices, n): the importance of each column, as llama-quantize takes it. A
        tensor of experts has a matrix for each; one that saw no token has ones. The old format does not tell experts
        apart: there, and in what llama-imatrix makes of it, the matrices of a tensor are one, (1, matrices * n).

    Raises:
        TritError: the file cannot be read, or is no imatrix.
    """
    if _is_old(path):
        return _read_old(path)
    model = read_model_file(path)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        raise TritError(f"{path} holds no importances: make an imatrix with llama-imatrix -m F16.gguf -f TEXT -o FILE")
    missing = next((name for name in names if name + _COUNTS not in tensors), None)
    if missing is not None:
        raise TritError(f"{path}: damaged: {missing} has sums but no counts; {_ADVICE}")
    return {name: _importance(model, name, tensors[name + _SUMS], tensors[name + _COUNTS]) for name in names}


def _is_old(path: Path) -> bool:
    """Whether a file is not GGUF; what cannot be read is for `read_model_file` to say."""
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(4) != b"GGUF"
    except OSError:
        return False


def _read_old(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            return dict(_old_entries(path, file))
    except OSError as error:
        raise TritError(f"{path}: cannot be read: {error.strerror}") from error


def _old_entries(path: Path, file: BinaryIO) -> Iterator[tuple[str, np.ndarray]]:
    """Of each tensor the name and float32 (1, n), the mean squares.

    In the file: the number of entries; for each the length of its name, the name, a number of calls, the number of
    values, and the mean squares times the calls. What follows is not read: on which text, and how much of it.
    """

    def fail(what: str) -> TritError:
        return TritError(f"{path} is no imatrix, in GGUF or in the old format, or it is damaged: {what}; {_ADVICE}")

    def number(what: str, least: int, most: int) -> int:
        raw = file.read(_I32.size)
        if len(raw) < _I32.size:
            raise fail("it is cut off")
        (value,) = _I32.unpack(raw)
        if not least <= value <= most:
            raise fail(f"{value} {what}")
        return value

    seen: set[str] = set()
    n_values = 0
    for _ in range(number("entries", 1, _MAX_ENTRIES)):
        length = number("bytes in a name", 1, _MAX_NAME)
        name = file.read(length).decode(errors="replace")
        calls = number("calls", 0, _I32_MAX)
        count = number("values", 1, _MAX_VALUES - n_values)
        n_values += count
        if file.tell() + 4 * count > path.stat().st_size:
            raise fail("it is cut off")
        values = np.fromfile(file, "<f4", count)
        if name in seen:
            raise fail(f"{one_line(name)} is there twice")
        seen.add(name)
        if not np.isfinite(values).all() or (values < 0).any():
            raise fail(f"{one_line(name)} has a value that is negative or not finite")
        yield name, (values / np.float32(calls or 1))[None]


def _importance(model: ModelFile, name: str, sums_entry: Tensor, counts_entry: Tensor) -> np.ndarray:
    sums, counts = _float32(model, sums_entry), _float32(model, counts_entry)
    if len(sums) % len(counts):
        raise _damaged(model, name, f"{len(sums)} sums for {len(counts)} counts")
    for values in (sums, counts):
        if not np.isfinite(values).all() or (values < 0).any():
            raise _damaged(model, name, "a value is negative or not finite")
    counts = np.rint(counts)[:, None]
    seen = counts > 0
    return np.where(seen, sums.reshape(len(counts), -1) / np.where(seen, counts, 1), np.float32(1))


def _float32(model: ModelFile, tensor: Tensor) -> np.ndarray:
    if tensor.type is not GGMLQuantizationType.F32:
        raise _damaged(model, tensor.name, f"the type is {tensor.type.name}, not F32")
    data = np.fromfile(model.path, dtype=np.uint8, count=tensor.n_bytes, offset=model.data_start + tensor.offset)
    return data.view("<f4")


def _damaged(model: ModelFile, name: str, what: str) -> TritError:
    return TritError(f"{model.path}: damaged: {name}: {what}; {_ADVICE}")


class ImatrixFile:
    """The importances of a file."""

    def __init__(self, path: Path) -> None:
        """Read them. Raises TritError as `read_imatrix`."""
        self._path = path
        self._importance = read_imatrix(path)

    def of(self, tensor: SourceTensor) -> np.ndarray | None:
        """As `Importances.of` has it."""
        importance = self._importance.get(tensor.name)
        if importance is None:
            return None
        wanted = (math.prod(tensor.shape[:-2]), tensor.shape[-1])
        if importance.shape == (1, math.prod(wanted)):  # of the old format
            importance = importance.reshape(wanted)
        if importance.shape != wanted:
            raise TritError(
                f"{self._path} is of another model: it has {_size(importance.shape)} importances for {tensor.name}, "
                f"which needs {_size(wanted)}"
            )
        return importance


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
