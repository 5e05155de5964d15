"""What ggml-trit-gptq.c does, in numpy: the same operations in the same order, on all rows at once.

Arrays are float32 (64, rows), scales (4, rows), indexes uint8 (rows, 4), as `tritcore.ggml` has them.
"""

from dataclasses import dataclass

import ggml
import numpy as np

from tritcore.codec import Blocks
from tritcore.format import BLOCK_SIZE, CODE_MAX, GROUP_SIZE

_ONE = np.float32(1)


@dataclass(frozen=True)
class Statistics:
    """Of 64 columns: float32 (64, 64), importance (64,)."""

    feedback: np.ndarray
    importance: np.ndarray
    hessian: np.ndarray
    inverse: np.ndarray


def quantize(depth: int, columns: Statistics, aims: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, scales and indexes. All rows can be held."""
    scales, indexes, found = search_scales(depth, columns, aims)
    assert found.all()
    return feed_back(depth, columns.feedback, aims, scales), scales, indexes


def search_scales(depth: int, columns: Statistics, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales and indexes, and for each row whether there are any, by the search of single blocks."""
    importance = np.broadcast_to(columns.importance, (x.shape[1], BLOCK_SIZE))
    indexes, found = ggml.search(depth, x.T, importance, reference=True)
    indexes[~found] = 0
    return _group_scales(depth, indexes), indexes, found


def _group_scales(depth: int, indexes: np.ndarray) -> np.ndarray:
    codes = np.zeros((len(indexes), BLOCK_SIZE), np.int8)
    return np.ascontiguousarray(Blocks(depth, codes, indexes).group_scales().T)


def feed_back(depth: int, feedback: np.ndarray, aims: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values, column after column."""
    values, errors = np.empty_like(aims), np.empty_like(aims)
    for j in range(BLOCK_SIZE):
        now = aims[j].copy()
        for i in range(j):
            now += feedback[i, j] * errors[i]
        values[j] = _nearest(depth, now, scales[j // GROUP_SIZE])
        errors[j] = aims[j] - values[j]
    return values


def _nearest(depth: int, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        codes = np.clip(x * (_ONE / scale), -CODE_MAX[depth], CODE_MAX[depth])
    return np.rint(codes) * scale


def descend_once(
    depth: int, hessian: np.ndarray, gradient: np.ndarray, values: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values and gradient after each column has moved in turn."""
    values, gradient = values.copy(), gradient.copy()
    for j in range(BLOCK_SIZE):
        best = values[j] - gradient[j] * (_ONE / hessian[j, j])
        best = _nearest(depth, best, scales[j // GROUP_SIZE])
        gradient += hessian[j][:, None] * (best - values[j])
        values[j] = best
    return values, gradient


def descend(
    depth: int,
    columns: Statistics,
    gradient: np.ndarray,
    values: np.ndarray,
    scales: np.ndarray,
    indexes: np.ndarray,
    *,
    search: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """New values, scales and indexes."""
    values, gradient = descend_once(depth, columns.hessian, gradient, values, scales)
    if not search:
        return values, scales, indexes
    best = values - _product(columns.inverse, gradient)
    other_scales, other_indexes, found = search_scales(depth, columns, best)
    others = feed_back(depth, columns.feedback, best, other_scales)
    other_gradient = _product(columns.hessian, others - best)
    others, other_gradient = descend_once(depth, columns.hessian, other_gradient, others, other_scales)
    better = found & (_excess(others, best, other_gradient) < _excess(values, best, gradient))
    return (
        np.where(better, others, values),
        np.where(better, other_scales, scales),
        np.where(better[:, None], other_indexes, indexes),
    )


def _product(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix, summed up in the order of the columns."""
    total = np.zeros_like(x)
    for i in range(BLOCK_SIZE):
        total += matrix[i][:, None] * x[i]
    return total


def _excess(values: np.ndarray, best: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    total = np.zeros(values.shape[1], np.float32)
    for value, least, slope in zip(values, best, gradient, strict=True):
        total += (value - least) * slope
    return total
