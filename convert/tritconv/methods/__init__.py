"""How codes and scale indexes are chosen: a module for each method.

A module's `quantize` makes blocks of a matrix; its `Quantizer` does that for the tensors of a model.
"""

from typing import Protocol

import numpy as np

from tritconv.plan import SourceTensor
from tritconv.workers import Workers


class Quantizer(Protocol):
    """A method at work on a model, a tensor at a time. `name` is what the file's metadata call it."""

    name: str

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        """The blocks of a tensor.

        Args:
            tensor: what is known of it.
            values: its values, all of them finite: float16 or float32, row length last, a multiple of 64.
            depth: trits per weight.
            workers: threads to use.

        Returns:
            uint8 (rows, bytes per row).

        Raises:
            RangeError: a block lies above the type's range; `block` counts from the start of the tensor.
        """
        ...

    def remarks(self) -> list[str]:
        """What the user should know, after the last tensor."""
        ...
