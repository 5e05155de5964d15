"""Threads that take a tensor apart by rows."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tritcore.errors import RangeError
from tritcore.format import BLOCK_SIZE

_CHUNK_WEIGHTS = 1 << 18  # per task: large enough for vector code, small enough for the memory and an even end

T = TypeVar("T")


def all_cores() -> int:
    """How many CPU cores this process may use: its share, where torchrun has started several on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def is_first_process() -> bool:
    """Whether this process is alone, or the first of those that torchrun has started: it reads the text."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Chunk:
    """Some rows of one matrix of a tensor.

    rows: float32 (rows, n).
    first: index of the first of them among the rows of the tensor.
    matrix: index of the matrix; a tensor of experts has several.
    """

    rows: np.ndarray
    first: int
    matrix: int

    @property
    def place(self) -> slice:
        """Where the rows lie in an array over the rows of the tensor."""
        return slice(self.first, self.first + len(self.rows))


class Workers:
    """A number of threads; to be used as a context manager. What they run must let go of Python's lock.

    Attributes:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Chunk], T], values: np.ndarray) -> list[T]:
        """Apply a function to all chunks of a tensor; the results come in the order of the rows.

        Args:
            function: a RangeError that it raises counts blocks from the start of the chunk.
            values: floats, row length last.

        Raises:
            RangeError: `block` counts from the start of the tensor.
        """
        rows = values.reshape(-1, values.shape[-1] if values.ndim else 1)
        rows_per_matrix = values.shape[-2] if values.ndim > 1 else 1

        def run(span: tuple[int, int]) -> T:
            first, last = span
            chunk = Chunk(rows[first:last].astype(np.float32, copy=False), first, first // rows_per_matrix)
            try:
                return function(chunk)
            except RangeError as error:
                first_block = first * rows.shape[1] // BLOCK_SIZE
                raise RangeError(first_block + error.block, error.largest, error.bound) from None

        return list(self._pool.map(run, _spans(len(rows), rows_per_matrix, max(1, _CHUNK_WEIGHTS // rows.shape[1]))))


def _spans(n_rows: int, rows_per_matrix: int, most: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `most` rows, none of them over the border between two matrices."""
    for start in range(0, n_rows, rows_per_matrix):
        end = start + rows_per_matrix
        for first in range(start, end, most):
            yield first, min(first + most, end)
