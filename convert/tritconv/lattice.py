"""Recognises weights that already lie on a lattice of trits, as in the dequantized checkpoints of the 2026 codec.

In such a matrix each group of 16 weights is a scale times codes of few levels, rounded to a float type, and there are
at most 27 scales.
"""

import math
from dataclasses import dataclass

import numpy as np

from tritconv.workers import Chunk, Workers
from tritcore.format import CODE_MAX, DEPTHS, GROUP_SIZE, N_SCALES

_SAMPLE_GROUPS = 1024
_LEAST_NORMAL = 2.0**-14  # of float16: what is below has fewer digits


@dataclass(frozen=True)
class Lattice:
    """A matrix on a lattice.

    codes: int8 (rows, n).
    scales: float32 (rows, n / 16), 0 for a group of zeros.
    """

    codes: np.ndarray
    scales: np.ndarray


def lattice_depth(matrix: np.ndarray) -> int | None:
    """The depth of the lattice that a matrix lies on, as far as a sample of its rows tells; None if it is on none.

    Args:
        matrix: float16 or float32 (rows, n), n a multiple of 16.
    """
    sample = _sample(matrix)
    rounding = _rounding(sample)
    groups = _magnitudes(sample)
    readings = _read(groups, CODE_MAX[max(DEPTHS)], rounding)
    simplest = readings.where(readings.simplest())
    if not len(simplest.group) or len(simplest.group) < _n_used(groups):
        return None
    largest = simplest.top_code.max()
    depth = next(depth for depth in DEPTHS if CODE_MAX[depth] >= largest)
    fitting = readings.where(readings.top_code <= CODE_MAX[depth])
    return depth if _choose(fitting, rounding) is not None else None


def read_lattice(matrix: np.ndarray, depth: int, workers: Workers) -> Lattice | None:
    """A matrix as codes and scales; None if it does not lie on a lattice of that depth."""
    rounding = _rounding(_sample(matrix))

    def read(chunk: Chunk) -> _Readings | None:
        groups = _magnitudes(chunk.rows)
        readings = _read(groups, CODE_MAX[depth], rounding)
        if len(readings.where(readings.simplest()).group) < _n_used(groups):
            return None
        first_group = chunk.first * chunk.rows.shape[1] // GROUP_SIZE
        return _Readings(readings.group + first_group, readings.top_code, readings.scale)

    parts = workers.map(read, matrix)
    if any(part is None for part in parts):
        return None
    chosen = _choose(_Readings.joined([part for part in parts if part is not None]), rounding)
    if chosen is None:
        return None
    top_codes = np.zeros((len(matrix), matrix.shape[1] // GROUP_SIZE))
    top_codes.ravel()[chosen.group] = chosen.top_code

    lattices = workers.map(lambda chunk: _with_top_codes(chunk.rows, top_codes[chunk.place]), matrix)
    return Lattice(np.concatenate([x.codes for x in lattices]), np.concatenate([x.scales for x in lattices]))


@dataclass(frozen=True)
class _Readings:
    """Ways to read groups as scale times codes: the largest magnitude in group `group` has the code `top_code`.

    group, top_code: int64 (readings,), ordered by group, then by top_code.
    scale: float64 (readings,).
    """

    group: np.ndarray
    top_code: np.ndarray
    scale: np.ndarray

    @staticmethod
    def joined(parts: "list[_Readings]") -> "_Readings":
        return _Readings(
            np.concatenate([part.group for part in parts]),
            np.concatenate([part.top_code for part in parts]),
            np.concatenate([part.scale for part in parts]),
        )

    def where(self, which: np.ndarray) -> "_Readings":
        return _Readings(self.group[which], self.top_code[which], self.scale[which])

    def simplest(self) -> np.ndarray:
        """bool (readings,): the reading of its group with the least codes."""
        return np.diff(self.group, prepend=-1) > 0

    def certain(self) -> np.ndarray:
        """bool (readings,): the only reading of its group."""
        return np.bincount(self.group)[self.group] == 1 if len(self.group) else np.empty(0, dtype=bool)


@dataclass(frozen=True)
class _Rounding:
    """How far a float type may be off: by `relative` times the value, and by `absolute` near zero."""

    relative: float
    absolute: float


def sample_step(shape: tuple[int, ...]) -> int:
    """One row in so many of a matrix of `shape` is enough to recognise a lattice."""
    return max(1, -(-math.prod(shape) // (_SAMPLE_GROUPS * GROUP_SIZE)))


def _rounding(values: np.ndarray) -> _Rounding:
    """The rounding of the coarsest float type that holds all values, whatever type they come in."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not (values.view(np.uint32) & 0xFFFF).any():
        return _Rounding(2.0**-8, 0)  # bfloat16
    with np.errstate(over="ignore"):
        if (values.astype(np.float16) == values).all():
            return _Rounding(2.0**-11, 2.0**-25)
    return _Rounding(2.0**-22, 0)  # float32, after a multiplication or two


def _sample(matrix: np.ndarray) -> np.ndarray:
    return matrix[:: sample_step(matrix.shape)]


def _magnitudes(rows: np.ndarray) -> np.ndarray:
    """float64 (groups, 16)."""
    return np.abs(rows.reshape(-1, GROUP_SIZE), dtype=np.float64)


def _n_used(groups: np.ndarray) -> int:
    """Number of groups that are not zeros."""
    return int(groups.any(axis=1).sum())


def _read(groups: np.ndarray, code_max: int, rounding: _Rounding) -> _Readings:
    """All readings of groups (n, 16) of magnitudes with codes up to `code_max`."""
    largest = groups.max(axis=1)
    by_weight = np.ascontiguousarray(groups.T)
    used = np.flatnonzero(largest)
    found = []
    for top_code in range(1, code_max + 1):
        group = used
        for magnitudes in by_weight:  # the first ones leave few groups
            per_code = largest[group] / top_code
            code = magnitudes[group] / per_code
            # the largest magnitude is rounded, and so is this one
            tolerance = 2 * (rounding.relative * code + rounding.absolute / per_code)
            group = group[np.abs(code - np.rint(code)) <= tolerance]
        found.append(_Readings(group, np.full(len(group), top_code), largest[group] / top_code))
    readings = _Readings.joined(found)
    return readings.where(np.argsort(readings.group, kind="stable"))


def _clusters(readings: _Readings, rounding: _Rounding) -> np.ndarray:
    """float64 (clusters, 2): the least and the greatest of scales that rounding cannot keep apart, in order."""
    scales = np.sort(readings.scale[readings.scale * readings.top_code >= _LEAST_NORMAL])
    if not len(scales):
        return np.empty((0, 2))
    starts = np.flatnonzero(np.diff(scales, prepend=0) > 3 * rounding.relative * scales)
    ends = np.append(starts[1:], len(scales)) - 1
    return np.stack([scales[starts], scales[ends]], axis=1)


def _choose(readings: _Readings, rounding: _Rounding) -> _Readings | None:
    """One reading for each group; None if that takes too many scales.

    Codes 2 and 4 of one scale are codes 1 and 2 of twice that scale: the scales of the groups that have one reading
    decide. Where they leave a choice, the codec would have used its largest codes.
    """
    clusters = _clusters(readings.where(readings.certain()), rounding)
    known = np.zeros(len(readings.group), dtype=bool)
    if len(clusters):
        slack = 1 + 3 * rounding.relative
        nearest = np.searchsorted(clusters[:, 0], readings.scale * slack, side="right") - 1
        known = (nearest >= 0) & (readings.scale <= clusters[nearest, 1] * slack)
    best_last = np.lexsort((readings.top_code, known, readings.group))
    last = np.diff(readings.group[best_last], append=-1) != 0
    chosen = readings.where(best_last[last])
    return chosen if len(_clusters(chosen, rounding)) <= N_SCALES else None


def _with_top_codes(rows: np.ndarray, top_codes: np.ndarray) -> Lattice:
    """Rows as codes and scales, given the code of the largest magnitude of each group (rows, n / 16)."""
    groups = rows.reshape(-1, GROUP_SIZE).astype(np.float64)
    largest = np.abs(groups).max(axis=1)
    codes = np.rint(
        groups * np.divide(top_codes.ravel(), largest, out=np.zeros_like(largest), where=largest > 0)[:, None]
    )
    energy = (codes * codes).sum(axis=1)
    scales = np.divide((groups * codes).sum(axis=1), energy, out=np.zeros_like(energy), where=energy > 0)
    return Lattice(codes.astype(np.int8).reshape(rows.shape), scales.astype(np.float32).reshape(len(rows), -1))
