"""gptq for the matrices outside the layers. Their rows are independent, and there are many of them."""

from collections.abc import Iterator

import numpy as np
import torch

from tritconv.calibration.lender import ReadRows
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.moments import Moments
from tritconv.calibration.outside import OutsideMatrix, OutsideMoments
from tritconv.calibration.ranks import Ranks
from tritconv.methods.gptq.columns import ColumnLoop
from tritconv.methods.gptq.matrix import Solver
from tritcore import encoder, ggml
from tritcore.codec import pack
from tritcore.errors import NotFiniteError, RangeError
from tritcore.format import BLOCK_SIZE, BYTES_PER_BLOCK
from tritcore.gguf_types import TRIT_TYPE

_WEIGHTS = 1 << 25  # that are quantized at a time


def reader(data: np.ndarray, depth: int) -> ReadRows:
    """What reads rows of a quantized matrix, uint8 (rows, bytes per row)."""
    return lambda rows: torch.from_numpy(ggml.dequantize(data[np.asarray(rows)], TRIT_TYPE[depth]))


def holds(values: np.ndarray, depth: int) -> bool:
    """Whether a type can hold float16 or float32 (rows, n)."""
    step = _step(values)
    parts = (values[first : first + step].astype(np.float32, copy=False) for first in range(0, len(values), step))
    return ggml.reaches(depth, [ggml.measure_reach(part, depth) for part in parts])


def solvers(
    matrix: OutsideMatrix, moments: OutsideMoments, model: LayeredModel, loop: ColumnLoop, ranks: Ranks
) -> Iterator[tuple[torch.Tensor, Solver, np.ndarray]]:
    """Of each class of rows: their numbers, what quantizes them, and the importances of the columns, float32 (n,)."""
    for rows, hessian in matrix.classes(moments):
        importance = hessian.diagonal().numpy().copy()  # the solver damps the Hessian
        of_inputs = Moments(hessian.to(model.device), n_tokens=int(moments.counts.max()))
        yield rows, Solver(of_inputs, model.product_type, loop, ranks), importance


def quantize_outside(
    values: np.ndarray,
    depth: int,
    matrix: OutsideMatrix,
    moments: OutsideMoments,
    model: LayeredModel,
    loop: ColumnLoop,
    ranks: Ranks,
) -> tuple[np.ndarray, bool] | None:
    """Quantize a matrix.

    Args:
        values: float16 or float32 (rows, n), n a multiple of 64.
        depth: trits per weight, 1..4.
        moments: finished.

    Returns:
        uint8 (rows, bytes per row), and whether any row went by weighted search; None where the type cannot hold them.
    """
    if not holds(values, depth):
        return None
    step = _step(values)
    data = np.empty((len(values), values.shape[1] // BLOCK_SIZE * BYTES_PER_BLOCK[depth]), dtype=np.uint8)
    searched = False
    for rows, solver, importance in solvers(matrix, moments, model, loop, ranks):
        for some in rows.split(step):
            weights = values[some.numpy()].astype(np.float32)
            try:
                found = solver.quantize(solver.aims(torch.from_numpy(weights).to(model.device)), depth).blocks
                data[some.numpy()] = pack(found).reshape(len(some), -1)
            except (RangeError, NotFiniteError):
                searched = True
                try:
                    data[some.numpy()] = encoder.quantize(weights, depth, importance)
                except RangeError:
                    return None
    return data, searched


def _step(values: np.ndarray) -> int:
    """The rows of (rows, n) to work on at a time."""
    return max(1, _WEIGHTS // values.shape[1])
