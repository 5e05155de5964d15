"""The `search` method: per block, the anchor, scale indexes and codes of least weighted squared error.

It needs no data: TRIT1 and TRIT2 weigh the errors of large weights more, as the K-quants do; TRIT3 and TRIT4 weigh all
alike. The encoder is ggml's, in C: llama-quantize makes the same blocks.
"""

import numpy as np

from tritconv.plan import SourceTensor
from tritconv.workers import Workers
from tritcore import ggml
from tritcore.errors import NotFiniteError, RangeError
from tritcore.format import BLOCK_SIZE, CODE_MAX, N_ANCHORS, RATIO_ONE, WORDS_PER_BLOCK, ZERO, anchor
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
        raise RangeError(block, float(_largest(weights)[block]), "above the range of the scale codebook")
    return data


def reaches(weights: np.ndarray, depth: int) -> bool:
    """Whether a type reaches down to float32 (rows, n): blocks below its range cost the matrix nothing that matters."""
    return ggml.reaches(depth, [ggml.measure_reach(weights, depth)])


def check_reach(weights: np.ndarray, depth: int, workers: Workers) -> None:
    """Check that a type reaches down to a tensor.

    Args:
        weights: floats, row length last, a multiple of 64.
        depth: trits per weight, 1..4.
        workers: threads to use.

    Raises:
        RangeError: the tensor as a whole is too small for the type. `block` is the first below the range.
    """
    if not ggml.reaches(depth, workers.map(lambda chunk: ggml.measure_reach(chunk.rows, depth), weights)):
        largest = _largest(weights)
        least = float(anchor(depth, np.array(N_ANCHORS - 1))) * RATIO_ONE * CODE_MAX[depth]
        block = int(np.flatnonzero((largest >= ZERO) & (largest < least))[0])
        bound = "below the range of the scale codebook, as is too much of the tensor"
        raise RangeError(block, float(largest[block]), bound)


def _largest(weights: np.ndarray) -> np.ndarray:
    """float32 (blocks,): the largest magnitude of each block."""
    blocks = weights.reshape(-1, BLOCK_SIZE)
    return np.maximum(blocks.max(axis=1), -blocks.min(axis=1)).astype(np.float32)


class Search:
    """The method without data."""

    name = "search"

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        return np.concatenate(workers.map(lambda chunk: quantize(chunk.rows, depth), values))

    def remarks(self) -> list[str]:
        return []
