"""The `gptq` method: least error of a matrix's products with the calibration text, by second-order error feedback.

Columns are quantized in turn, and the error of each goes into those that follow, by the inverse Hessian (Frantar et
al., GPTQ, 2023, arXiv:2210.17323). What is quantized is not the matrix itself but the one whose products, with the
inputs that the quantized model really has, come nearest to the full-precision model's (as in GPTAQ, Li et al., 2025,
arXiv:2504.02692). Anchor and scales of a block are chosen when its turn comes, for its weights as they are then. At the
end, coordinate descent goes over codes and scales again, given the rest of the row.

Matrices are transposed here, (n, rows): the rows of a step lie together.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tritconv.calibration.moments import Moments
from tritconv.codec import Blocks, unpack
from tritconv.errors import TritError
from tritconv.format import BLOCK_SIZE, BYTES_PER_BLOCK, CODE_MAX, GROUP_SIZE
from tritconv.methods import search

VERSION = 2  # of what this makes: what an older one kept is not taken for this one's

# The damping shrinks the correlations of the inputs: it is so many times the Hessian's own diagonal, added to it. The
# fewer tokens there are for each column, the less the Hessian of this text says about other texts; and however many
# there are, other texts are other texts. docs/quality.md has the measurement.
_DAMPING = 0.2
_DAMPING_OF_FEW = 3.0  # times columns over tokens
_MOST_DAMPING = 1.0
_FLOOR = 0.01  # of the damping, for columns without inputs: times the mean of the diagonal
_MOST_OFFSET = 0.499  # a code further away than half would be another code
_INVERTIBLE = 1e3  # more is never needed
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


def quantize(weights: torch.Tensor, depth: int, moments: Moments) -> Rounded:
    """Quantize a matrix.

    Args:
        weights: float32 (rows, n), n a multiple of 64, on any device.
        depth: trits per weight, 1..4.
        moments: of the matrix's inputs.

    Raises:
        RangeError: a block lies outside the range of the scale codebook.
    """
    hessian, inverse = _damped(moments)
    target = weights.T.contiguous()
    if moments.pull is not None:
        target = target + (inverse @ moments.pull.double()).float()
    quantized = _feed_back(target, inverse, depth)
    _descend(quantized, target, hessian)
    return Rounded(quantized.blocks(), quantized.offset(target, hessian))


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

    def blocks(self) -> Blocks:
        """The blocks, row by row."""
        codes = (self.values / self.scales).round_().T.to(torch.int8).cpu().numpy()
        scales = self.indexes.transpose(1, 0, 2).reshape(-1, 4)
        return Blocks(self.depth, codes.reshape(-1, BLOCK_SIZE), np.ascontiguousarray(scales))

    def offset(self, target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        """float32 (rows, n): as `Rounded` has it."""
        gradient = hessian @ (self.values - target)
        off = gradient.div_(hessian.diagonal()[:, None]).div_(self.scales).neg_()
        return off.clamp_(-_MOST_OFFSET, _MOST_OFFSET).T.contiguous()


def _damped(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hessian, float32, and its inverse, float64; damped until it is invertible."""
    n = len(moments.hessian)
    damping = min(_DAMPING + _DAMPING_OF_FEW * n / max(moments.n_tokens, 1), _MOST_DAMPING)
    diagonal = moments.hessian.diagonal().double()
    diagonal = diagonal + _FLOOR * diagonal.mean().clamp(min=1e-20)
    while damping < _INVERTIBLE:
        damped = moments.hessian.double()
        damped.diagonal().add_(damping * diagonal)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            if inverse.isfinite().all():
                return damped.float(), inverse
        damping *= 10
    raise TritError("the model's activations on the calibration text are not finite")


def _upper(inverse: torch.Tensor) -> torch.Tensor:
    """float32: the upper Cholesky factor of an inverse Hessian: row j has how the error of column j goes on."""
    return torch.linalg.cholesky(inverse, upper=True).float()


def _feed_back(target: torch.Tensor, inverse: torch.Tensor, depth: int) -> _Quantized:
    quantized = _Quantized(target, depth)
    factor = _upper(inverse)
    rest = target.clone()
    for block in range(len(target) // BLOCK_SIZE):
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
    data = search.quantize(weights.T.cpu().numpy(), depth, importance.cpu().numpy())
    blocks = unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth]))
    scales = torch.from_numpy(blocks.group_scales()).to(weights.device)
    return scales.T.repeat_interleave(GROUP_SIZE, dim=0).contiguous(), blocks.scales


def _feed_back_block(
    weights: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, code_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of a block of columns (64, rows), and their errors in units of the factor's diagonal."""
    rest = weights.clone()
    values, errors = torch.empty_like(rest), torch.empty_like(rest)
    inverse_scales = scales.reciprocal()
    for j, divisor in enumerate(factor.diagonal().tolist()):
        values[j] = (rest[j] * inverse_scales[j]).round_().clamp_(-code_max, code_max).mul_(scales[j])
        errors[j] = (rest[j] - values[j]).div_(divisor)
        rest[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return values, errors


def _descend(quantized: _Quantized, target: torch.Tensor, hessian: torch.Tensor) -> None:
    """Coordinate descent on the error of the products, over the columns, a block at a time."""
    gradient = hessian @ (quantized.values - target)
    for sweep in range(_SWEEPS):
        for block in range(len(target) // BLOCK_SIZE):
            part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            own = hessian[part, part]
            values, local = quantized.values[part].clone(), gradient[part].clone()
            _descend_block(values, local, own, quantized.scales[part], quantized.code_max)
            if sweep < _SCALE_SWEEPS:
                values = _with_better_scales(quantized, block, values, local, own)
            gradient.addmm_(hessian[:, part], values - quantized.values[part])
            quantized.values[part] = values


def _descend_block(
    values: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, code_max: int
) -> None:
    """Move each column in turn to the best multiple of its scale, given all others. Changes `values` and `gradient`."""
    inverse_scales = scales.reciprocal()
    for j, curvature in enumerate(hessian.diagonal().tolist()):
        best = values[j].sub(gradient[j], alpha=1 / curvature)
        best = best.mul_(inverse_scales[j]).round_().clamp_(-code_max, code_max).mul_(scales[j])
        gradient.addr_(hessian[j], best - values[j])
        values[j] = best


def _with_better_scales(
    quantized: _Quantized, block: int, values: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Search the scales of a block again, given the rest of the row; a row takes them where its error gets less."""
    inverse = torch.linalg.inv(hessian.double())
    best = values - inverse.float() @ gradient  # without rounding
    factor = _upper(inverse)
    scales, indexes = _search_scales(best, factor, quantized.depth)
    others, _ = _feed_back_block(best, factor, scales, quantized.code_max)
    local = hessian @ (others - best)
    _descend_block(others, local, hessian, scales, quantized.code_max)

    better = ((others - best) * local).sum(dim=0) < ((values - best) * gradient).sum(dim=0)
    part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
    quantized.scales[part] = torch.where(better, scales, quantized.scales[part])
    chosen = better.cpu().numpy()
    quantized.indexes[block][chosen] = indexes[chosen]
    return torch.where(better, others, values)
