"""The `gptq` method: error feedback along the rows and columns of each matrix, a layer at a time.

What a calibration does not reach goes by the search.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tritconv.calibration.context import Context
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.rows import OUTSIDE, Place, RowMap
from tritconv.methods import Finished
from tritconv.methods.gptq.layers import Depths, FinishedLayer, LayerQuantizer
from tritconv.methods.per_tensor import PerTensor
from tritconv.methods.search import Search
from tritconv.plan import Plan
from tritconv.sources.source import Source
from tritconv.workers import Workers

Say = Callable[[str], None]  # shows what is done now


class Gptq:
    """The method."""

    name = "gptq"
    methods: Sequence[str] = ("gptq", "search", "gptq,search")

    def __init__(self, context: Context, say: Say) -> None:
        """Prepare.

        Args:
            context: of the source that will be quantized.
        """
        self._context = context
        self._say = say
        self._remarks: list[str] = []

    def run(self, source: Source, plan: Plan, workers: Workers) -> Iterator[Finished]:
        """As `Method.run` has it: a layer is quantized when its first tensor is due, and forgotten after its last."""
        depths = self._context.depths(plan)
        quantizer = layer_quantizer(self._context, plan, depths, keep_offsets=False)
        n_layers = self._context.model.n_layers

        def on_layer(index: int, what: str) -> None:
            self._say(f"layer {index + 1}/{n_layers} {what}")

        layers = quantizer.run(self._context.tokens, on_layer)
        search = PerTensor(Search())
        layer: FinishedLayer | None = None
        for tensor in source.tensors:
            rows = self._context.maps.get(tensor.name) if plan.choice(tensor).depth is not None else None
            if rows is None:
                yield search.finish(tensor, tensor.load(), plan, workers)
                continue
            index = rows.places[0][0]
            while layer is None or layer.index < index:
                layer = None  # before the next one is made
                layer = next(layers)
                self._remarks += layer.remarks
            if layer.index > index:  # the output matrix comes after the layers
                layer = quantizer.finished(index)
            methods = {matrix: "search" if matrix in layer.searched else self.name for matrix in layer.blocks}
            blocks, method = gathered(rows, {(index, m): data for m, data in layer.blocks.items()}, _of(index, methods))
            if blocks is None:
                yield search.finish(tensor, tensor.load(), plan, workers)
            else:
                yield Finished(tensor, tensor.load(), blocks, method=method)

    def assist(self, plan: Plan) -> None:
        """Take part in the work of the first process, which makes the tensors."""
        quantizer = layer_quantizer(self._context, plan, self._context.depths(plan), keep_offsets=False)
        for _ in quantizer.run(self._context.tokens, lambda index, what: None):
            pass

    def remarks(self) -> list[str]:
        """As `Method.remarks` has it."""
        return self._remarks


def layer_quantizer(context: Context, plan: Plan, depths: Depths, *, keep_offsets: bool) -> LayerQuantizer:
    """What quantizes the layers of a context's model. There is room for its results, or it raises TritError."""
    matrices = tuple((f"{index} {matrix}", depth) for (index, matrix), depth in depths.items())
    store = context.store("layers", matrices=matrices)
    context.check_room(plan, store, trains=keep_offsets)
    outside = {
        matrix: (context.outside[tensor.name], tensor.load)
        for tensor in context.source.tensors
        if tensor.name in context.outside and (OUTSIDE, matrix := Matrix(tensor.name)) in depths
    }
    return LayerQuantizer(
        context.model, depths, store, context.inputs.seed, context.memory, keep_offsets, context.ranks, outside
    )


def gathered(
    rows: RowMap, blocks: Mapping[Place, np.ndarray], methods: Mapping[Place, str]
) -> tuple[np.ndarray | None, str]:
    """The blocks of a tensor, and the methods that made them, separated by commas.

    Args:
        rows: where the rows of the tensor come from.
        blocks: of matrices, uint8 (rows, bytes per row).
        methods: by which they were made.

    Returns:
        uint8 (rows, bytes per row); None where there are none for some matrix.
    """
    if not all(place in blocks for place in rows.places):
        return None, ""
    return rows.gather(blocks), ",".join(sorted({methods[place] for place in rows.places}))


def _of(index: int, methods: Mapping[Matrix, str]) -> dict[Place, str]:
    return {(index, matrix): method for matrix, method in methods.items()}
