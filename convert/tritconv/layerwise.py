"""Quantizes the layers of a model in sequence, each with the inputs that the layers before it give.

Two models run side by side, a layer at a time: the full-precision one, and the one quantized so far. So what is wrong
with a layer's inputs already is known to the method that quantizes the layer.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

from tritconv.calibration.matrices import Matrix, matrices_of, stages
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.moments import LayerStreams, Moments
from tritconv.calibration.rows import Place
from tritconv.calibration.store import LayerStore
from tritconv.codec import Blocks, pack, unpack
from tritconv.errors import RangeError
from tritconv.format import BYTES_PER_BLOCK
from tritconv.methods import gptq, search
from tritconv.methods.tune import Latent, TuneOptions, tune

_LEAST_TOKENS = 256  # below that, an expert's Hessian says too little about its inputs
_NORM = "norm:"  # before the names of norms among what was made of a layer

Depths = Mapping[Place, int]  # trits per weight of the matrices to quantize


class Progress(Protocol):
    """Hears how far the work is."""

    def step(self, layer: int, what: str) -> None:
        """`what` of a layer, counted from 0, begins."""
        ...

    def epoch(self, layer: int, epoch: int, held_out_loss: float) -> None:
        """An epoch of a layer's training has ended; epoch 0 is before the first."""
        ...


class LayerQuantizer:
    """Quantizes a model's layers.

    Attributes:
        blocks: of the matrices quantized so far: uint8 (rows, bytes per row).
        norms: trained norms, float32, by the number of their layer and their name in it.
        remarks: what the user should know.
    """

    def __init__(
        self,
        model: LayeredModel,
        depths: Depths,
        store: LayerStore,
        training: TuneOptions | None = None,
        norms: Collection[tuple[int, str]] = (),
    ) -> None:
        """Prepare.

        Args:
            depths: of the matrices to quantize.
            store: keeps finished layers; those that it has are not quantized again.
            training: how to train layers after gptq; None leaves that out.
            norms: the norms to train, by the number of their layer and their name in it.
        """
        self._model = model
        self._depths = depths
        self._store = store
        self._training = training
        self._trained_norms = norms
        self.blocks: dict[Place, np.ndarray] = {}
        self.norms: dict[tuple[int, str], np.ndarray] = {}
        self.remarks: list[str] = []

    def run(self, tokens: torch.Tensor, progress: Progress) -> None:
        """Quantize all layers.

        Args:
            tokens: int64 (sequences, length).
        """
        progress.step(0, "embeddings")
        quantized_in = full_in = self._model.embed(tokens)
        for index in range(len(self._model.layers)):
            full = self._model.working_copy(index)
            quantized = self._model.working_copy(index)
            full_out = self._model.run_all(index, full, full_in)
            done = self._store.load(index)
            if done is None:
                streams = LayerStreams(self._model, index, quantized, full, quantized_in, full_in, full_out)
                done = self._quantize_layer(streams, progress)
                self._store.save(index, done)
            self._take_over(index, quantized, done)
            quantized_in = self._model.run_all(index, quantized, quantized_in)
            full_in = full_out

    def _quantize_layer(self, streams: LayerStreams, progress: Progress) -> dict[str, np.ndarray]:
        """Blocks and norms of a layer, by name."""
        done: dict[str, np.ndarray] = {}
        trainable: dict[Matrix, Latent] = {}
        layer, index = streams.quantized, streams.index
        wanted = [matrix for matrix in matrices_of(layer) if (index, matrix) in self._depths]
        first = streams.quantized_in[:1].to(self._model.device)
        order = stages(layer, wanted, lambda: self._model.run(index, layer, first))
        for number, stage in enumerate(order):
            later = {matrix for members in order[number + 1 :] for matrix in members}
            moments = streams.moments(stage, later)
            for group in self._groups(index, stage):
                progress.step(index, ", ".join(map(str, group)))
                for matrix, (data, latent) in self._quantize(streams, group, moments).items():
                    done[str(matrix)] = data
                    _set_weights(layer, matrix, data, self._depths[index, matrix])
                    if latent is not None and not matrix.is_expert:
                        trainable[matrix] = Latent(_unpack(data, self._depths[index, matrix]), latent)
        if self._training is not None:
            progress.step(index, "training")
            done |= self._train(streams, trainable, self._training, progress)
        return done

    def _train(
        self, streams: LayerStreams, latents: Mapping[Matrix, Latent], options: TuneOptions, progress: Progress
    ) -> dict[str, np.ndarray]:
        index = streams.index
        norms = [name for layer, name in self._trained_norms if layer == index]
        tuned = tune(streams, latents, norms, options, lambda *epoch: progress.epoch(index, *epoch))
        blocks = {
            str(matrix): pack(blocks).reshape(len(matrix.of(streams.full)), -1)
            for matrix, blocks in tuned.blocks.items()
        }
        return blocks | {_NORM + name: values.cpu().numpy() for name, values in tuned.norms.items()}

    def _groups(self, index: int, stage: Sequence[Matrix]) -> list[list[Matrix]]:
        """Matrices of a stage that are quantized together: of the same input and depth."""
        groups: dict[object, list[Matrix]] = {}
        for matrix in stage:
            groups.setdefault((self._depths[index, matrix], matrix if matrix.is_expert else None), []).append(matrix)
        return list(groups.values())

    def _quantize(
        self, streams: LayerStreams, group: Sequence[Matrix], moments: Mapping[Matrix, Moments]
    ) -> dict[Matrix, tuple[np.ndarray, torch.Tensor | None]]:
        """The blocks of matrices with the same input, and their codes before rounding, if there are such.

        A matrix that its type cannot hold is left out.
        """
        depth = self._depths[streams.index, group[0]]
        weights = [matrix.of(streams.full) for matrix in group]
        one = moments[group[0]]
        if group[0].is_expert and one.n_tokens < _LEAST_TOKENS:
            self.remarks.append(
                f"layer {streams.index}, {group[0]}: {one.n_tokens} tokens came to it, so it went by weighted search"
            )
            return self._search(group, weights, depth, one)
        pulls = [moments[matrix].pull for matrix in group]
        together = Moments(one.hessian, torch.cat(pulls, dim=1) if None not in pulls else None, one.n_tokens)
        try:
            rounded = gptq.quantize(torch.cat(weights), depth, together)
        except RangeError:
            return self._search(group, weights, depth, one)
        n_rows = [len(values) for values in weights]
        data = np.split(pack(rounded.blocks).reshape(sum(n_rows), -1), np.cumsum(n_rows)[:-1])
        return dict(zip(group, zip(data, rounded.latent.split(n_rows), strict=True), strict=True))

    def _search(
        self, group: Sequence[Matrix], weights: Sequence[torch.Tensor], depth: int, moments: Moments
    ) -> dict[Matrix, tuple[np.ndarray, torch.Tensor | None]]:
        importance = moments.hessian.diagonal().cpu().numpy() if moments.n_tokens else None
        found: dict[Matrix, tuple[np.ndarray, torch.Tensor | None]] = {}
        for matrix, values in zip(group, weights, strict=True):
            with suppress(RangeError):  # the writer will meet it too, and store the tensor in another type
                found[matrix] = search.quantize(values.cpu().numpy(), depth, importance), None
        return found

    def _take_over(self, index: int, layer: torch.nn.Module, done: Mapping[str, np.ndarray]) -> None:
        """Note what was made of a layer, and give it to `layer`."""
        for matrix in matrices_of(layer):
            if (data := done.get(str(matrix))) is not None:
                self.blocks[index, matrix] = data
                _set_weights(layer, matrix, data, self._depths[index, matrix])
        for key, values in done.items():
            if key.startswith(_NORM):
                name = key.removeprefix(_NORM)
                self.norms[index, name] = values
                layer.get_parameter(name).detach().copy_(torch.from_numpy(values))


def _unpack(data: np.ndarray, depth: int) -> Blocks:
    """Blocks of uint8 (rows, bytes per row)."""
    return unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth]))


def _set_weights(layer: torch.nn.Module, matrix: Matrix, data: np.ndarray, depth: int) -> None:
    """Give a layer the weights that blocks uint8 (rows, bytes per row) stand for."""
    weights = matrix.of(layer)
    weights.copy_(torch.from_numpy(_unpack(data, depth).decode()).view_as(weights))
