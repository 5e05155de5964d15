"""The driver of the methods that take a tensor at a time: search, imatrix, uniform."""

from collections.abc import Iterator, Sequence

import numpy as np

from tritconv.encode import check_finite
from tritconv.methods import Finished, Quantizer
from tritconv.methods.lattice_import import LatticeImport
from tritconv.methods.search import check_reach
from tritconv.plan import Plan
from tritconv.sources.source import Source, SourceTensor
from tritconv.workers import Workers
from tritcore.errors import RangeError


class PerTensor:
    """A method of a quantizer's. Tensors on a trit lattice keep their codes where that is no worse."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.name = quantizer.name
        self.methods: Sequence[str] = (quantizer.name,)
        self._quantizer = quantizer
        self._importing = LatticeImport()

    def run(self, source: Source, plan: Plan, workers: Workers) -> Iterator[Finished]:
        """As `Method.run` has it."""
        for tensor in source.tensors:
            yield self.finish(tensor, tensor.load(), plan, workers)

    def finish(self, tensor: SourceTensor, values: np.ndarray, plan: Plan, workers: Workers) -> Finished:
        """One tensor.

        Raises:
            TritError: a weight is NaN or infinite.
        """
        choice = plan.choice(tensor)
        depth = choice.depth
        if depth is None or values.dtype.kind in "iu":
            return Finished(tensor, values)
        check_finite(tensor, values, workers)

        def quantize(depth: int) -> np.ndarray:
            return self._quantizer.quantize(tensor, values, depth, workers)

        try:
            check_reach(values, depth, workers)
            blocks = quantize(depth)
            imported = None
            if choice.lattice is not None:
                imported = self._importing.blocks(values, choice.lattice, depth, blocks, quantize, workers)
        except RangeError as error:
            return Finished(tensor, values, reason=str(error))
        return Finished(
            tensor,
            values,
            blocks if imported is None else imported,
            method=self.name,
            imported=imported is not None,
        )

    def remarks(self) -> list[str]:
        """As `Method.remarks` has it."""
        return [*self._quantizer.remarks(), *self._importing.remarks()]
