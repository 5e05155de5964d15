"""Quantizes the layers of a model in sequence, each with the inputs that the layers before it give.

Two models run side by side, a layer at a time: the full-precision one, and the one quantized so far. So what is wrong
with a layer's inputs already is known to the method that quantizes the layer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch

from tritconv.calibration.matrices import Matrix, stages
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.moments import LayerStreams, Moments
from tritconv.calibration.outputs import OutputMoments
from tritconv.calibration.rows import Place
from tritconv.calibration.store import LayerStore
from tritconv.methods import search
from tritconv.methods.gptq import matrix as gptq
from tritcore import encoder
from tritcore.codec import Blocks, pack, unpack
from tritcore.errors import NotFiniteError, RangeError
from tritcore.format import BYTES_PER_BLOCK

_LEAST_TOKENS = 256  # below that, an expert's Hessian says too little about its inputs
_METHOD = "gptq"
_OFFSET = "offset:"  # before the name of a matrix, among what was made of a layer
_NOTES = "notes:"  # JSON among it: `remarks`, and the names of matrices that were `searched` only

Depths = Mapping[Place, int]  # trits per weight of the matrices to quantize

OnLayer = Callable[[int, str], None]  # the number of a layer, and what of it begins


class LayerQuantizer:
    """Quantizes a model's layers.

    Attributes:
        blocks: of the matrices quantized so far: uint8 (rows, bytes per row).
        offsets: float16 (rows, n): of those that gptq quantized, how far their codes before rounding were from them.
            Kept only where asked for.
        remarks: what the user should know.
    """

    def __init__(
        self, model: LayeredModel, depths: Depths, store: LayerStore, seed: int, keep_offsets: bool = False
    ) -> None:
        """Prepare.

        Args:
            depths: of the matrices to quantize.
            store: keeps finished layers; those that it has are not quantized again.
            seed: of the labels whose loss says what outputs are worth.
        """
        self._model = model
        self._depths = depths
        self._store = store
        self._seed = seed
        self._keep_offsets = keep_offsets
        self.blocks: dict[Place, np.ndarray] = {}
        self.offsets: dict[Place, np.ndarray] = {}
        self.remarks: list[str] = []
        self._searched: set[Place] = set()
        self._notes: dict[str, list[str]] = {}  # of the layer in work
        self._few: list[int] = []  # tokens that came to its experts' matrices where they were too few

    def run(self, tokens: torch.Tensor, on_layer: OnLayer) -> None:
        """Quantize all layers.

        Args:
            tokens: int64 (sequences, length).
        """
        kept = [self._load(index) for index in range(len(self._model.layers))]
        whole = [layer for layer in kept if layer is not None]
        if len(whole) == len(kept):
            for index, layer in enumerate(whole):
                self._take(index, layer)
            return
        outputs = OutputMoments(self._model, tokens, self._seed)
        on_layer(0, "embeddings")
        quantized_in = full_in = self._model.embed(tokens)
        for index in range(len(self._model.layers)):
            full = self._model.working_copy(index)
            quantized = self._model.working_copy(index)
            full_out = self._model.run_all(index, full, full_in)
            done = kept[index]
            if done is None:
                streams = LayerStreams(self._model, index, quantized, full, quantized_in, full_in, full_out)
                done = self._quantize_layer(streams, outputs, on_layer)
                self._store.save(index, done)
            self._take(index, done)
            self.write_into(quantized, index)
            quantized_in = self._model.run_all(index, quantized, quantized_in)
            full_in = full_out

    def write_into(self, layer: torch.nn.Module, index: int) -> None:
        """Give a layer that stands at `index` its quantized weights."""
        for matrix in self._wanted(index):
            if (data := self.blocks.get((index, matrix))) is not None:
                _set_weights(layer, matrix, data, self._depths[index, matrix])

    def method_of(self, place: Place) -> str:
        """The method by which the blocks of a matrix were made."""
        return search.Search.name if place in self._searched else _METHOD

    def _wanted(self, index: int) -> list[Matrix]:
        """The matrices of a layer to quantize."""
        return [matrix for number, matrix in self._depths if number == index]

    def _quantize_layer(
        self, streams: LayerStreams, outputs: OutputMoments, on_layer: OnLayer
    ) -> dict[str, np.ndarray]:
        """Blocks and offsets of a layer, by name."""
        done: dict[str, np.ndarray] = {}
        self._notes = {"remarks": [], "searched": []}
        self._few = []
        layer, index = streams.quantized, streams.index
        wanted = self._wanted(index)
        of_all = [matrix for matrix in wanted if not matrix.is_expert]  # few tokens come to an expert
        worth = outputs.of(index, streams.full, of_all, streams.full_in, lambda what: on_layer(index, what))
        first = streams.quantized_in[:1].to(self._model.device)
        order = stages(layer, wanted, lambda: self._model.run(index, layer, first))
        for number, stage in enumerate(order):
            later = {matrix for members in order[number + 1 :] for matrix in members}
            moments = streams.moments(stage, later)
            for group in self._groups(index, stage):
                on_layer(index, ", ".join(map(str, group)))
                for matrix, (data, offset) in self._quantize(streams, group, moments, worth).items():
                    done[str(matrix)] = data
                    _set_weights(layer, matrix, data, self._depths[index, matrix])
                    if self._keep_offsets and offset is not None:
                        done[_OFFSET + str(matrix)] = offset.to(torch.float16).cpu().numpy()
        if self._few:
            self._notes["remarks"].append(
                f"layer {index}: at most {max(self._few)} tokens came to {len(self._few)} of the experts' matrices, so "
                "they went by weighted search: a longer text (--calib-tokens) reaches more"
            )
        done[_NOTES] = np.frombuffer(json.dumps(self._notes).encode(), dtype=np.uint8)
        return done

    def _groups(self, index: int, stage: Sequence[Matrix]) -> list[list[Matrix]]:
        """Matrices of a stage that are quantized together: of the same input and depth."""
        groups: dict[object, list[Matrix]] = {}
        for matrix in stage:
            groups.setdefault((self._depths[index, matrix], matrix if matrix.is_expert else None), []).append(matrix)
        return list(groups.values())

    def _quantize(
        self,
        streams: LayerStreams,
        group: Sequence[Matrix],
        moments: Mapping[Matrix, Moments],
        worth: Mapping[Matrix, torch.Tensor],
    ) -> dict[Matrix, tuple[np.ndarray, torch.Tensor | None]]:
        """The blocks of matrices with the same input, and their codes before rounding, if there are such.

        A matrix that its type cannot hold is left out: the writer will store it in another type.
        """
        depth = self._depths[streams.index, group[0]]
        # the experts of a tensor are judged together, by the writer
        group = [m for m in group if m.is_expert or encoder.reaches(m.of(streams.full).cpu().numpy(), depth)]
        if not group:
            return {}
        weights = [matrix.of(streams.full) for matrix in group]
        one = moments[group[0]]
        if group[0].is_expert and one.n_tokens < _LEAST_TOKENS:
            self._few.append(one.n_tokens)
            return self._search(group, weights, depth, one)
        pulls = [moments[matrix].pull for matrix in group]
        together = Moments(one.hessian, torch.cat(pulls, dim=1) if None not in pulls else None, one.n_tokens)
        try:
            rounded = gptq.quantize(torch.cat(weights), depth, together, [worth[m] for m in group if m in worth])
        except (RangeError, NotFiniteError):  # the errors of the columns before have blown up
            return self._search(group, weights, depth, one)
        n_rows = [len(values) for values in weights]
        data = np.split(pack(rounded.blocks).reshape(sum(n_rows), -1), np.cumsum(n_rows)[:-1])
        return dict(zip(group, zip(data, rounded.offset.split(n_rows), strict=True), strict=True))

    def _search(
        self, group: Sequence[Matrix], weights: Sequence[torch.Tensor], depth: int, moments: Moments
    ) -> dict[Matrix, tuple[np.ndarray, torch.Tensor | None]]:
        importance = moments.hessian.diagonal().cpu().numpy() if moments.n_tokens else None
        found: dict[Matrix, tuple[np.ndarray, torch.Tensor | None]] = {}
        for matrix, values in zip(group, weights, strict=True):
            with suppress(RangeError):
                found[matrix] = encoder.quantize(values.cpu().numpy(), depth, importance), None
                self._notes["searched"].append(str(matrix))
        return found

    def _load(self, index: int) -> dict[str, np.ndarray] | None:
        """What is kept of a layer, if that is all that is wanted."""
        done = self._store.load(index)
        if done is None or _NOTES not in done:
            return None
        return None if self._keep_offsets and not any(key.startswith(_OFFSET) for key in done) else done

    def _take(self, index: int, done: Mapping[str, np.ndarray]) -> None:
        """Take what was made of a layer."""
        notes = json.loads(done[_NOTES].tobytes())
        self.remarks += notes["remarks"]
        for matrix in self._wanted(index):
            if str(matrix) in notes["searched"]:
                self._searched.add((index, matrix))
            if (data := done.get(str(matrix))) is not None:
                self.blocks[index, matrix] = data
            if (offset := done.get(_OFFSET + str(matrix))) is not None:
                self.offsets[index, matrix] = offset


def _unpack(data: np.ndarray, depth: int) -> Blocks:
    """Blocks of uint8 (rows, bytes per row)."""
    return unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth]))


def _set_weights(layer: torch.nn.Module, matrix: Matrix, data: np.ndarray, depth: int) -> None:
    """Give a layer the weights that blocks uint8 (rows, bytes per row) stand for."""
    weights = matrix.of(layer)
    weights.copy_(torch.from_numpy(_unpack(data, depth).decode()).view_as(weights))
