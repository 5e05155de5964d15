"""Hidden states and gradients in the cache, so that an interrupted run goes on at the last finished layer.

They are kept only where to compute them again would take long: without them, a run passes the text through the finished
layers once more. The results are the same.
"""

import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from tritconv.calibration.passes import Streams
from tritconv.calibration.ranks import Ranks
from tritconv.calibration.store import LayerStore

_WORTH_KEEPING = 300.0  # seconds of work


class Checkpoints:
    """The hidden states of both models between two layers, and the gradients for the outputs of all layers.

    Each process keeps its own share. Hidden states have two places that take turns: one is whole at any time.
    """

    def __init__(self, store: LayerStore, ranks: Ranks, n_layers: int) -> None:
        """Look into a store."""
        self._store = store
        self._ranks = ranks
        self._n_layers = n_layers
        self._suffix = _letters(ranks.rank)
        self._place = 0
        self._last = time.monotonic()

    def keep_streams(self, index: int, streams: Streams) -> None:
        """Keep the input of layer `index`, if the work since the last time was long. Raises TritError."""
        if time.monotonic() - self._last < _WORTH_KEEPING:
            return
        for batch, full in enumerate(streams.full):
            arrays = {"layer": np.array(index), "full": full.get().numpy()}
            if streams.quantized:
                arrays["quantized"] = streams.quantized[batch].get().numpy()
            self._store.save(batch, arrays, self._kind(self._place))
        self._place = 1 - self._place
        self._last = time.monotonic()

    def last_layer(self, n_batches: int, n_finished: int) -> int:
        """The last layer, at most `n_finished`, whose input all processes have kept; 0 if there is none."""
        found = torch.zeros(self._n_layers + 1, dtype=torch.int64)
        for place in (0, 1):
            layers = {self._layer_of(place, batch) for batch in range(n_batches)}
            if len(layers) == 1 and (layer := layers.pop()) is not None and layer <= n_finished:
                found[layer] = 1
        self._ranks.sum(found)
        return max((int(layer) for layer in (found == self._ranks.size).nonzero()[:, 0]), default=0)

    def load_streams(self, index: int, n_batches: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """The input of layer `index`, of each batch: in full precision and, if it was kept, in the quantized model."""
        place = next(place for place in (0, 1) if self._layer_of(place, 0) == index)
        self._place = 1 - place
        for batch in range(n_batches):
            arrays = self._store.load(batch, self._kind(place))
            assert arrays is not None
            yield tuple(torch.from_numpy(arrays[name]) for name in ("full", "quantized") if name in arrays)

    def keep_gradients(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Keep the gradients for the output of each layer, bfloat16, if the work was long. Raises TritError."""
        if time.monotonic() - self._last < _WORTH_KEEPING:
            return
        for index, values in gradients.items():
            self._store.save(index, {"gradient": values.view(torch.int16).numpy()}, self._gradients)

    def load_gradients(self, first: int) -> dict[int, torch.Tensor] | None:
        """The gradients for the outputs of the layers from `first` on, bfloat16; None where a process lacks some."""
        found = {}
        for index in range(first, self._n_layers):
            arrays = self._store.load(index, self._gradients)
            if arrays is not None:
                found[index] = torch.from_numpy(arrays["gradient"]).view(torch.bfloat16)
        lacks = len(found) < self._n_layers - first
        return None if self._ranks.total(lacks) else found

    def forget(self) -> None:
        """Delete what this process has kept: all layers are finished."""
        for kind in (self._gradients, self._kind(0), self._kind(1)):
            self._store.forget(kind)

    @property
    def _gradients(self) -> str:
        return f"gradients{self._suffix}"

    def _kind(self, place: int) -> str:
        return f"states{'ab'[place]}{self._suffix}"

    def _layer_of(self, place: int, batch: int) -> int | None:
        layer = self._store.load_one(batch, self._kind(place), "layer")
        return None if layer is None else int(layer)


def _letters(number: int) -> str:
    """A number in small letters."""
    return (_letters(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)
