"""The `search` method: per block, the anchor, scale indexes and codes of least (weighted) squared error.

The twin of the search in ggml-trit.c: the same candidates in the same order, and sums in the same order, so
that both pick the same blocks. Vectorized over blocks with torch, which uses all cores.

All scales of a depth lie, up to the rounding of the ratios, on one lattice of sixth-octave steps: position p
stands for the scale 3^(2 - depth) * 2^(3 - (p - 13)/6). An anchor n puts group 0 at p = n + 13 and lets the
other groups take p = n + k. The parity trit ties the sum of their k modulo 3 to n.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tritconv.codec import Blocks
from tritconv.errors import NotFiniteError, RangeError
from tritconv.format import CODE_MAX, GROUP_SIZE, N_ANCHORS, N_GROUPS, N_SCALES, RATIO_ONE, anchor

_N_POS = N_ANCHORS + N_SCALES - 1
_POS_ANCHOR = 13  # position of the anchor n = 0
_POS_LAST = _POS_ANCHOR + N_ANCHORS - 1  # position of the last anchor

# A group whose weights all lie below half of F16's least subnormal is a group of zeros.
_ZERO = 2.0**-25

# How many positions below its clipping point a group's scale is searched: few levels gain from clipping the
# largest weights, many levels do not.
_SEARCH_DEPTH = {1: 10, 2: 6, 3: 5, 4: 4}

_ZERO_POSITION = _POS_ANCHOR + 39  # where a block of zeros goes: scale indexes 13, 13, 13, 13

_CHUNK = 2048  # blocks at a time: the working set stays in the cache


@dataclass(frozen=True)
class _Lattice:
    """The scales of a depth by position, float32 (107,), and their inverses."""

    scale: torch.Tensor
    inverse: torch.Tensor
    code_max: int
    search_depth: int

    @staticmethod
    def of(depth: int) -> "_Lattice":
        scale = anchor(depth, np.arange(_N_POS) - _POS_ANCHOR) * np.float32(RATIO_ONE)
        return _Lattice(
            torch.from_numpy(scale),
            torch.from_numpy(np.float32(1) / scale),
            CODE_MAX[depth],
            _SEARCH_DEPTH[depth],
        )

    def clipping_position(self, largest: torch.Tensor) -> torch.Tensor:
        """The position of the smallest scale that holds `largest` without clipping; -1 if there is none."""
        reach = (self.scale * self.code_max).flip(0)
        return _N_POS - 1 - torch.searchsorted(reach, largest)


def search(weights: np.ndarray, depth: int, importance: np.ndarray | None = None) -> Blocks:
    """Quantize blocks of weights.

    Args:
        weights: float32 (n, 64).
        depth: trits per weight, 1..4.
        importance: float32 (n, 64), the weight of each squared error; None counts all alike.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
        RangeError: a block lies above the codebook's range, or so far below it that its weights would vanish.
    """
    lattice = _Lattice.of(depth)
    first, last = _candidates(lattice, weights)
    # Blocks with as many candidates go together; the order of equals is kept, for reproducible results.
    order = np.argsort(last - first, kind="stable")

    scales = np.empty((len(weights), N_GROUPS), dtype=np.uint8)
    for start in range(0, len(order), _CHUNK):
        part = order[start : start + _CHUNK]
        x = _by_weight(weights[part])
        q = None if importance is None else _by_weight(importance[part])
        scales[part] = _search_scales(lattice, x, q, torch.from_numpy(first[part]), torch.from_numpy(last[part]))
    return Blocks(depth, _nearest_codes(weights, depth, scales), scales)


def _candidates(lattice: _Lattice, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and last position that is a candidate for the groups of a block, int64 (n,) each.

    From one position above the clipping point of the largest group to some below that of the smallest group:
    this includes every compromise between groups that do not reach each other's scales.
    """
    largest = np.abs(weights).reshape(-1, N_GROUPS, GROUP_SIZE).max(axis=2)
    if not np.isfinite(largest).all():
        raise NotFiniteError(int(np.flatnonzero(~np.isfinite(weights))[0]))

    def refuse(wrong: np.ndarray, bound: str) -> None:
        if wrong.any():
            block = int(np.flatnonzero(wrong)[0])
            raise RangeError(block, float(largest[block].max()), f"{bound} the range of the scale codebook")

    top = lattice.clipping_position(torch.from_numpy(largest)).numpy()
    refuse((top < [_POS_ANCHOR, 0, 0, 0]).any(axis=1), "above")

    zero = largest < _ZERO
    top_min = np.where(zero, _N_POS, top).min(axis=1)
    top_max = np.where(zero, -1, top).max(axis=1)
    empty = zero.all(axis=1)
    refuse((top_min > _POS_LAST) & ~empty, "below")

    first = np.where(empty, _ZERO_POSITION, np.maximum(top_min - 1, 0))
    last = np.maximum(np.minimum(top_max + lattice.search_depth, _N_POS - 1), _POS_ANCHOR)
    return first, np.where(empty, _ZERO_POSITION, last)


def _by_weight(blocks: np.ndarray) -> torch.Tensor:
    """(n, 64) -> (16, 4, n): sums over a group become sums of long vectors."""
    return torch.from_numpy(np.ascontiguousarray(blocks.reshape(-1, N_GROUPS, GROUP_SIZE).transpose(2, 1, 0)))


def _nearest_codes(weights: np.ndarray, depth: int, scales: np.ndarray) -> np.ndarray:
    """int8 (n, 64): the codes nearest to the weights, given scale indexes."""
    codes = np.empty(weights.shape, dtype=np.int8)
    scale = Blocks(depth, codes, scales).group_scales()
    grouped = weights.reshape(-1, N_GROUPS, GROUP_SIZE) / scale[:, :, None]
    np.rint(grouped, out=grouped)
    codes[:] = np.clip(grouped, -CODE_MAX[depth], CODE_MAX[depth]).reshape(codes.shape)
    return codes


def _group_errors(lattice: _Lattice, x: torch.Tensor, q: torch.Tensor | None, position: torch.Tensor) -> torch.Tensor:
    """(4, n): squared errors of the groups x (16, 4, n) at the scale positions (n,)."""
    e = x * lattice.inverse[position]
    e.clamp_(-lattice.code_max, lattice.code_max).round_().mul_(lattice.scale[position])
    torch.sub(x, e, out=e)
    e.mul_(e)
    if q is not None:
        e.mul_(q)
    for half in (8, 4, 2, 1):
        e[:half] += e[half : 2 * half]
    return e[0].clone()


def _search_scales(
    lattice: _Lattice, x: torch.Tensor, q: torch.Tensor | None, first: torch.Tensor, last: torch.Tensor
) -> np.ndarray:
    """uint8 (n, 4): the scale indexes of blocks x (16, 4, n) with candidates first..last, (n,) each.

    Of equal errors the first counts: in the order of the anchors, then of the classes of k_1 and k_2, then of k.
    """
    n_blocks = len(first)
    n_candidates = int((last - first).max()) + 1
    errors = torch.stack(
        [
            torch.where(first + j <= last, _group_errors(lattice, x, q, (first + j).clamp(max=_N_POS - 1)), torch.inf)
            for j in range(n_candidates)
        ]
    )

    best_error = torch.full((n_blocks,), torch.inf)
    best_k = torch.full((N_GROUPS, n_blocks), N_SCALES // 2)
    r1 = torch.arange(9)[:, None] // 3  # the classes modulo 3 of k_1 and k_2 in all combinations
    r2 = torch.arange(9)[:, None] % 3
    window: tuple[int, int] | None = None
    for j0 in range(n_candidates):
        n = first + j0 - _POS_ANCHOR
        allowed = (n >= 0) & (n < N_ANCHORS)
        k_first = _POS_ANCHOR - j0  # index k of candidate 0
        reach = (max(0, -k_first), min(n_candidates, N_SCALES - k_first))
        if reach != window:
            window = reach
            class_error, class_j = _best_of_classes(errors[:, 1:], *reach)
        # class_error[c] holds candidates j = c mod 3, whose k are of class r = (k_first + c) mod 3
        c1 = (r1 - k_first) % 3
        c2 = (r2 - k_first) % 3
        c3 = (n - r1 - r2 - k_first) % 3
        combined = errors[j0, 0] + class_error[c1[:, 0], 0] + class_error[c2[:, 0], 1] + class_error[:, 2].gather(0, c3)
        least = combined.amin(dim=0)
        which = torch.where(combined == least, torch.arange(9)[:, None], 9).amin(dim=0, keepdim=True)
        better = allowed & (least < best_error)
        best_error = torch.where(better, least, best_error)
        k = [n // 3] + [
            k_first + class_j[:, g].gather(0, c.expand(9, n_blocks).gather(0, which % 9))[0]
            for g, c in enumerate((c1, c2, c3))
        ]
        best_k = torch.where(better, torch.stack(k), best_k)
    return best_k.T.numpy().astype(np.uint8)


def _best_of_classes(errors: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least error, and its first candidate, among the candidates start..stop-1 of each class modulo 3.

    Args:
        errors: (candidates, 3 groups, n).

    Returns:
        (3 classes, 3 groups, n) each.
    """
    error = torch.full((3, *errors.shape[1:]), torch.inf)
    candidate = torch.zeros(error.shape, dtype=torch.int64)
    for j in range(start, stop):
        better = errors[j] < error[j % 3]
        error[j % 3] = torch.where(better, errors[j], error[j % 3])
        candidate[j % 3] = torch.where(better, j, candidate[j % 3])
    return error, candidate
