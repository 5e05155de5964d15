"""Codes with scales of any size, as blocks: the codes are kept, the scales become the nearest representable ones.

Only blocks below the codebook's range get other codes: the search's, for the weights that the codes stand for.

Position p on the lattice of sixth-octave steps is the scale 3^(2 - depth) * 2^(3 - (p - 13)/6). An anchor n puts
group 0 at p = n + 13 and lets the other groups take p = n + k; the parity trit ties the sum of their k modulo 3 to n.
"""

import itertools

import numpy as np

from tritcore import encoder
from tritcore.codec import Blocks, unpack
from tritcore.errors import RangeError
from tritcore.format import (
    BLOCK_SIZE,
    BYTES_PER_BLOCK,
    CODE_MAX,
    GROUP_SIZE,
    N_ANCHORS,
    N_GROUPS,
    N_SCALES,
    RATIO,
    RATIO_ONE,
    anchor,
)

_POS_ANCHOR = 13  # position of the anchor n = 0
_N_POS = N_ANCHORS + N_SCALES - 1
_MIDDLE = N_SCALES // 2  # the scale index of a group that has none, as the search writes it
_BEYOND = 2 ** (1 / 12)  # half a step: what lies farther out than that is out of range


def nearest_scales(depth: int, codes: np.ndarray, scales: np.ndarray) -> Blocks:
    """Blocks with the codes given, and of all representable scales those of least squared error of each block.

    A block below the range, all of whose scales are, gets the codes and scales that the search finds.

    Args:
        depth: trits per weight, 1..4.
        codes: int8 (n, 64).
        scales: float32 (n, 4), a positive scale for each group that has a code other than 0.

    Raises:
        RangeError: a scale lies above all that can be stored.
    """
    codes = codes.copy()
    energy = (codes.reshape(-1, N_GROUPS, GROUP_SIZE).astype(np.float32) ** 2).sum(axis=2)
    used = energy > 0
    lattice = anchor(depth, np.arange(_N_POS) - _POS_ANCHOR) * np.float32(RATIO_ONE)
    _check_range(lattice, scales, used, CODE_MAX[depth])

    indexes = np.full(scales.shape, _MIDDLE, dtype=np.uint8)
    within = (used & (scales >= lattice[_POS_ANCHOR + N_ANCHORS - 1] / _BEYOND)).any(axis=1)
    below = np.flatnonzero(used.any(axis=1) & ~within)
    if len(below):
        weights = codes[below] * np.repeat(scales[below], GROUP_SIZE, axis=1)
        alike = np.ones(BLOCK_SIZE, dtype=np.float32)
        found = unpack(depth, encoder.quantize(weights, depth, alike).reshape(-1, BYTES_PER_BLOCK[depth]))
        codes[below], indexes[below] = found.codes, found.scales

    some = np.flatnonzero(within)  # the other blocks are zeros
    energy, used = energy[some], used[some]
    scales = np.where(used, scales[some], 1).astype(np.float32)
    position = _nearest_positions(lattice, scales)

    # Candidates for the place of group 0: from two steps above the largest scale of a block to two below the smallest.
    nearest = np.take_along_axis(
        position, np.abs(np.log(lattice[position] / scales[:, :, None])).argmin(2)[:, :, None], 2
    )
    nearest = nearest[:, :, 0]
    least, most = _POS_ANCHOR, _POS_ANCHOR + N_ANCHORS - 1
    first = np.clip(np.where(used, nearest, _N_POS).min(axis=1) - 2, least, most)
    last = np.clip(np.where(used, nearest, -1).max(axis=1) + 2, least, most)

    best_error = np.full(len(some), np.inf, dtype=np.float32)
    for step in range(int((last - first).max(initial=-1)) + 1):
        part = np.flatnonzero(first + step <= last)
        n = (first + step)[part] - _POS_ANCHOR
        error, k = _best_indexes(depth, n, energy[part], scales[part], position[part])
        better = error < best_error[part]
        part = part[better]
        best_error[part] = error[better]
        indexes[some[part]] = k[better]
    return Blocks(depth, codes, indexes)


def _check_range(lattice: np.ndarray, scales: np.ndarray, used: np.ndarray, code_max: int) -> None:
    greatest = np.full(N_GROUPS, lattice[0] * _BEYOND)
    greatest[0] = lattice[_POS_ANCHOR] * _BEYOND
    above = np.flatnonzero((used & (scales > greatest)).any(axis=1))
    if len(above):
        block = int(above[0])
        largest = float(np.where(used, scales, 0)[block].max()) * code_max
        raise RangeError(block, largest, "above the range of the scale codebook")


def _nearest_positions(lattice: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int64 (n, 4, 3): for each scale and each class c of positions modulo 3 the position whose scale is nearest."""
    c = np.arange(3)
    # the last position whose scale is not below
    at = len(lattice) - 1 - np.searchsorted(lattice[::-1], scales, side="left")
    at = np.minimum(at, len(lattice) - 1)[:, :, None]
    upper = at - (at - c) % 3
    lower = upper + 3
    last = len(lattice) - 1 - (len(lattice) - 1 - c) % 3
    upper, lower = np.clip(upper, c, last), np.clip(lower, c, last)
    wanted = scales[:, :, None]
    return np.where(np.abs(lattice[upper] - wanted) <= np.abs(lattice[lower] - wanted), upper, lower)


def _best_indexes(
    depth: int, n: np.ndarray, energy: np.ndarray, scales: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The least error of blocks at the anchors n (blocks,), and the scale indexes uint8 (blocks, 4) that have it."""
    a = anchor(depth, n)
    r = np.arange(3)
    # index k = r mod 3 of the groups 1 to 3 that is nearest to the wanted scale: k = p - n, at most 26
    of_class = np.take_along_axis(position[:, 1:], ((n[:, None] + r) % 3)[:, None, :].repeat(3, axis=1), axis=2)
    k = np.clip(of_class - n[:, None, None], r, r + N_SCALES - 3)
    lost = a[:, None, None] * RATIO[k] - scales[:, 1:, None]
    error = energy[:, 1:, None] * lost * lost
    lost = a * np.float32(RATIO_ONE) - scales[:, 0]
    error_0 = energy[:, 0] * lost * lost

    best = np.full(len(n), np.inf, dtype=np.float32)
    indexes = np.empty((len(n), N_GROUPS), dtype=np.uint8)
    indexes[:, 0] = n // 3
    every = np.arange(len(n))
    for r1, r2 in itertools.product(range(3), repeat=2):
        r3 = (n - r1 - r2) % 3
        total = error_0 + error[:, 0, r1] + error[:, 1, r2] + error[every, 2, r3]
        better = np.flatnonzero(total < best)
        best[better] = total[better]
        indexes[better, 1] = k[better, 0, r1]
        indexes[better, 2] = k[better, 1, r2]
        indexes[better, 3] = k[better, 2, r3[better]]
    return best, indexes


def blocks_of_rows(depth: int, codes: np.ndarray, scales: np.ndarray) -> Blocks:
    """`nearest_scales` of the rows of a matrix: codes int8 (rows, n), scales float32 (rows, n / 16)."""
    return nearest_scales(depth, codes.reshape(-1, BLOCK_SIZE), scales.reshape(-1, N_GROUPS))
