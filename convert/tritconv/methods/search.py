"""The `search` method: per block, the anchor, scale indexes and codes of least weighted squared error.

It needs no data: TRIT1 and TRIT2 weigh the errors of large weights more, as the K-quants do; TRIT3 and TRIT4 weigh all
alike. The encoder is ggml's, in C: llama-quantize makes the same blocks.
"""

import numpy as np

from tritconv.sources.source import SourceTensor
from tritconv.workers import Workers
from tritcore import ggml
from tritcore.encoder import largest_of_blocks, quantize
from tritcore.errors import RangeError
from tritcore.format import CODE_MAX, N_ANCHORS, RATIO_ONE, ZERO, anchor


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
        largest = largest_of_blocks(weights)
        least = float(anchor(depth, np.array(N_ANCHORS - 1))) * RATIO_ONE * CODE_MAX[depth]
        block = int(np.flatnonzero((largest >= ZERO) & (largest < least))[0])
        bound = "below the range of the scale codebook, as is too much of the tensor"
        raise RangeError(block, float(largest[block]), bound)


class Search:
    """The method without data."""

    name = "search"

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        return np.concatenate(workers.map(lambda chunk: quantize(chunk.rows, depth), values))

    def remarks(self) -> list[str]:
        return []
