"""Encodes tensors to storage types, and measures what an encoding lost."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from tritconv.sources.source import SourceTensor
from tritconv.workers import Chunk, Workers
from tritcore import ggml
from tritcore.errors import RangeError, TritError
from tritcore.format import BLOCK_SIZE


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is stored.

    Attributes:
        data: uint8 (bytes,).
        squared_error, energy: sums over the tensor of (w - w')^2 and w^2, w' the stored weights.
    """

    data: np.ndarray
    squared_error: float
    energy: float

    @property
    def relative_error(self) -> float:
        """Root mean square error over root mean square weight; 0 for a tensor of zeros."""
        return math.sqrt(self.squared_error / self.energy) if self.energy else 0.0


def n_bytes(shape: tuple[int, ...], qtype: GGMLQuantizationType) -> int:
    """Bytes of a tensor of `shape` (row length last) in `qtype`."""
    block, size = GGML_QUANT_SIZES[qtype]
    return math.prod(shape) // block * size


def check_finite(tensor: SourceTensor, values: np.ndarray, workers: Workers) -> None:
    """Check that the weights of a tensor are finite: floats, row length last. Raises TritError."""
    finite = np.concatenate(workers.map(lambda chunk: np.isfinite(chunk.rows).all(axis=1), values))
    if finite.all():
        return
    row = int(np.flatnonzero(~finite)[0])
    width = values.shape[-1] if values.ndim else 1
    column = int(np.flatnonzero(~np.isfinite(values.reshape(-1, width)[row]))[0])
    index = tuple(int(i) for i in np.unravel_index(row * width + column, tensor.shape))
    raise TritError(
        f"tensor {tensor.name} holds {values.reshape(tensor.shape)[index]} at {list(index)}: the checkpoint is damaged "
        "or was saved mid-training; no such weight can be quantized"
    )


def encode(values: np.ndarray, qtype: GGMLQuantizationType, workers: Workers) -> Encoded:
    """Encode a tensor as llama.cpp does.

    Args:
        values: finite float16 or float32, row length last; it must be a multiple of the type's block size.
        qtype: the type to store, not a TRIT type: those are for the methods.

    Raises:
        RangeError: the type cannot hold a block; `block` counts from the start of the tensor.
    """
    return measured(
        values, np.concatenate(workers.map(lambda chunk: _in_type(chunk.rows, qtype), values)), qtype, workers
    )


def measured(values: np.ndarray, data: np.ndarray, qtype: GGMLQuantizationType, workers: Workers) -> Encoded:
    """A tensor with what its encoding lost.

    Args:
        values: float16 or float32, row length last.
        data: rows in the type, uint8 (rows, bytes per row) or floats (rows, n).

    Raises:
        RangeError: a stored value is not finite; `block` counts from the start of the tensor.
    """

    def sums(chunk: Chunk) -> tuple[float, float]:
        with _any_value():
            stored = ggml.dequantize(data[chunk.place], qtype)
        if not np.isfinite(stored).all():  # float16 ends at 65504, as a value and as the scale of a block
            block = int(np.flatnonzero(~np.isfinite(stored.ravel()))[0]) // BLOCK_SIZE
            raise RangeError(block, float(np.abs(chunk.rows).max()), f"above the range of {qtype.name}")
        lost = (chunk.rows - stored).ravel().astype(np.float64)
        whole = chunk.rows.ravel().astype(np.float64)
        return float(lost @ lost), float(whole @ whole)

    parts = workers.map(sums, values)
    squared_error, energy = (sum(column) for column in zip(*parts, strict=True))
    return Encoded(np.ascontiguousarray(data).view(np.uint8).ravel(), squared_error, energy)


def _in_type(rows: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray:
    with _any_value():
        return quants.quantize(rows, qtype)


def _any_value() -> AbstractContextManager[object]:
    """A context without warnings of what float16 cannot hold: that is looked for."""
    return np.errstate(over="ignore", invalid="ignore")
