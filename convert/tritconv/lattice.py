"""Import of weights that already lie on a lattice of trits, as in the dequantized checkpoints of the 2026 codec.

In such a matrix each group of 16 weights is a scale times codes of few levels, rounded to a float type, and there are
at most 27 scales. The codes are kept exactly; only the scales become the nearest that the TRIT types have.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from tritconv.methods import Quantizer
from tritconv.methods.scales import blocks_of_rows
from tritconv.plan import SourceTensor
from tritconv.workers import Chunk, Workers
from tritcore.codec import pack, unpack
from tritcore.errors import RangeError
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS, GROUP_SIZE, N_GROUPS, N_SCALES

_SAMPLE_GROUPS = 1024
_NEAR = 0.06  # half a step between the scales of the TRIT types
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
    """The depth of the lattice that a matrix lies on, as far as a sample of its rows tells; None if on none.

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
    step = -(-matrix.size // (_SAMPLE_GROUPS * GROUP_SIZE))
    return matrix[::step]


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


@dataclass(frozen=True)
class _Imported:
    """A tensor whose codes are kept.

    data: uint8 (rows, bytes per row).
    off: how far the scales moved, relative, of all groups that are not zeros.
    squared_error: what it is off from the tensor, summed up.
    """

    data: np.ndarray
    off: np.ndarray
    squared_error: float


class LatticeImport:
    """Keeps the codes of tensors that lie on a lattice of the depth asked for; the others go by another method.

    A lattice is no end in itself: where the other method comes closer to the tensor, its blocks are taken. At depths 3
    and 4 it mostly does, as its codes make up for scales that the types do not have.
    """

    def __init__(self, other: Quantizer) -> None:
        self.name = other.name
        self.n_imported = 0
        self._other = other
        self._other_depths: Counter[tuple[int, int]] = Counter()  # (found, asked for)
        self._n_groups = self._n_near = 0
        self._worst = 0.0

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        data = self._other.quantize(tensor, values, depth, workers)
        found = _depth_of_all(values)
        imported = None if found is None else _import(values, found, workers)
        if found is None or imported is None:
            return data
        if imported.squared_error > _squared_error(data, values, depth, workers):
            return data
        if found != depth:
            at_found = self._other.quantize(tensor, values, found, workers)
            if imported.squared_error <= _squared_error(at_found, values, found, workers):
                self._other_depths[found, depth] += 1
            return data
        self.n_imported += 1
        self._n_groups += len(imported.off)
        self._n_near += int((imported.off < _NEAR).sum())
        self._worst = max(self._worst, float(imported.off.max(initial=0)))
        return imported.data

    def remarks(self) -> list[str]:
        remarks = self._other.remarks()
        if self.n_imported:
            remarks.append(
                f"{self.n_imported} tensors lie on a lattice of trits: their codes are kept, and the scales are the "
                f"nearest there are, within {_NEAR:.0%} for {self._n_near / self._n_groups:.1%} of the groups, "
                f"{self._worst:.1%} off at worst"
            )
        for (found, asked), count in sorted(self._other_depths.items()):
            remarks.append(
                f"{count} tensors lie on a lattice of {found} trits, not {asked}: --depth {found} keeps their codes, "
                "and comes no less close to them"
            )
        return remarks


def _depth_of_all(values: np.ndarray) -> int | None:
    """The depth of the lattices that all matrices of a tensor lie on; None if they are not alike, or on none."""
    depths = {lattice_depth(matrix) for matrix in values.reshape(-1, *values.shape[-2:])}
    return depths.pop() if len(depths) == 1 else None


def _import(values: np.ndarray, depth: int, workers: Workers) -> _Imported | None:
    """A tensor on lattices of a depth; None if some matrix is not on one, or beyond the range of the type."""
    parts = []
    for matrix in values.reshape(-1, *values.shape[-2:]):
        lattice = read_lattice(matrix, depth, workers)
        if lattice is None:
            return None
        try:
            parts.append(_blocks(lattice, depth, workers))
        except RangeError:
            return None
    data = np.concatenate([data for data, _ in parts])
    off = np.concatenate([off for _, off in parts])
    return _Imported(data, off, _squared_error(data, values, depth, workers))


def _blocks(lattice: Lattice, depth: int, workers: Workers) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of a matrix, uint8 (rows, bytes per row), and how far the scales moved."""

    def blocks(chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        scales, codes = lattice.scales[chunk.place], lattice.codes[chunk.place]
        found = blocks_of_rows(depth, codes, scales)
        kept = (found.codes == codes.reshape(found.codes.shape)).all(axis=1)  # those below the range are not
        used = (scales > 0) & kept.repeat(N_GROUPS).reshape(scales.shape)
        off = np.abs(found.group_scales().reshape(scales.shape)[used] / scales[used] - 1)
        return pack(found).reshape(len(scales), -1), off

    parts = workers.map(blocks, lattice.codes)
    return np.concatenate([data for data, _ in parts]), np.concatenate([off for _, off in parts])


def _squared_error(data: np.ndarray, values: np.ndarray, depth: int, workers: Workers) -> float:
    """How far blocks uint8 (rows, bytes per row) are from a tensor: the sum of squares."""

    def error(chunk: Chunk) -> float:
        stored = unpack(depth, data[chunk.place].reshape(-1, BYTES_PER_BLOCK[depth])).decode()
        lost = (stored.reshape(chunk.rows.shape) - chunk.rows).ravel().astype(np.float64)
        return float(lost @ lost)

    return sum(workers.map(error, values))
