"""Importances measured on the calibration text: the mean square of each input of a matrix, as llama-imatrix has it.

The text passes through the full-precision model once, a layer at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from tritconv.calibration.checkpoints import Checkpoints
from tritconv.calibration.context import Context
from tritconv.calibration.matrices import Matrix, Recorder
from tritconv.calibration.model import LayeredModel, in_batches
from tritconv.calibration.passes import Streams
from tritconv.calibration.ranks import ALONE
from tritconv.calibration.rows import OUTSIDE
from tritconv.calibration.scratch import Scratch
from tritconv.calibration.store import LayerStore
from tritconv.sources.source import SourceTensor


class TextImportances:
    """The importances of the tensors that a calibration reaches."""

    def __init__(self, context: Context, say: Callable[[str], None]) -> None:
        """Prepare. The work begins when the first importance is asked for.

        Args:
            say: shows what is done now.
        """
        self._context = context
        self._say = say
        self._layers = self._run()
        self._index = -1
        self._importance: Mapping[str, np.ndarray] = {}

    def of(self, tensor: SourceTensor) -> np.ndarray | None:
        """As `tritconv.methods.imatrix.Importances.of` has it."""
        rows = self._context.maps.get(tensor.name)
        if rows is None or rows.places[0][0] == OUTSIDE:
            return None
        index = rows.places[0][0]
        while self._index < index:
            self._index += 1
            self._importance = next(self._layers)
        firsts = rows.place[:: tensor.shape[-2]]  # all rows of a matrix have the same inputs
        return np.stack([self._importance[str(rows.places[number][1])] for number in firsts])

    def _run(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Of each layer, in order, the importances float32 (n,) of its matrices by name."""
        context, n_layers = self._context, self._context.model.n_layers
        wanted: dict[int, list[Matrix]] = {index: [] for index in range(n_layers)}
        for rows in context.maps.values():
            for index, matrix in rows.places:
                if index != OUTSIDE:
                    wanted[index].append(matrix)
        store = context.store(
            "importance", matrices=tuple((str(index), str(matrix)) for index in wanted for matrix in wanted[index])
        )
        n_finished = next((index for index in range(n_layers) if store.load(index) is None), n_layers)
        scratch = Scratch(context.memory, store.entry.folder)
        try:
            if n_finished < n_layers:
                yield from self._measured(wanted, store, n_finished, scratch)
            else:
                yield from (store.load(index) or {} for index in range(n_layers))
        finally:
            scratch.close()

    def _measured(
        self, wanted: Mapping[int, Sequence[Matrix]], store: LayerStore, n_finished: int, scratch: Scratch
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """As `_run`. The text passes through those of the finished layers again that have left no hidden states."""
        context, model = self._context, self._context.model
        streams = Streams(scratch, in_batches(range(len(context.tokens)), context.tokens.shape[1]))
        checkpoints = Checkpoints(store, ALONE, model.n_layers)
        first = checkpoints.last_layer(len(streams.batches), n_finished)
        self._say("embeddings")
        embedded = (model.embed(context.tokens[batch]) for batch in streams.batches)
        if first:
            next(embedded)  # the model then knows what its layers are given besides
            streams.start(checkpoints.load_streams(first, len(streams.batches)))
            yield from (store.load(index) or {} for index in range(first))
        else:
            streams.start((hidden,) for hidden in embedded)
        for index in range(first, model.n_layers):
            if index > first and index >= n_finished:
                checkpoints.keep_streams(index, streams)
            self._say(f"importances: layer {index + 1}/{model.n_layers}")
            found = _importances(model, index, wanted[index], streams)
            if index >= n_finished:
                store.save(index, found)
            yield found
        checkpoints.forget()


def _importances(
    model: LayeredModel, index: int, matrices: Sequence[Matrix], streams: Streams
) -> dict[str, np.ndarray]:
    """Move all batches behind a layer. Returns the mean squares, or ones of an expert that no token came to."""
    layer = model.working_copy(index)
    sums = {matrix: torch.zeros(matrix.of(layer).shape[1], device=model.device) for matrix in matrices}
    counts = dict.fromkeys(matrices, 0)

    def on_product(matrix: Matrix, x: torch.Tensor) -> None:
        sums[matrix] += x.float().square().sum(dim=0)
        counts[matrix] += len(x)

    for batch, kept in enumerate(streams.full):
        with torch.no_grad(), Recorder(layer, matrices, on_product):
            out = model.run(index, layer, kept.get().to(model.device))
        model.check_finite(out, f"layer {index} puts out")
        streams.replace(streams.full, batch, out)
    return {
        str(matrix): (total / counts[matrix] if counts[matrix] else torch.ones_like(total)).cpu().numpy()
        for matrix, total in sums.items()
    }
