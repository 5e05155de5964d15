"""Encodes a tensor to a storage type, and measures what the encoding lost."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from tritconv.methods import Quantizer
from tritconv.methods.search import check_reach
from tritconv.plan import SourceTensor
from tritconv.workers import Chunk, Workers
from tritcore.errors import NotFiniteError, RangeError
from tritcore.format import BLOCK_SIZE
from tritcore.gguf_types import DEPTH_OF_TYPE


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is stored.

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


class Encoder:
    """Encodes tensors: the TRIT types by a method, all others as llama.cpp does."""

    def __init__(self, quantizer: Quantizer, workers: Workers) -> None:
        self._quantizer = quantizer
        self._workers = workers

    def encode(self, tensor: SourceTensor, values: np.ndarray, qtype: GGMLQuantizationType) -> Encoded:
        """Encode a tensor.

        Args:
            tensor: what is known of it.
            values: float16 or float32, row length last; it must be a multiple of the type's block size.
            qtype: the type to store.

        Raises:
            NotFiniteError: a value is NaN or infinite; `index` counts from the start of the tensor.
            RangeError: the type cannot hold a block, or the tensor is too small for it; `block` counts from the start
                of the tensor.
        """
        finite = np.concatenate(self._workers.map(lambda chunk: np.isfinite(chunk.rows).all(axis=1), values))
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            width = values.shape[-1] if values.ndim else 1
            raise NotFiniteError(row * width + int(np.flatnonzero(~np.isfinite(values.reshape(-1, width)[row]))[0]))

        if (depth := DEPTH_OF_TYPE.get(qtype)) is not None:
            check_reach(values, depth, self._workers)
            data = self._quantizer.quantize(tensor, values, depth, self._workers)
        else:
            data = np.concatenate(self._workers.map(lambda chunk: _in_type(chunk.rows, qtype), values))
        return self._measured(values, data, qtype)

    def _measured(self, values: np.ndarray, data: np.ndarray, qtype: GGMLQuantizationType) -> Encoded:
        def sums(chunk: Chunk) -> tuple[float, float]:
            with _any_value():
                stored = quants.dequantize(data[chunk.place], qtype)
            if not np.isfinite(stored).all():  # float16 ends at 65504, as a value and as the scale of a block
                block = int(np.flatnonzero(~np.isfinite(stored.ravel()))[0]) // BLOCK_SIZE
                raise RangeError(block, float(np.abs(chunk.rows).max()), f"above the range of {qtype.name}")
            lost = (chunk.rows - stored).ravel().astype(np.float64)
            whole = chunk.rows.ravel().astype(np.float64)
            return float(lost @ lost), float(whole @ whole)

        parts = self._workers.map(sums, values)
        squared_error, energy = (sum(column) for column in zip(*parts, strict=True))
        return Encoded(np.ascontiguousarray(data).view(np.uint8).ravel(), squared_error, energy)


def _in_type(rows: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray:
    with _any_value():
        return quants.quantize(rows, qtype)


def _any_value() -> AbstractContextManager[object]:
    """A context without warnings of what float16 cannot hold: that is looked for."""
    return np.errstate(over="ignore", invalid="ignore")
