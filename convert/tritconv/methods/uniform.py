"""The `uniform` method: the codec of the 2026 paper as published, to compare with.

Four candidates for the scale of each group; the best one, rounded to a codebook of 27 scales for each matrix, gives the
codes. Then the codes are kept, and the scales become the nearest that the TRIT types have.
"""

import numpy as np

from tritconv.methods.scales import blocks_of_rows
from tritconv.sources.source import SourceTensor
from tritconv.workers import Chunk, Workers
from tritcore.codec import pack
from tritcore.format import CODE_MAX, GROUP_SIZE, N_SCALES, ZERO

_ORDER_STATISTICS = (10, 12, 14, 15)  # of the sorted magnitudes of a group: candidates for what the top code stands for


def encode(weights: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in the codec as published.

    Args:
        weights: float32 (rows, n), n a multiple of 16.
        depth: trits per weight, 1..4.

    Returns:
        codes int8 (rows, n) and scales float32 (rows, n / 16): a group of zeros has scale 0.
    """
    best = group_scales(weights, depth)
    return codes(weights, depth, best, codebook(best))


def group_scales(weights: np.ndarray, depth: int) -> np.ndarray:
    """float32 (rows, n / 16): of the candidates of each group the scale of least squared error; 0 for zeros."""
    groups = weights.reshape(-1, GROUP_SIZE)
    ordered = np.sort(np.abs(groups), axis=1)
    best = np.zeros(len(groups), dtype=np.float32)
    best_error = np.full(len(groups), np.inf, dtype=np.float32)
    for i in _ORDER_STATISTICS:
        scale = ordered[:, i] / np.float32(CODE_MAX[depth])
        error = ((groups - _nearest_codes(groups, scale, depth) * scale[:, None]) ** 2).sum(axis=1)
        better = (error < best_error) & (ordered[:, i] >= ZERO)
        best[better], best_error[better] = scale[better], error[better]
    return best.reshape(len(weights), -1)


def codebook(scales: np.ndarray) -> np.ndarray:
    """float32 (27,): log-spaced from the least to the greatest of the scales that are not 0; empty if all are."""
    positive = scales[scales > 0]
    if not len(positive):
        return np.empty(0, dtype=np.float32)
    return np.geomspace(positive.min(), positive.max(), N_SCALES, dtype=np.float32)


def codes(weights: np.ndarray, depth: int, scales: np.ndarray, book: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes, and the scales rounded to the codebook: see `encode`."""
    rounded = scales.copy()
    some = scales > 0
    if some.any():
        borders = np.sqrt(book[1:] * book[:-1])  # halfway in logarithms
        rounded[some] = book[np.searchsorted(borders, scales[some])]
    groups = weights.reshape(-1, GROUP_SIZE)
    return _nearest_codes(groups, rounded.ravel(), depth).astype(np.int8).reshape(weights.shape), rounded


def _nearest_codes(groups: np.ndarray, scales: np.ndarray, depth: int) -> np.ndarray:
    """float32 (n, 16): the codes nearest to groups (n, 16) at scales (n,); 0 where the scale is."""
    wanted = scales[:, None]
    nearest = np.divide(groups, wanted, out=np.zeros_like(groups), where=wanted > 0)
    np.rint(nearest, out=nearest)
    return np.clip(nearest, -CODE_MAX[depth], CODE_MAX[depth], out=nearest)


class Uniform:
    """The codec of 2026."""

    name = "uniform"

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        best = np.concatenate(workers.map(lambda chunk: group_scales(chunk.rows, depth), values))
        books = [codebook(scales) for scales in best.reshape(-1, values.shape[-2], best.shape[-1])]

        def blocks(chunk: Chunk) -> np.ndarray:
            found = codes(chunk.rows, depth, best[chunk.place], books[chunk.matrix])
            return pack(blocks_of_rows(depth, *found)).reshape(len(chunk.rows), -1)

        return np.concatenate(workers.map(blocks, values))

    def remarks(self) -> list[str]:
        return []
