"""Which rows of a GGUF tensor are which rows of the model's matrices.

llama.cpp's converter renames, splits, stacks and permutes. Whatever it does to a matrix as a whole, a row stays the
same weights in the same order, so rows are known by their content.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tritconv.calibration.matrices import Matrix

Place = tuple[int, Matrix]  # the number of a layer, and a matrix of it


@dataclass(frozen=True)
class RowMap:
    """Where the rows of a tensor come from.

    Attributes:
        places: the matrices that it is made of.
        place: int32 (rows,), an index into `places` for each row.
        row: int64 (rows,), the row of that matrix.
    """

    places: list[Place]
    place: np.ndarray
    row: np.ndarray

    def gather(self, data: Mapping[Place, np.ndarray]) -> np.ndarray:
        """The tensor's rows, (rows, n), of what is given for the rows of each matrix, (rows of the matrix, n)."""
        first = data[self.places[0]]
        out = np.empty((len(self.row), first.shape[1]), dtype=first.dtype)
        for number, place in enumerate(self.places):
            mine = self.place == number
            out[mine] = data[place][self.row[mine]]
        return out


class RowIndex:
    """The rows of matrices by their content."""

    def __init__(self) -> None:
        self._rows: dict[int, deque[tuple[Place, int]]] = defaultdict(deque)

    def add(self, place: Place, weights: torch.Tensor) -> None:
        """Add the rows of a matrix, (rows, n)."""
        for row, digest in enumerate(_digests(weights.float().cpu().numpy())):
            self._rows[digest].append((place, row))

    def find(self, values: np.ndarray) -> RowMap | None:
        """Where the rows of a tensor (.., n) come from; None if one of them is not there."""
        rows = []
        for digest in _digests(values.reshape(-1, values.shape[-1]).astype(np.float32)):
            alike = self._rows.get(digest)
            if not alike:
                return None
            rows.append(alike[0])
            alike.rotate(-1)  # rows that are alike are taken in turn
        places = list(dict.fromkeys(place for place, _ in rows))
        number = {place: i for i, place in enumerate(places)}
        return RowMap(
            places,
            np.array([number[place] for place, _ in rows], dtype=np.int32),
            np.array([row for _, row in rows], dtype=np.int64),
        )


def _digests(rows: np.ndarray) -> list[int]:
    """A 64-bit digest of each row of float32 (rows, n): a random linear form of its bits."""
    factors = np.random.default_rng(0).integers(0, 2**64, rows.shape[1], dtype=np.uint64) | np.uint64(1)
    bits = np.ascontiguousarray(rows).view(np.uint32)
    step = max(1, (1 << 22) // rows.shape[1])
    parts = [bits[i : i + step].astype(np.uint64) @ factors for i in range(0, len(bits), step)]
    return np.concatenate(parts).tolist() if parts else []
