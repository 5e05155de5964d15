"""Encodes a tensor to a storage type on all cores, and measures what the encoding lost."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from tritconv.codec import pack
from tritconv.errors import NotFiniteError, RangeError
from tritconv.format import BLOCK_SIZE
from tritconv.gguf_types import DEPTH_OF_TYPE
from tritconv.search import search

_CHUNK_WEIGHTS = 1 << 20  # per task: large enough for the vector code, small enough to bound the memory


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
    """Encodes tensors with a number of threads; to be used as a context manager."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._torch_threads = torch.get_num_threads()

    def __enter__(self) -> "Encoder":
        torch.set_num_threads(1)  # the pool keeps the cores busy
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def encode(self, values: np.ndarray, qtype: GGMLQuantizationType) -> Encoded:
        """Encode a tensor.

        Args:
            values: float16 or float32, row length last; it must be a multiple of the type's block size.
            qtype: the type to store.

        Raises:
            NotFiniteError: a value is NaN or infinite; `index` counts from the start of the tensor.
            RangeError: a TRIT type cannot hold a block; `block` counts from the start of the tensor.
        """
        rows = values.reshape(-1, values.shape[-1] if values.ndim else 1)
        starts = range(0, len(rows), _rows_per_chunk(rows))
        parts = list(self._pool.map(lambda start: _encode_rows(rows, start, qtype), starts))
        data = np.concatenate([part.data for part in parts])
        return Encoded(data, sum(p.squared_error for p in parts), sum(p.energy for p in parts))


def _rows_per_chunk(rows: np.ndarray) -> int:
    return max(1, _CHUNK_WEIGHTS // rows.shape[1])


def _encode_rows(rows: np.ndarray, start: int, qtype: GGMLQuantizationType) -> Encoded:
    chunk = rows[start : start + _rows_per_chunk(rows)].astype(np.float32)
    finite = np.isfinite(chunk)
    if not finite.all():
        raise NotFiniteError(start * rows.shape[1] + int(np.flatnonzero(~finite)[0]))

    if (depth := DEPTH_OF_TYPE.get(qtype)) is not None:
        try:
            blocks = search(chunk.reshape(-1, BLOCK_SIZE), depth)
        except RangeError as error:
            first_block = start * rows.shape[1] // BLOCK_SIZE
            raise RangeError(first_block + error.block, error.largest, error.bound) from None
        data, stored = pack(blocks), blocks.decode().reshape(chunk.shape)
    else:
        data = quants.quantize(chunk, qtype)
        stored = quants.dequantize(data, qtype).astype(np.float32)

    lost = (chunk - stored).ravel().astype(np.float64)
    whole = chunk.ravel().astype(np.float64)
    return Encoded(np.ascontiguousarray(data).view(np.uint8).ravel(), float(lost @ lost), float(whole @ whole))
