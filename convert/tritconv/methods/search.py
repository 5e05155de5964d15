"""The `search` method: per block, the anchor, scale indexes and codes of least weighted squared error.

It needs no data: TRIT1 and TRIT2 weigh the errors of large weights more, as the K-quants do; TRIT3 and TRIT4 weigh all
alike. The encoder is ggml's, in C: llama-quantize makes the same blocks.
"""

import numpy as np

from tritconv import ggml
from tritconv.errors import NotFiniteError, RangeError
from tritconv.format import BLOCK_SIZE, CODE_MAX, N_ANCHORS, RATIO_ONE, WORDS_PER_BLOCK, anchor
from tritconv.gguf_types import TRIT_TYPE
from tritconv.plan import SourceTensor
from tritconv.workers import Workers

_REFUSED = 1  # the words of a block that the encoder cannot store: no encoding of any trits


def quantize(weights: np.ndarray, depth: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize a matrix.

    Args:
        weights: float32 (rows, n), n a multiple of 64.
        depth: trits per weight, 1..4.
        importance: float32 (n,), the weight of each column's squared errors; None leaves it to the type.

    Returns:
        uint8 (rows, bytes per row).

    Raises:
        NotFiniteError: a weight is NaN or infinite.
        RangeError: a block lies above the codebook's range, or so far below it that its weights would vanish.
    """
    data = ggml.quantize(weights, TRIT_TYPE[depth], importance)
    refused = np.flatnonzero(data.view("<u2").reshape(-1, WORDS_PER_BLOCK[depth])[:, 0] == _REFUSED)
    if len(refused):
        _explain(weights, depth, int(refused[0]))
    return data


def _explain(weights: np.ndarray, depth: int, block: int) -> None:
    """Raise the reason why a block was refused."""
    infinite = np.flatnonzero(~np.isfinite(weights))
    if len(infinite):
        raise NotFiniteError(int(infinite[0]))
    largest = float(np.abs(weights.reshape(-1, BLOCK_SIZE)[block]).max())
    least_reach = float(anchor(depth, np.array(N_ANCHORS - 1))) * RATIO_ONE * CODE_MAX[depth]
    bound = "below" if largest < least_reach else "above"
    raise RangeError(block, largest, f"{bound} the range of the scale codebook")


class Search:
    """The method without data."""

    name = "search"

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        return np.concatenate(workers.map(lambda chunk: quantize(chunk.rows, depth), values))

    def remarks(self) -> list[str]:
        return []
