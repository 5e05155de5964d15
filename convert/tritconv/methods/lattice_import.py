"""Import of weights that lie on a lattice of trits.

Their codes are kept exactly; the scales become the nearest that the TRIT types have.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tritconv.lattice import Lattice, read_lattice
from tritconv.methods.scales import blocks_of_rows
from tritconv.workers import Chunk, Workers
from tritcore.codec import pack, unpack
from tritcore.errors import RangeError
from tritcore.format import BYTES_PER_BLOCK, N_GROUPS

_NEAR = 0.06  # half a step between the scales of the TRIT types

Quantize = Callable[[int], np.ndarray]  # the blocks of a tensor at a depth, uint8 (rows, bytes per row)


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
    """Keeps the codes of tensors that lie on a lattice, where that comes no less close than a method does.

    At depths 3 and 4 the method mostly comes closer, as its codes make up for scales that the types do not have.
    """

    def __init__(self) -> None:
        self._n_imported = 0
        self._other_depths: Counter[tuple[int, int]] = Counter()  # (found, asked for)
        self._n_groups = self._n_near = 0
        self._worst = 0.0

    def blocks(
        self, values: np.ndarray, found: int, depth: int, data: np.ndarray, quantize: Quantize, workers: Workers
    ) -> np.ndarray | None:
        """The blocks of a tensor with the codes of its lattice; None where other blocks are better.

        Args:
            values: float16 or float32, row length last.
            found: the depth of the lattice.
            depth: of the blocks wanted.
            data: the blocks of that depth that a method makes, uint8 (rows, bytes per row).
            quantize: makes such blocks of any depth.
        """
        imported = _import(values, found, workers)
        if imported is None or imported.squared_error > _squared_error(data, values, depth, workers):
            return None
        if found != depth:
            if imported.squared_error <= _squared_error(quantize(found), values, found, workers):
                self._other_depths[found, depth] += 1
            return None
        self._n_imported += 1
        self._n_groups += len(imported.off)
        self._n_near += int((imported.off < _NEAR).sum())
        self._worst = max(self._worst, float(imported.off.max(initial=0)))
        return imported.data

    def remarks(self) -> list[str]:
        """What the user should know, after the last tensor."""
        remarks = []
        if self._n_imported:
            remarks.append(
                f"{self._n_imported} tensors lie on a lattice of trits: their codes are kept, and the scales are the "
                f"nearest there are, within {_NEAR:.0%} for {self._n_near / self._n_groups:.1%} of the groups, "
                f"{self._worst:.1%} off at worst"
            )
        for (found, asked), count in sorted(self._other_depths.items()):
            remarks.append(
                f"{count} tensors lie on a lattice of {found} trits, not {asked}: --depth {found} keeps their codes, "
                "and comes no less close to them"
            )
        return remarks


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
