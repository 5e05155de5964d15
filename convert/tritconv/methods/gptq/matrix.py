"""The `gptq` method: least error of a matrix's products with the calibration text, by second-order error feedback.

Columns are quantized in turn, and the error of each goes into those that follow, by the inverse Hessian (Frantar et
al., GPTQ, 2023, arXiv:2210.17323). What is quantized is not the matrix itself but the one whose products, with the
inputs that the quantized model really has, come nearest to the full-precision model's (as in GPTAQ, Li et al., 2025,
arXiv:2504.02692). Anchor and scales of a block are chosen when its turn comes, for its weights as they are then. At the
end, coordinate descent goes over codes and scales again, given the rest of the row.

Rows go the same way, an eighth of them at a time: what is wrong with their products goes into the rows that follow, so
that the sum of what all of them do to the model's predictions is least. For columns the inverse Hessian of the inputs
says how; for rows that of the gradients for the outputs (the loss is taken for a Kronecker product of the two, as in
Martens and Grosse, K-FAC, 2015, arXiv:1503.05671).

Matrices are transposed here, (n, rows): the rows of a step lie together.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from tritconv.calibration.moments import Moments
from tritcore import encoder
from tritcore.codec import Blocks, unpack
from tritcore.errors import TritError
from tritcore.format import BLOCK_SIZE, BYTES_PER_BLOCK, CODE_MAX, GROUP_SIZE

# The damping shrinks the correlations of the inputs: it is so many times the Hessian's own diagonal, added to it. The
# fewer tokens there are for each column, the less the Hessian of this text says about other texts; and however many
# there are, other texts are other texts. docs/quality.md has the measurement.
_DAMPING = 0.2
_DAMPING_OF_FEW = 3.0  # times columns over tokens
_MOST_DAMPING = 1.0
_FLOOR = 0.01  # of the damping, for columns without inputs: times the mean of the diagonal
_MOST_OFFSET = 0.499  # a code further away than half would be another code
_INVERTIBLE = 1e3  # more is never needed
# Gradients are noisier than inputs, and few tokens are looked at: the correlations of outputs are halved.
_OUTPUT_DAMPING = 1.0
_MOST_STEPS = 8  # that the rows are quantized in
_LEAST_ROWS = 128  # in a step: fewer would wait for Python
_SWEEPS = 3  # of the closing coordinate descent
_SCALE_SWEEPS = 2  # of these, how many try other scales too


@dataclass(frozen=True)
class Rounded:
    """A quantized matrix.

    Attributes:
        offset: float32 (rows, n), how far from its code the best place of each weight is, all others as they are: less
            than half a code.
    """

    blocks: Blocks
    offset: torch.Tensor


def quantize(weights: torch.Tensor, depth: int, moments: Moments, outputs: Sequence[torch.Tensor] = ()) -> Rounded:
    """Quantize a matrix, or several that have the same inputs, one below the other.

    Args:
        weights: float32 (rows, n), n a multiple of 64, on any device.
        depth: trits per weight, 1..4.
        moments: of the matrix's inputs.
        outputs: of each of the matrices: float32 (its rows, its rows), the sum of g gT, g the gradients of the loss for
            its outputs. Without them rows are nothing to each other.

    Raises:
        RangeError: a block lies above the range of the scale codebook, once it has taken the errors of others.
        NotFiniteError: these errors have grown without bound.
    """
    columns = _Columns(moments)
    aims = weights.T.contiguous()
    if moments.pull is not None:
        aims = aims + (columns.inverse @ moments.pull.double()).float()
    order = _RowOrder(len(weights), outputs)
    quantized = _Quantized(aims, depth)
    for step, rows in enumerate(order.steps):
        some = aims[:, rows]
        done = _feed_back(some, columns, depth)
        _descend(done, some, columns)
        quantized.take(done, rows)
        order.go_on(step, some - done.values, aims)
    return Rounded(quantized.blocks(), quantized.offset(aims, columns.hessian))


class _Quantized:
    """A matrix with codes and scales.

    Attributes:
        scales: float32 (n, rows), each weight's; values: float32 (n, rows), scale times code.
        indexes: uint8 (n / 64, rows, 4), the scale indexes of each block.
    """

    def __init__(self, like: torch.Tensor, depth: int) -> None:
        n, rows = like.shape
        self.depth = depth
        self.code_max = CODE_MAX[depth]
        self.values = torch.empty_like(like)
        self.scales = torch.empty_like(like)
        self.indexes = np.empty((n // BLOCK_SIZE, rows, 4), dtype=np.uint8)

    def take(self, some: "_Quantized", rows: torch.Tensor) -> None:
        """Take rows from another that has only these."""
        self.values[:, rows], self.scales[:, rows] = some.values, some.scales
        self.indexes[:, rows.numpy()] = some.indexes

    def blocks(self) -> Blocks:
        """The blocks, row by row."""
        codes = (self.values / self.scales).round_().T.to(torch.int8).cpu().numpy()
        scales = self.indexes.transpose(1, 0, 2).reshape(-1, 4)
        return Blocks(self.depth, codes.reshape(-1, BLOCK_SIZE), np.ascontiguousarray(scales))

    def offset(self, aims: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        """float32 (rows, n): as `Rounded` has it."""
        gradient = hessian @ (self.values - aims)
        off = gradient.div_(hessian.diagonal()[:, None]).div_(self.scales).neg_()
        return off.clamp_(-_MOST_OFFSET, _MOST_OFFSET).T.contiguous()


class _Block(NamedTuple):
    """What the inputs say of a block of columns alone, given all others: float32 (64, 64)."""

    hessian: torch.Tensor
    inverse: torch.Tensor
    factor: torch.Tensor


class _Columns:
    """What the inputs say of a matrix's columns.

    Attributes:
        hessian: float32 (n, n), damped; inverse: float64, its inverse; factor: float32, the inverse's upper factor.
        blocks: each block of 64 columns.
    """

    def __init__(self, moments: Moments) -> None:
        n = len(moments.hessian)
        few = _DAMPING_OF_FEW * n / max(moments.n_tokens, 1)
        damped, self.inverse = _damped(moments.hessian, min(_DAMPING + few, _MOST_DAMPING))
        self.hessian = damped.float()
        self.factor = _upper(self.inverse)
        own = torch.stack([damped[i : i + BLOCK_SIZE, i : i + BLOCK_SIZE] for i in range(0, n, BLOCK_SIZE)])
        inverses = torch.linalg.inv(own)
        self.blocks = list(map(_Block, own.float(), inverses.float(), _upper(inverses)))


class _RowOrder:
    """In which steps rows are quantized, and how the errors of each go on.

    Attributes:
        steps: the numbers of the rows of each step, those of all matrices.
    """

    def __init__(self, n_rows: int, outputs: Sequence[torch.Tensor]) -> None:
        """Plan. Args: as for `quantize`."""
        count = min(max(n_rows // _LEAST_ROWS, 1), _MOST_STEPS)
        firsts = itertools.accumulate(map(len, outputs), initial=0)
        self._feedbacks = [_RowFeedback(first, output, count) for first, output in zip(firsts, outputs, strict=False)]
        shares = zip(*(feedback.steps for feedback in self._feedbacks), strict=True)
        self.steps = [torch.cat(share) for share in shares] or [torch.arange(n_rows)]

    def go_on(self, step: int, errors: torch.Tensor, aims: torch.Tensor) -> None:
        """Change what later rows aim at, float32 (n, rows), for the errors (n, rows of this step)."""
        start = 0
        for feedback in self._feedbacks:
            stop = start + len(feedback.steps[step])
            feedback.go_on(step, errors[:, start:stop], aims)
            start = stop


class _RowFeedback:
    """How the errors of one matrix's rows go on into its later ones.

    Attributes:
        steps: the numbers of the rows of each step. They are spread over the matrix: neighbours are often alike, and
            should make up for each other.
    """

    def __init__(self, first: int, output: torch.Tensor, count: int) -> None:
        """Prepare.

        Args:
            first: the number of the matrix's first row.
            output: as for `quantize`.
            count: of steps.
        """
        shares = [torch.arange(len(output))[step::count] for step in range(count)]
        order = torch.cat(shares)
        _, inverse = _damped(output[order][:, order], _OUTPUT_DAMPING)
        self._factor = _upper(inverse)
        self.steps = [first + share for share in shares]

    def go_on(self, step: int, errors: torch.Tensor, aims: torch.Tensor) -> None:
        """As `_RowOrder` has it, with the errors of this matrix."""
        start = sum(map(len, self.steps[:step]))
        stop = start + len(self.steps[step])
        if stop < len(self._factor):
            own, later = self._factor[start:stop, start:stop], self._factor[start:stop, stop:]
            spread = torch.linalg.solve_triangular(own, errors, upper=True, left=False) @ later
            aims[:, torch.cat(self.steps[step + 1 :])] -= spread


def _damped(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A Hessian, damped until it is invertible, and its inverse, both float64."""
    diagonal = hessian.diagonal().double()
    diagonal = diagonal + _FLOOR * diagonal.mean().clamp(min=1e-20)
    while damping < _INVERTIBLE:
        damped = hessian.double()
        damped.diagonal().add_(damping * diagonal)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            if inverse.isfinite().all():
                return damped, inverse
        damping *= 10
    raise TritError("the model's activations or gradients on the calibration text are not finite")


def _upper(inverse: torch.Tensor) -> torch.Tensor:
    """float32: the upper Cholesky factor of an inverse Hessian: row j has how the error of column j goes on."""
    return torch.linalg.cholesky(inverse, upper=True).float()


def _feed_back(aims: torch.Tensor, columns: _Columns, depth: int) -> _Quantized:
    quantized = _Quantized(aims, depth)
    factor = columns.factor
    rest = aims.clone()
    for block in range(len(aims) // BLOCK_SIZE):
        start, stop = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
        own = factor[start:stop, start:stop]
        scales, indexes = _search_scales(rest[start:stop], own, depth)
        values, errors = _feed_back_block(rest[start:stop], own, scales, quantized.code_max)
        quantized.values[start:stop], quantized.scales[start:stop] = values, scales
        quantized.indexes[block] = indexes
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return quantized


def _search_scales(weights: torch.Tensor, factor: torch.Tensor, depth: int) -> tuple[torch.Tensor, np.ndarray]:
    """The scales for a block of columns (64, rows), float32 (64, rows), and their indexes, uint8 (rows, 4).

    The importance of a column is what its error costs once the columns after it have made up for it.
    """
    importance = factor.diagonal() ** -2
    data = _search(weights.T.contiguous().cpu().numpy(), depth, importance.cpu().numpy())
    blocks = unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth]))
    scales = torch.from_numpy(blocks.group_scales()).to(weights.device)
    return scales.T.repeat_interleave(GROUP_SIZE, dim=0).contiguous(), blocks.scales


def _search(weights: np.ndarray, depth: int, importance: np.ndarray) -> np.ndarray:
    """As `encoder.quantize`, by as many threads as torch computes with: rows have nothing to do with each other."""
    count = min(torch.get_num_threads(), max(len(weights) // _LEAST_ROWS, 1))
    if count == 1:
        return encoder.quantize(weights, depth, importance)
    parts = np.array_split(weights, count)
    return np.concatenate(list(_pool(count).map(lambda part: encoder.quantize(part, depth, importance), parts)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _feed_back_block(
    weights: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, code_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of a block of columns (64, rows), and their errors in units of the factor's diagonal."""
    rest = weights.clone()
    values, errors = torch.empty_like(rest), torch.empty_like(rest)
    columns = _by_column(rest, values, errors, scales, scales.reciprocal(), factor)
    divisors = factor.diagonal().tolist()
    for divisor, (now, value, error, scale, inverse_scale, row) in zip(divisors, columns, strict=True):
        torch.mul(now, inverse_scale, out=value).round_().clamp_(-code_max, code_max).mul_(scale)
        torch.sub(now, value, out=error).div_(divisor)
        rest.addr_(row, error, alpha=-1)  # nothing before this column: the factor is triangular
    return values, errors


def _descend(quantized: _Quantized, aims: torch.Tensor, columns: _Columns) -> None:
    """Coordinate descent on the error of the products, over the columns, a block at a time."""
    hessian = columns.hessian
    gradient = hessian @ (quantized.values - aims)
    for sweep in range(_SWEEPS):
        for block, own in enumerate(columns.blocks):
            part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            values, local = quantized.values[part].clone(), gradient[part].clone()
            _descend_block(values, local, own.hessian, quantized.scales[part], quantized.code_max)
            if sweep < _SCALE_SWEEPS:
                values = _with_better_scales(quantized, block, values, local, own)
            gradient.addmm_(hessian[:, part], values - quantized.values[part])
            quantized.values[part] = values


def _descend_block(
    values: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, code_max: int
) -> None:
    """Move each column in turn to the best multiple of its scale, given all others. Changes `values` and `gradient`."""
    columns = _by_column(values, gradient, scales, scales.reciprocal(), hessian)
    steps = hessian.diagonal().reciprocal().tolist()
    for step, (value, slope, scale, inverse_scale, row) in zip(steps, columns, strict=True):
        best = torch.sub(value, slope, alpha=step)
        best.mul_(inverse_scale).round_().clamp_(-code_max, code_max).mul_(scale)
        gradient.addr_(row, best - value)
        value.copy_(best)


def _by_column(*blocks: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of each column in turn, its views in tensors (64, ..): made at once, as to index one takes as long as to add."""
    return zip(*(block.unbind() for block in blocks), strict=True)


def _with_better_scales(
    quantized: _Quantized, block: int, values: torch.Tensor, gradient: torch.Tensor, own: _Block
) -> torch.Tensor:
    """Search the scales of a block again, given the rest of the row; a row takes them where its error gets less."""
    best = values - own.inverse @ gradient  # without rounding
    scales, indexes = _search_scales(best, own.factor, quantized.depth)
    others, _ = _feed_back_block(best, own.factor, scales, quantized.code_max)
    local = own.hessian @ (others - best)
    _descend_block(others, local, own.hessian, scales, quantized.code_max)

    better = ((others - best) * local).sum(dim=0) < ((values - best) * gradient).sum(dim=0)
    part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
    quantized.scales[part] = torch.where(better, scales, quantized.scales[part])
    chosen = better.cpu().numpy()
    quantized.indexes[block][chosen] = indexes[chosen]
    return torch.where(better, others, values)
