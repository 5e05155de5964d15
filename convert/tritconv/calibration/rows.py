"""Which rows of a GGUF tensor are which rows of the model's matrices.

llama.cpp's converter renames, splits, stacks and permutes. Whatever it does to a matrix as a whole, a row stays the
same weights in the same order, so rows are known by their content. Rows with the same content, such as rows of zeros,
are told apart by where they stand: they go on as the rows around them do.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tritconv.calibration.matrices import Matrix

OUTSIDE = -1  # in place of a layer's number, for matrices that lie outside the layers

Place = tuple[int, Matrix]  # the number of a layer, and a matrix of it


@dataclass(frozen=True)
class RowMap:
    """Where the rows of a tensor come from.

    Attributes:
        places: the matrices that it is made of.
        place: int32 (rows,), an index into `places` for each row. It takes no memory where there is one matrix.
        row: int32 (rows,), the row of that matrix.
    """

    places: list[Place]
    place: np.ndarray
    row: np.ndarray

    @staticmethod
    def whole(place: Place, n_rows: int) -> "RowMap":
        """Of a tensor that is a matrix as it is."""
        return RowMap([place], np.broadcast_to(np.int32(0), n_rows), np.arange(n_rows, dtype=np.int32))

    def gather(self, data: Mapping[Place, np.ndarray]) -> np.ndarray:
        """The tensor's rows, (rows, n), of what is given for the rows of each matrix, (rows of the matrix, n)."""
        first = data[self.places[0]]
        if len(self.places) == 1:
            return first[self.row]
        out = np.empty((len(self.row), first.shape[1]), dtype=first.dtype)
        for number, place in enumerate(self.places):
            mine = self.place == number
            out[mine] = data[place][self.row[mine]]
        return out


class RowIndex:
    """The rows of matrices by their content, as their types hold it."""

    def __init__(self, matrices: Mapping[Place, torch.Tensor]) -> None:
        """Index matrices: (rows, n) of any float type, by their places."""
        self._places = list(matrices)
        self._digests = [_digests(weights.detach().cpu()) for weights in matrices.values()]
        self._used: set[tuple[int, int]] = set()  # rows, by the numbers of their matrices, that are like others
        alike: dict[tuple[int, torch.dtype], list[int]] = defaultdict(list)
        for number, weights in enumerate(matrices.values()):
            alike[weights.shape[1], weights.dtype].append(number)
        self._tables = {key: _Table.of(numbers, self._digests) for key, numbers in alike.items()}

    def find(self, values: np.ndarray, likely: Collection[Place] = ()) -> RowMap | None:
        """Where the rows of a tensor (.., n) come from; None if one of them is not there.

        Args:
            values: float16 or float32. They are rounded to the types of the matrices.
            likely: matrices that the tensor may be made of, to choose between rows that are alike.
        """
        rows = torch.from_numpy(np.require(values.reshape(-1, values.shape[-1]), requirements=["C", "W"]))
        for (width, dtype), table in self._tables.items():
            if width != values.shape[-1]:
                continue
            digests = _digests(rows.to(dtype))
            first, counts = table.spans(digests)
            if len(counts) and counts.all():
                place, row = table.place[first], table.row[first]
                if (counts > 1).any():
                    taken = set(np.unique(place[counts == 1]).tolist())  # by some matrix of the tensor or other
                    preferred = self._alike({*likely, *(self._places[i] for i in taken)}) - taken
                    step = values.shape[-2] if values.ndim > 2 else len(rows)
                    for start in range(0, len(rows), step):  # the matrix of an expert
                        part = slice(start, start + step)
                        self._tell_apart(table, digests[part], counts[part] > 1, place[part], row[part], preferred)
                return self._row_map(place, row)
        return None

    def _alike(self, places: Collection[Place]) -> set[int]:
        """The numbers of matrices, and of their kind, that is of the other experts."""
        kinds = {(matrix.kind, matrix.transposed) for _, matrix in places}
        return {i for i, (_, matrix) in enumerate(self._places) if (matrix.kind, matrix.transposed) in kinds}

    def _row_map(self, place: np.ndarray, row: np.ndarray) -> RowMap:
        row = row.astype(np.int32)
        if (place == place[0]).all():
            return RowMap([self._places[place[0]]], np.broadcast_to(np.int32(0), place.shape), row)
        numbers, first, index = np.unique(place, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return RowMap([self._places[numbers[i]] for i in order], rank[index].astype(np.int32), row)

    def _tell_apart(
        self,
        table: "_Table",
        digests: np.ndarray,
        open_rows: np.ndarray,
        place: np.ndarray,
        row: np.ndarray,
        likely: Collection[int],
    ) -> None:
        """Choose between rows that are alike, for one matrix of a tensor. Changes `place` and `row`.

        Args:
            digests, open_rows, place, row: (rows,), of the tensor; `place` and `row` stand where `open_rows` is False.
        """
        known = np.flatnonzero(~open_rows)
        going_on = {
            number: _continued(known[place[known] == number], row, len(self._digests[number]))
            for number in set(place[known])
        }
        ranks = dict.fromkeys(likely, 1) | dict.fromkeys(going_on, 0)
        queues: dict[int, list[tuple[int, int]]] = {}
        before: tuple[int, int] | None = None
        for i in range(len(row)):
            if open_rows[i]:
                digest = int(digests[i])
                found = self._beside(known, i, place, going_on, digest)
                if found is None and before is not None and self._is(*before, digest):
                    found = before
                if found is None or found in self._used:
                    if digest not in queues:
                        rows = table.rows_of(digest)
                        queues[digest] = sorted(rows, key=lambda one: (ranks.get(one[0], 2), one), reverse=True)
                    queue = queues[digest]
                    while len(queue) > 1 and queue[-1] in self._used:
                        queue.pop()
                    found = queue[-1]
                self._used.add(found)
                place[i], row[i] = found
            before = int(place[i]), int(row[i]) + 1

    def _beside(
        self, known: np.ndarray, i: int, place: np.ndarray, going_on: Mapping[int, np.ndarray | None], digest: int
    ) -> tuple[int, int] | None:
        """The row that goes on as the nearest known ones of the tensor do, if it has the content."""
        at = int(np.searchsorted(known, i))
        for neighbour in known[max(at - 1, 0) : at + 1]:
            number = int(place[neighbour])
            rows = going_on[number]
            if rows is not None and self._is(number, int(rows[i]), digest):
                return number, int(rows[i])
        return None

    def _is(self, number: int, row: int, digest: int) -> bool:
        """Whether a matrix has a row of that content."""
        digests = self._digests[number]
        return 0 <= row < len(digests) and int(digests[row]) == digest


@dataclass(frozen=True)
class _Table:
    """Rows of matrices, sorted by their digests. All (rows,): `place` is the number of the matrix."""

    digest: np.ndarray
    place: np.ndarray
    row: np.ndarray

    @staticmethod
    def of(numbers: Sequence[int], digests: Sequence[np.ndarray]) -> "_Table":
        """Of the matrices of these numbers."""
        digest = np.concatenate([digests[number] for number in numbers])
        order = np.argsort(digest, kind="stable")
        place = np.concatenate([np.full(len(digests[number]), number) for number in numbers])
        row = np.concatenate([np.arange(len(digests[number])) for number in numbers])
        return _Table(digest[order], place[order], row[order])

    def spans(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each digest, the first of the rows that have it, and how many."""
        first = np.searchsorted(self.digest, digests)
        counts = np.searchsorted(self.digest, digests, side="right") - first
        return np.minimum(first, max(len(self.digest) - 1, 0)), counts

    def rows_of(self, digest: int) -> list[tuple[int, int]]:
        """The rows that have a digest: the number of the matrix, and the row."""
        (first,), (count,) = self.spans(np.array([digest], dtype=np.uint64))
        part = slice(first, first + count)
        return list(zip(self.place[part].tolist(), self.row[part].tolist(), strict=True))


def _continued(known: np.ndarray, row: np.ndarray, n_rows: int) -> np.ndarray | None:
    """The rows of a matrix that a tensor has, if all go on as the known ones do; -1 where they do not say.

    Rows come in periods: one row each where the order is kept, those of an attention head where they are permuted.

    Args:
        known: the tensor's rows that are known; `row` says which of the matrix they are.
        n_rows: of the matrix.

    Returns:
        int64 (rows of the tensor,); None without a period.
    """
    length = len(row)
    found = np.full(length, -1, dtype=np.int64)
    found[known] = row[known]
    every = np.arange(length)
    for period in (p for p in range(1, length) if length % p == 0):
        pairs = known[known < length - period]
        pairs = pairs[found[pairs + period] >= 0]
        steps = found[pairs + period] - found[pairs] if len(pairs) else np.array([period])
        told = np.isin(np.arange(period), known % period)  # the others have no known row
        starts = np.zeros(period, dtype=np.int64)
        starts[known % period] = found[known] - steps[0] * (known // period)
        if not told.all() and period > 1 and (others := _continued(np.flatnonzero(told), starts, n_rows)) is not None:
            starts, told = others, others >= 0  # within a period the rows go on in another way
        every_row = np.where(told[every % period], starts[every % period] + steps[0] * (every // period), -1)
        inside = every_row[(every_row >= 0) & (every_row < n_rows)]
        if (steps == steps[0]).all() and (every_row[known] == found[known]).all() and _all_differ(inside):
            return every_row
    return None


def _all_differ(values: np.ndarray) -> bool:
    return len(np.unique(values)) == len(values)


def _digests(rows: torch.Tensor) -> np.ndarray:
    """uint64 (rows,): a digest of each row of floats (rows, n): a random linear form of its bits as float32."""
    factors = np.random.default_rng(0).integers(0, 2**64, rows.shape[1], dtype=np.uint64) | np.uint64(1)
    step = max(1, (1 << 22) // rows.shape[1])
    # to add zero makes minus zero zero
    parts = [(part.float() + 0).contiguous().numpy().view(np.uint32).astype(np.uint64) for part in rows.split(step)]
    return np.concatenate([part @ factors for part in parts])
