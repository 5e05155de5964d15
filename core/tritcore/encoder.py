"""TRIT blocks of least weighted squared error: the search in C, with what it refuses as exceptions."""

import numpy as np

from tritcore import ggml
from tritcore.errors import NotFiniteError, RangeError
from tritcore.format import BLOCK_SIZE, WORDS_PER_BLOCK
from tritcore.gguf_types import TRIT_TYPE

_REFUSED = 1  # the words of a block that the encoder cannot store: no encoding of any trits


def quantize(weights: np.ndarray, depth: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize a matrix. Blocks below the codebook's range are stored as well as its least anchor can.

    Args:
        weights: float32 (rows, n), n a multiple of 64.
        depth: trits per weight, 1..4.
        importance: float32 (n,), the weight of each column's squared errors; None leaves it to the type.

    Returns:
        uint8 (rows, bytes per row).

    Raises:
        NotFiniteError: a weight is NaN or infinite.
        RangeError: a block lies above the codebook's range.
    """
    data = ggml.quantize(weights, TRIT_TYPE[depth], importance)
    refused = np.flatnonzero(data.view("<u2").reshape(-1, WORDS_PER_BLOCK[depth])[:, 0] == _REFUSED)
    if len(refused):
        infinite = np.flatnonzero(~np.isfinite(weights))
        if len(infinite):
            raise NotFiniteError(int(infinite[0]))
        block = int(refused[0])
        raise RangeError(block, float(largest_of_blocks(weights)[block]), "above the range of the scale codebook")
    return data


def reaches(weights: np.ndarray, depth: int) -> bool:
    """Whether a type reaches down to float32 (rows, n): blocks below its range cost the matrix nothing that matters."""
    return ggml.reaches(depth, [ggml.measure_reach(weights, depth)])


def largest_of_blocks(weights: np.ndarray) -> np.ndarray:
    """float32 (blocks,): the largest magnitude of each block."""
    blocks = weights.reshape(-1, BLOCK_SIZE)
    return np.maximum(blocks.max(axis=1), -blocks.min(axis=1)).astype(np.float32)
