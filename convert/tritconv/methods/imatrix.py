"""The `imatrix` method: the search, weighted by the mean square of each input."""

from typing import Protocol

import numpy as np

from tritconv.sources.source import SourceTensor
from tritconv.workers import Chunk, Workers
from tritcore import encoder

_MOST_LISTED = 8


class Importances(Protocol):
    """Where the importances come from: a file, or a calibration text."""

    def of(self, tensor: SourceTensor) -> np.ndarray | None:
        """The importance of each column: float32 (matrices, n), a matrix for each expert; None if it is not known.

        An expert that saw no token has ones. Tensors are asked for in the order of the source.

        Raises:
            TritError: the importances are of another model, or cannot be measured.
        """
        ...


class Imatrix:
    """The search, weighted by importances. Without them, matrices go by the plain search."""

    name = "imatrix"

    def __init__(self, importances: Importances) -> None:
        self._importances = importances
        self._missing: list[str] = []
        self._unseen: list[str] = []

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        importance = self._importances.of(tensor)
        if importance is None:
            self._missing.append(tensor.name)
        elif unseen := int((importance == 1).all(axis=1).sum()):
            self._unseen.append(f"{unseen} of {len(importance)} in {tensor.name}")

        def blocks(chunk: Chunk) -> np.ndarray:
            return encoder.quantize(chunk.rows, depth, None if importance is None else importance[chunk.matrix])

        return np.concatenate(workers.map(blocks, values))

    def remarks(self) -> list[str]:
        remarks = []
        if self._missing:
            remarks.append(f"without importances, so by plain search: {_listed(self._missing)}")
        if self._unseen:
            remarks.append(f"experts that saw no token, so all columns alike: {_listed(self._unseen)}")
        return remarks


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_LISTED} more" if len(items) > _MOST_LISTED else ""
    return ", ".join(items[:_MOST_LISTED]) + more
