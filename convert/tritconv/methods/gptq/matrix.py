"""Least error of a matrix's products with the calibration text, by second-order error feedback.

Columns are quantized in turn, and the error of each is fed back into those that follow, by the factor of the Hessian
(Frantar et al., GPTQ, 2023, arXiv:2210.17323, in the form of LDLQ, Chee et al., QuIP, 2023, arXiv:2307.13304). The
matrix that is quantized is the one whose products, with the inputs of the quantized model, come nearest to those of the
full-precision model (as in GPTAQ, Li et al., 2025, arXiv:2504.02692). Anchor and scales of a block are chosen when its
turn comes, for its weights with the feedback of the columns before. At the end, coordinate descent goes over codes and
scales again, given the rest of the row.

Rows are quantized in eight steps. The errors of a step are fed back into the rows of the later steps in the same way,
by the moments of the gradients for the outputs: the loss is taken for a Kronecker product of the two (Martens and
Grosse, K-FAC, 2015, arXiv:1503.05671). Then each step is descended once more, given the errors of all other rows.

With H = L D LT, L unit upper triangular, column j aims at its weight plus the sum of L[i, j] times the error of column
i, over the columns i before. Blocks of columns take the same form with the blocks of L. Matrices are transposed here,
(n, rows): the rows of a step lie together.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tritconv.calibration.moments import Moments
from tritconv.calibration.ranks import ALONE, Ranks
from tritconv.methods.gptq.columns import Block, ColumnLoop
from tritcore.codec import Blocks
from tritcore.errors import NotFiniteError, RangeError, TritError
from tritcore.format import BLOCK_SIZE, GROUP_SIZE, N_GROUPS

# The damping shrinks the correlations of the inputs: it is this multiple of the Hessian's own diagonal, added to it.
# The fewer tokens there are for each column, the less the Hessian of this text says about other texts. Some damping
# stays however many tokens there are, as calibration and evaluation text differ. docs/concepts/quality.md measures it.
_DAMPING = 0.2
_DAMPING_OF_FEW = 3.0  # times columns over tokens
_MOST_DAMPING = 1.0
_FLOOR = 0.01  # of the damping, for columns without inputs: times the mean of the diagonal
_MOST_OFFSET = 0.499  # a code further away than half would be another code
_INVERTIBLE = 1e3  # the damping at which to give up
_TURNED = 1 << 24  # values of a Hessian that are turned or looked at in one step
_EXACT = 4096  # columns up to which factors are computed in float64
# Gradients are noisier than inputs, and few tokens are looked at: the correlations of outputs are halved.
_OUTPUT_DAMPING = 1.0
_MOST_STEPS = 8  # that the rows are quantized in
_LEAST_ROWS = 128  # in a step: fewer would wait for Python
_SWEEPS = 3  # of the closing coordinate descent
_SCALE_SWEEPS = 2  # the first sweeps, which choose other scales too


@dataclass(frozen=True)
class Rounded:
    """A quantized matrix.

    Attributes:
        blocks: of all rows.
        offset: float32 (rows, n), the distance of the best place of each weight from its code, given all others: less
            than half a code. None unless asked for.
    """

    blocks: Blocks
    offset: torch.Tensor | None


class Solver:
    """Quantizes matrices that have the same inputs."""

    def __init__(self, moments: Moments, product_type: torch.dtype, loop: ColumnLoop, ranks: Ranks = ALONE) -> None:
        """Factor the Hessian. `moments` is used up.

        Args:
            moments: of the inputs, finished.
            product_type: the type of the large products.
            loop: quantizes the columns of a block.
            ranks: each process quantizes a share of the rows.
        """
        self._ranks = ranks
        self._moments = moments
        self._product_type = product_type
        self._loop = loop
        n = len(moments.hessian)
        few = _DAMPING_OF_FEW * n / max(moments.n_tokens, 1)
        self._factor, self._damped_by = _damp(moments.hessian, min(_DAMPING + few, _MOST_DAMPING))
        self._columns: _Columns | None = None

    def aims(self, weights: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """The weights whose products come nearest to those of the full-precision model. Before the first `quantize`.

        Args:
            weights: float32 (rows, n).
            target: float32 (n, rows), the part of the moments' targets that belongs to these rows.

        Returns:
            float32 (n, rows).
        """
        aims = weights.T.contiguous()
        if target is not None:  # ridge regression, towards the weights
            return self._solve(target + self._damped_by[:, None] * aims)
        drift = self._moments.drift
        if drift is None:
            return aims
        if len(weights) > len(aims):
            return aims.addmm_(self._solve(drift), aims.clone())
        return aims.add_(self._solve(drift @ aims))

    def quantize(
        self, aims: torch.Tensor, depth: int, outputs: Sequence[torch.Tensor] = (), with_offset: bool = False
    ) -> Rounded:
        """Quantize a matrix, or several, one beside the other.

        Args:
            aims: float32 (n, rows), n a multiple of 64. It is used up.
            depth: trits per weight, 1..4.
            outputs: diagonal blocks, float32 (some rows, the same rows), of the sums of g gT, g the gradients of the
                loss for the outputs. Together they are for all rows; without them, rows are independent.

        Raises:
            RangeError: a block lies above the range of the scale codebook, once it has taken the errors of others.
            NotFiniteError: these errors have grown without bound.
        """
        if self._columns is None:
            self._columns = _Columns(self._moments.hessian, self._factor, self._product_type)
            del self._factor
            self._moments.drift = None
        n, n_rows = aims.shape
        codes = np.empty((n_rows, n), dtype=np.int8)
        indexes = np.empty((n_rows, n // BLOCK_SIZE, N_GROUPS), dtype=np.uint8)
        offset = torch.empty(n_rows, n) if with_offset else None
        order = _RowOrder(n_rows, outputs)
        rounds = (False, True) if order.has_feedback else (False,)
        for again, (step, rows) in itertools.product(rounds, enumerate(order.steps)):
            at = rows.numpy()
            if again:
                aims[:, rows] += _values(depth, codes[at], indexes[at]).to(aims.device)
            wanted = aims[:, rows] + (order.given_others if again else order.given_former)(step, aims)
            mine = self._ranks.rows_of(torch.arange(len(rows))).numpy()
            quantized = _Quantized(wanted[:, mine], depth, self._columns, self._loop)
            problem = None
            try:
                if again:
                    quantized.start_at(codes[at[mine]], indexes[at[mine]])
                else:
                    quantized.feed_back()
                quantized.descend()
            except (RangeError, NotFiniteError) as error:
                problem = error
            if self._ranks.total(problem is not None):  # the other processes stop here too
                raise problem or RangeError(0, 0.0, "above the range of the scale codebook, in another process")
            if offset is not None:
                offset[rows] = self._ranks.gather_rows(quantized.offset().cpu(), rows)
            found = self._ranks.gather_rows(torch.from_numpy(quantized.packed()), rows).numpy()
            codes[at], indexes[at] = found[:, :n].view(np.int8), found[:, n:].reshape(len(rows), -1, N_GROUPS)
            # the errors, for other rows
            aims[:, rows] -= _values(depth, codes[at], indexes[at]).to(aims.device)
        return Rounded(_blocks(depth, codes, indexes), offset)

    def _solve(self, right: torch.Tensor) -> torch.Tensor:
        """The damped Hessian's inverse times float32 (n, m)."""
        factor = self._factor
        found = torch.linalg.solve_triangular(factor, right.to(factor.dtype), upper=True)
        return torch.linalg.solve_triangular(factor.T, found, upper=False).float()


def _blocks(depth: int, codes: np.ndarray, indexes: np.ndarray) -> Blocks:
    """Of codes int8 (rows, n) and scale indexes uint8 (rows, n / 64, 4)."""
    return Blocks(depth, codes.reshape(-1, BLOCK_SIZE), indexes.reshape(-1, N_GROUPS))


def _values(depth: int, codes: np.ndarray, indexes: np.ndarray) -> torch.Tensor:
    """float32 (n, rows): what codes int8 (rows, n) stand for."""
    return torch.from_numpy(_blocks(depth, codes, indexes).decode()).view(codes.shape).T


class _Columns:
    """The damped Hessian of a matrix's inputs, for the column loop.

    Attributes:
        hessian: (n, n), in the type of the products.
        feedback: the same, block upper triangular: the blocks of L.
        given_former: each block of 64 columns, given the blocks before.
        given_others: each block of 64 columns, given all other blocks.
    """

    def __init__(self, hessian: torch.Tensor, factor: torch.Tensor, product_type: torch.dtype) -> None:
        """Prepare.

        Args:
            hessian: float32 (n, n), damped.
            factor: (n, n), R upper triangular with H = R RT. It is used up.
        """
        parts = [slice(start, start + BLOCK_SIZE) for start in range(0, len(hessian), BLOCK_SIZE)]
        own_factors = torch.stack([factor[part, part] for part in parts]).double()
        own_hessians = torch.stack([hessian[part, part] for part in parts]).double()
        inverses = torch.linalg.inv(own_factors)
        for part, inverse in zip(parts, inverses, strict=True):
            factor[: part.start, part] = factor[: part.start, part] @ inverse.to(factor.dtype)
        self.feedback = factor.to(product_type)
        self.hessian = hessian.to(product_type)
        self.given_former = [Block(own @ own.T, own) for own in own_factors]
        self.given_others = [Block(own, _upper_factor(own.clone())) for own in own_hessians]
        self.parts = parts


class _Quantized:
    """Rows of a matrix with codes and scales.

    Attributes:
        values: float32 (n, rows), scale times code.
        scales: float32 (n / 16, rows).
        indexes: uint8 (n / 64, rows, 4), the scale indexes of each block.
    """

    def __init__(self, aims: torch.Tensor, depth: int, columns: _Columns, loop: ColumnLoop) -> None:
        n, rows = aims.shape
        self._aims = aims
        self._depth = depth
        self._columns = columns
        self._loop = loop
        self._errors = torch.zeros(n, rows, dtype=columns.feedback.dtype, device=aims.device)
        self.values = torch.empty_like(aims)
        self.scales = aims.new_empty(n // GROUP_SIZE, rows)
        self.indexes = np.empty((n // BLOCK_SIZE, rows, N_GROUPS), dtype=np.uint8)

    def start_at(self, codes: np.ndarray, indexes: np.ndarray) -> None:
        """Take codes int8 (rows, n) and scale indexes uint8 (rows, n / 64, 4)."""
        scales = _blocks(self._depth, codes, indexes).group_scales()
        self.scales.copy_(torch.from_numpy(scales).view(len(codes), -1).T)
        self.indexes[:] = indexes.transpose(1, 0, 2)
        self.values.copy_(_values(self._depth, codes, indexes))
        self._set_errors(slice(None))

    def feed_back(self) -> None:
        """Quantize block after block, each with the errors of those before."""
        for number, part in enumerate(self._columns.parts):
            aims = self._aims[part]
            if number:
                aims = aims + (self._columns.feedback[: part.start, part].T @ self._errors[: part.start]).float()
            self._loop.quantize(
                self._depth,
                self._columns.given_former[number],
                aims,
                self.values[part],
                self._scales_of(number),
                self.indexes[number],
            )
            self._set_errors(part)

    def descend(self) -> None:
        """Coordinate descent on the error of the products, a block at a time."""
        for sweep in range(_SWEEPS):
            for number, part in enumerate(self._columns.parts):
                self._loop.descend(
                    self._depth,
                    self._columns.given_others[number],
                    self._gradient(part),
                    self.values[part],
                    self._scales_of(number),
                    self.indexes[number],
                    with_scales=sweep < _SCALE_SWEEPS,
                )
                self._set_errors(part)

    def packed(self) -> np.ndarray:
        """uint8 (rows, n + n / 16): the codes of each row, and the scale indexes of its blocks."""
        scales = self.scales.repeat_interleave(GROUP_SIZE, dim=0)
        codes = (self.values / scales).round_().T.to(torch.int8).cpu().numpy()
        return np.concatenate([codes.view(np.uint8), self.indexes.transpose(1, 0, 2).reshape(len(codes), -1)], axis=1)

    def offset(self) -> torch.Tensor:
        """float32 (rows, n): as `Rounded` has it."""
        off = self._gradient(slice(None)).div_(self._columns.hessian.diagonal().float()[:, None])
        off = off.div_(self.scales.repeat_interleave(GROUP_SIZE, dim=0)).neg_()
        return off.clamp_(-_MOST_OFFSET, _MOST_OFFSET).T

    def _gradient(self, part: slice) -> torch.Tensor:
        """float32 (some columns, rows): half the gradient of the squared error of the products."""
        return (self._columns.hessian[part] @ self._errors).float().neg_()

    def _set_errors(self, part: slice) -> None:
        self._errors[part] = self._aims[part] - self.values[part]

    def _scales_of(self, number: int) -> torch.Tensor:
        return self.scales[number * N_GROUPS : (number + 1) * N_GROUPS]


class _RowOrder:
    """The steps in which rows are quantized, and the feedback from each to the others.

    Attributes:
        steps: the numbers of the rows of each step, those of all diagonal blocks.
        has_feedback: whether the errors of one step matter to another one.
    """

    def __init__(self, n_rows: int, outputs: Sequence[torch.Tensor]) -> None:
        """Plan. Args: as for `Solver.quantize`."""
        count = min(max(n_rows // _LEAST_ROWS, 1), _MOST_STEPS)
        firsts = itertools.accumulate(map(len, outputs), initial=0)
        self._feedbacks = [_RowFeedback(first, output, count) for first, output in zip(firsts, outputs, strict=False)]
        shares = zip(*(feedback.steps for feedback in self._feedbacks), strict=True)
        self.steps = [torch.cat(share) for share in shares] or list(torch.arange(n_rows).tensor_split(count))
        self.has_feedback = bool(self._feedbacks) and count > 1

    def given_former(self, step: int, errors: torch.Tensor) -> torch.Tensor | float:
        """What the errors (n, all rows) of former steps add to the aims of a step: float32 (n, rows of the step)."""
        if not step or not self.has_feedback:
            return 0.0
        return torch.cat([feedback.given_former(step, errors) for feedback in self._feedbacks], dim=1)

    def given_others(self, step: int, errors: torch.Tensor) -> torch.Tensor:
        """The same, of all other steps."""
        return torch.cat([feedback.given_others(step, errors) for feedback in self._feedbacks], dim=1)


class _RowFeedback:
    """The feedback from the errors of some rows to others among them.

    Attributes:
        steps: the numbers of the rows of each step. They are spread over the rows: neighbours are often alike, and
            should make up for each other.
    """

    def __init__(self, first: int, output: torch.Tensor, count: int) -> None:
        """Prepare.

        Args:
            first: the number of the first row.
            output: a diagonal block, as for `Solver.quantize`. It is damped.
            count: of steps.
        """
        self._shares = [torch.arange(len(output))[step::count] for step in range(count)]
        order = torch.cat(self._shares)
        factor, damped_by = _damp(output[order][:, order], _OUTPUT_DAMPING)
        output.diagonal()[order] += damped_by
        self._output = output
        self._first = first
        self.steps = [first + share for share in self._shares]
        self._feedback = list(self._of_steps(factor))

    def given_former(self, step: int, errors: torch.Tensor) -> torch.Tensor:
        """As `_RowOrder` has it."""
        return errors[:, torch.cat(self.steps[:step])] @ self._feedback[step]

    def given_others(self, step: int, errors: torch.Tensor) -> torch.Tensor:
        """As `_RowOrder` has it."""
        own = self._shares[step]
        others = torch.cat([*self._shares[:step], *self._shares[step + 1 :]])
        feedback = torch.linalg.solve(self._output[own][:, own], self._output[own][:, others])
        return errors[:, self._first + others] @ feedback.T

    def _of_steps(self, factor: torch.Tensor) -> Iterator[torch.Tensor]:
        start = 0
        for rows in self.steps:
            stop = start + len(rows)
            own = factor[start:stop, start:stop]
            yield torch.linalg.solve_triangular(own, factor[:start, start:stop], upper=True, left=False).float()
            start = stop


def _damp(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Damp a Hessian in place until it can be factored.

    Returns:
        R upper triangular (n, n) with H = R RT, float64 up to `_EXACT` columns, else float32; and the addition to the
        diagonal, float32 (n,).
    """
    diagonal = hessian.diagonal().clone()
    unit = diagonal + _FLOOR * diagonal.mean().clamp(min=1e-20)
    while damping < _INVERTIBLE:
        hessian.diagonal().copy_(diagonal + damping * unit)
        factor = _upper_factor(hessian.double() if len(hessian) <= _EXACT else hessian.clone())
        if _is_finite(factor) and (factor.diagonal() > 0).all():
            return factor, damping * unit
        damping *= 10
    raise TritError("the model's activations or gradients on the calibration text are not finite")


def _is_finite(matrix: torch.Tensor) -> bool:
    """Whether all values of (n, n) are: some rows at a time, as `isfinite` needs more memory than they do."""
    return all(bool(rows.isfinite().all()) for rows in matrix.split(max(1, _TURNED // len(matrix))))


def _upper_factor(matrix: torch.Tensor) -> torch.Tensor:
    """R upper triangular with matrix = R RT, NaN where there is none: the Cholesky factor from the last row up.

    Args:
        matrix: (n, n), symmetric. It is used up: the factor takes its memory.
    """
    _turn(matrix)
    factor, failed = matrix.T, torch.empty((), dtype=torch.int32, device=matrix.device)  # in LAPACK's order
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    _turn(matrix)
    return factor.fill_(torch.nan) if failed else factor


def _turn(matrix: torch.Tensor) -> None:
    """Reverse the order of rows and columns of (n, n), in place."""
    n = len(matrix)
    step = max(1, _TURNED // n)
    for first in range(0, n // 2, step):
        last = min(first + step, n // 2)
        upper = matrix[first:last].flip(0, 1)
        matrix[first:last] = matrix[n - last : n - first].flip(0, 1)
        matrix[n - last : n - first] = upper
    if n % 2:
        matrix[n // 2] = matrix[n // 2].flip(0)
