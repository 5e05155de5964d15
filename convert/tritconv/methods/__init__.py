"""How codes and scale indexes are chosen: a module for each method.

Every method is an iterator: it takes a source and a plan, and yields the tensors, finished, in the order of the file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from tritconv.plan import Plan
from tritconv.sources.source import Source, SourceTensor
from tritconv.workers import Workers


class MethodName(str, Enum):
    """The methods that a user can ask for."""

    SEARCH = "search"
    IMATRIX = "imatrix"
    UNIFORM = "uniform"
    GPTQ = "gptq"
    TUNE = "tune"


@dataclass(frozen=True)
class Finished:
    """A tensor that a method is done with.

    Attributes:
        values: as they are to be stored, before any encoding; see `SourceTensor.load`.
        blocks: of the TRIT type that the plan has for it, uint8 (rows, bytes per row). None where the plan has another
            type, or where the type cannot hold the tensor.
        reason: why there are no blocks, where the plan wants some.
        method: by which the blocks were made, one of `Method.methods`; "" without blocks.
        imported: whether the codes are those of the lattice that the source lies on.
    """

    tensor: SourceTensor
    values: np.ndarray
    blocks: np.ndarray | None = None
    reason: str | None = None
    method: str = ""
    imported: bool = False


class Method(Protocol):
    """A method at work on a model.

    Attributes:
        name: what `trit.method` in the file says.
        methods: all that `Finished.method` may be: parts of a tensor may be made by different methods.
    """

    name: str
    methods: Sequence[str]

    def run(self, source: Source, plan: Plan, workers: Workers) -> Iterator[Finished]:
        """The tensors of a source, in its order. One of them at a time is in memory.

        Raises:
            TritError: a weight is NaN or infinite, or the method cannot do its work.
        """
        ...

    def remarks(self) -> list[str]:
        """What the user should know, after the last tensor."""
        ...


class Quantizer(Protocol):
    """A method that takes a tensor at a time, and knows nothing of the others.

    Attributes:
        name: of the method.
    """

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
