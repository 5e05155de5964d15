"""The column loop of gptq: the C code on the rows of a matrix, split between threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tritcore import ggml
from tritcore.errors import NotFiniteError, RangeError

_ROWS = 64  # per task at least, and a multiple of the rows that the C code takes together


class Block(ggml.Columns):
    """The statistics of a block of 64 columns."""

    def __init__(self, hessian: torch.Tensor, factor: torch.Tensor) -> None:
        """Prepare.

        Args:
            hessian: float64 (64, 64), of the columns, given others.
            factor: float64 (64, 64), R upper triangular with hessian = R RT.
        """
        diagonal = factor.diagonal()
        parts = (factor / diagonal, diagonal.square(), hessian, torch.linalg.inv(hessian))
        super().__init__(*(part.cpu().numpy() for part in parts))


class ColumnLoop:
    """Quantizes the columns of a block. Tensors of other devices are copied."""

    def __init__(self, threads: int) -> None:
        """Prepare for a number of threads."""
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def quantize(
        self,
        depth: int,
        block: Block,
        aims: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor,
        indexes: np.ndarray,
    ) -> None:
        """Choose scales, then codes column by column, with the errors of the columns before.

        Args:
            depth: trits per weight, 1..4.
            block: the statistics of the columns, given all former blocks.
            aims: float32 (64, rows), with the feedback of the former blocks.
            values: float32 (64, rows), output.
            scales: float32 (4, rows), output, the scale of each group.
            indexes: uint8 (rows, 4), output, the scale indexes.

        Raises:
            RangeError: a row lies above the range of the scale codebook.
            NotFiniteError: a row is not finite.
        """
        here, out, scale = _on_cpu(aims), _on_cpu(values), _on_cpu(scales)

        def run(rows: slice) -> None:
            parts = (here[:, rows], out[:, rows], scale[:, rows], indexes[rows])
            refused = ggml.gptq_quantize(depth, block, *parts)
            if refused is not None:
                _refuse(here[:, rows][:, refused])

        self._split(run, len(indexes))
        _take_back(values, out)
        _take_back(scales, scale)

    def descend(
        self,
        depth: int,
        block: Block,
        gradient: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor,
        indexes: np.ndarray,
        *,
        with_scales: bool,
    ) -> None:
        """Coordinate descent over the columns of a block.

        Args:
            depth: trits per weight, 1..4.
            block: the statistics of the columns, given all other blocks.
            gradient: float32 (64, rows), half the gradient of the squared error of the products.
            values: float32 (64, rows), changed.
            scales, indexes: as `quantize` has them, changed where other scales are better.
            with_scales: whether to try other scales.

        Raises:
            NotFiniteError: a value is not finite.
        """
        slope, out, scale = _on_cpu(gradient), _on_cpu(values), _on_cpu(scales)

        def run(rows: slice) -> None:
            parts = (slope[:, rows], out[:, rows], scale[:, rows], indexes[rows])
            if (refused := ggml.gptq_descend(depth, block, *parts, search=with_scales)) is not None:
                _refuse(out[:, rows][:, refused])

        self._split(run, len(indexes))
        _take_back(values, out)
        _take_back(scales, scale)

    def _split(self, run: Callable[[slice], None], n_rows: int) -> None:
        count = min(self._threads, -(-n_rows // _ROWS))
        if count <= 1:
            run(slice(0, n_rows))
            return
        step = -(-n_rows // (count * _ROWS)) * _ROWS
        list(self._pool.map(run, (slice(first, first + step) for first in range(0, n_rows, step))))


def _refuse(column: np.ndarray) -> None:
    """Raise the error for weights float32 (64,) of a row that cannot be stored."""
    infinite = np.flatnonzero(~np.isfinite(column))
    if len(infinite):
        raise NotFiniteError(int(infinite[0]))
    raise RangeError(0, float(np.abs(column).max()), "above the range of the scale codebook")


def _on_cpu(values: torch.Tensor) -> np.ndarray:
    """The values as an array, which shares the memory of a tensor on the CPU."""
    return values.cpu().numpy()


def _take_back(values: torch.Tensor, array: np.ndarray) -> None:
    """Copy an array to the tensor of another device that it was made of."""
    if values.device.type != "cpu":
        values.copy_(torch.from_numpy(array))
