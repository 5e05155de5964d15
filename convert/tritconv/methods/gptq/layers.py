"""Quantizes the layers of a model in sequence, each with the inputs that the layers before it give.

The text passes through two models side by side, a layer at a time: the full-precision one, and the one quantized so
far. So the errors of a layer's inputs are known to the method that quantizes the layer.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from tritconv.calibration.checkpoints import Checkpoints
from tritconv.calibration.lender import ReadRows
from tritconv.calibration.matrices import Matrix, stages
from tritconv.calibration.model import LayeredModel, in_batches
from tritconv.calibration.moments import Moments
from tritconv.calibration.outputs import OutputMoments, UpstreamGradients, some_sequences
from tritconv.calibration.outside import OutsideMatrix, OutsideMoments
from tritconv.calibration.passes import FullPass, QuantizedPass, Streams, adds_to_output
from tritconv.calibration.ranks import ALONE, Ranks
from tritconv.calibration.rows import OUTSIDE, Place
from tritconv.calibration.scratch import Scratch
from tritconv.calibration.store import LayerStore
from tritconv.methods.gptq.columns import ColumnLoop
from tritconv.methods.gptq.matrix import Solver
from tritconv.methods.gptq.outside import quantize_outside, reader
from tritcore import encoder
from tritcore.codec import pack, unpack
from tritcore.errors import NotFiniteError, RangeError, TritError
from tritcore.format import BYTES_PER_BLOCK

_LEAST_TOKENS = 256  # below that, an expert's Hessian says too little about its inputs
_OUTSIDE = "outside"  # the kind, in the store, of what lies outside the layers
_OFFSET = "offset:"  # before the name of a matrix, in the store
_NOTES = "notes:"  # JSON in the store: the names of matrices that were `searched`, and `remarks`

Depths = Mapping[Place, int]  # trits per weight of the matrices to quantize
Outside = Mapping[Matrix, tuple[OutsideMatrix, Callable[[], np.ndarray]]]  # with what loads the values (rows, n)

OnLayer = Callable[[int, str], None]  # the number of a layer, and the part of it that begins


@dataclass(frozen=True)
class FinishedLayer:
    """A quantized layer.

    Attributes:
        index: of the layer, or `OUTSIDE`.
        blocks: of its matrices: uint8 (rows, bytes per row). A matrix that its type cannot hold has none.
        offsets: float16 (rows, n): of those that gptq quantized, as `Rounded` has them. Empty unless asked for.
        searched: the matrices that went by weighted search.
        remarks: for the user.
    """

    index: int
    blocks: Mapping[Matrix, np.ndarray]
    offsets: Mapping[Matrix, np.ndarray]
    searched: frozenset[Matrix]
    remarks: tuple[str, ...]


class LayerQuantizer:
    """Quantizes a model's layers."""

    def __init__(
        self,
        model: LayeredModel,
        depths: Depths,
        store: LayerStore,
        seed: int,
        memory: int,
        keep_offsets: bool = False,
        ranks: Ranks = ALONE,
        outside: Outside | None = None,
    ) -> None:
        """Prepare.

        Args:
            depths: of the matrices to quantize.
            outside: those of them that lie outside the layers.
            store: keeps finished layers; those that it has are not quantized again.
            seed: of the labels whose loss says which errors of outputs matter.
            memory: bytes for hidden states; those that take more are in a file.
            keep_offsets: whether finished layers have offsets.
            ranks: the processes that share the work. The first one has the store.
        """
        self._ranks = ranks
        self._model = model
        self._depths = depths
        self._store = store
        self._seed = seed
        self._memory = memory
        self._keep_offsets = keep_offsets
        self._outside = outside or {}
        self._loop = ColumnLoop(torch.get_num_threads())

    def run(self, tokens: torch.Tensor, on_layer: OnLayer) -> Iterator[FinishedLayer]:
        """The layers in order, each as soon as it is quantized; first what lies outside, if anything of it is wanted.

        Args:
            tokens: int64 (sequences, length).

        Raises:
            TritError: what a layer puts out is not finite, or the disk is full.
        """
        n_layers = self._model.n_layers
        wanted = [*([OUTSIDE] if self._outside else []), *range(n_layers)]
        n_finished = self._ranks.from_first(next((i for i in wanted if self._load(i) is None), n_layers))
        if n_finished == n_layers:
            yield from map(self._finished, wanted)
            return
        scratch = Scratch(self._memory, self._store.entry.folder)
        try:
            yield from self._run(tokens, scratch, n_finished, on_layer)
        finally:
            scratch.close()

    def _run(
        self, tokens: torch.Tensor, scratch: Scratch, n_finished: int, on_layer: OnLayer
    ) -> Iterator[FinishedLayer]:
        looked_at, others = self._batches(tokens)
        streams = Streams(scratch, [*looked_at, *others])
        n_batches = len(streams.batches)
        checkpoints = Checkpoints(self._store, self._ranks, self._model.n_layers)
        first = checkpoints.last_layer(n_batches, n_finished)
        moments = None
        if n_finished == OUTSIDE:
            n_finished = 0
            moments = OutsideMoments.zeros(tokens, self._model.vocabulary, self._model.width)
        upstream = UpstreamGradients(
            *(self._model, tokens, looked_at, self._seed, scratch, checkpoints, n_finished, moments),
            lambda what: on_layer(n_finished, what),
        )
        if moments is not None:
            on_layer(0, "embeddings and output matrix")
            moments.finish(self._ranks)
            done = self._quantize_outside(moments)
            if self._ranks.is_first:
                self._store.save(0, done, _OUTSIDE)
        embeddings = None
        if self._outside:
            outside = self._finished(OUTSIDE)
            embeddings = self._embeddings(outside)
            yield outside
        on_layer(first, "embeddings")
        if first:
            self._model.embed(tokens[streams.batches[0]])  # it then knows what its layers are given besides
            streams.start(checkpoints.load_streams(first, n_batches))
            yield from map(self._finished, range(first))
        else:
            streams.start(self._embedded(tokens[batch], embeddings) for batch in streams.batches)
        for index in range(first, self._model.n_layers):
            if index > first and index >= n_finished:
                checkpoints.keep_streams(index, streams)
            layer = _Layer(self._model, index, self._wanted(index), streams, self._ranks)
            if index < n_finished:
                on_layer(index, "as it was kept")
                layer.pass_on(self._finished(index).blocks)
            else:
                done = layer.quantize(upstream.take(index), self._loop, self._keep_offsets, on_layer)
                if self._ranks.is_first:
                    self._store.save(index, done)
            del layer
            yield self._finished(index)
        checkpoints.forget()

    def _batches(self, tokens: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """The numbers of this process's sequences, in batches: those that gradients are taken of, and the others."""
        if len(tokens) < self._ranks.size:
            raise TritError(
                f"{len(tokens)} sequences are too few for {self._ranks.size} processes: give more text, or start fewer"
            )
        chosen = some_sequences(tokens)
        among = set(chosen)
        mine = self._ranks.share_of([*chosen, *(number for number in range(len(tokens)) if number not in among)])
        looked_at, rest = [n for n in mine if n in among], [n for n in mine if n not in among]
        return in_batches(looked_at, tokens.shape[1]), in_batches(rest, tokens.shape[1])

    def _wanted(self, index: int) -> dict[Matrix, int]:
        """The matrices of a layer to quantize, with their depths."""
        return {matrix: depth for (number, matrix), depth in self._depths.items() if number == index}

    def _embeddings(self, outside: FinishedLayer) -> ReadRows | None:
        """What reads rows of the quantized token embeddings; None where they are not quantized."""
        for matrix, (about, _) in self._outside.items():
            if about.is_embedding and matrix in outside.blocks:
                return reader(outside.blocks[matrix], self._depths[OUTSIDE, matrix])
        return None

    def _embedded(self, tokens: torch.Tensor, embeddings: ReadRows | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first layer is given in both models, of int64 (sequences, length)."""
        full = self._model.embed(tokens)
        return full, full if embeddings is None else self._model.embed(tokens, embeddings)

    def _quantize_outside(self, moments: OutsideMoments) -> dict[str, np.ndarray]:
        """What the store keeps of the matrices outside the layers: as `_Layer.quantize` has it."""
        done: dict[str, np.ndarray] = {}
        searched = []
        for matrix, (about, load) in self._outside.items():
            depth = self._depths[OUTSIDE, matrix]
            found = quantize_outside(load(), depth, about, moments, self._model, self._loop, self._ranks)
            if found is not None:
                done[str(matrix)], some = found
                searched += [str(matrix)] if some else []
        return done | _notes([], searched)

    def _load(self, index: int) -> dict[str, np.ndarray] | None:
        """A layer of the store, if that is all that is wanted."""
        done = self._store.load(0, _OUTSIDE) if index == OUTSIDE else self._store.load(index)
        if done is None or _NOTES not in done:
            return None
        if index == OUTSIDE:
            return done
        return None if self._keep_offsets and not any(key.startswith(_OFFSET) for key in done) else done

    def finished(self, index: int) -> FinishedLayer:
        """A layer that has come. In the first process only: the others are not asked."""
        return self._as_finished(index, self._load(index))

    def _finished(self, index: int) -> FinishedLayer:
        """A layer of the store, which the first process sends to the others."""
        return self._as_finished(index, self._ranks.from_first(self._load(index) if self._ranks.is_first else None))

    def _as_finished(self, index: int, done: Mapping[str, np.ndarray] | None) -> FinishedLayer:
        assert done is not None
        notes = json.loads(done[_NOTES].tobytes())
        mine = self._wanted(index)
        return FinishedLayer(
            index,
            {matrix: done[str(matrix)] for matrix in mine if str(matrix) in done},
            {matrix: done[key] for matrix in mine if (key := _OFFSET + str(matrix)) in done},
            frozenset(matrix for matrix in mine if str(matrix) in notes["searched"]),
            tuple(notes["remarks"]),
        )


class _Layer:
    """One layer at work."""

    def __init__(
        self, model: LayeredModel, index: int, depths: Mapping[Matrix, int], streams: Streams, ranks: Ranks
    ) -> None:
        """Load the layer. Args: as `LayerQuantizer` has them; `depths` of its own matrices."""
        self._ranks = ranks
        self._model = model
        self._index = index
        self._depths = depths
        self._streams = streams
        full = model.working_copy(index)
        self._weights = {matrix: matrix.of(full) for matrix in depths}  # float32
        for name in {matrix.name for matrix in depths}:  # else each product would cast them again
            parameter = full.get_parameter(name)
            parameter.data = parameter.data.to(model.product_type)
        self._quantized = copy.deepcopy(full)
        self._full_pass = FullPass(model, index, full, streams)
        self._done: dict[str, np.ndarray] = {}
        self._searched: list[str] = []
        self._few: list[int] = []  # tokens that came to experts' matrices, where they were too few

    def pass_on(self, blocks: Mapping[Matrix, np.ndarray]) -> None:
        """Move both streams behind the layer, which is finished already: to the same bits as `quantize`."""
        order, closing = self._stages()
        self._full_pass.run([], {}, [], lambda *_: None)
        passes = self._quantized_pass(closing)
        for stage in order:
            passes.skip(stage)
            for matrix in stage:
                if matrix in blocks:
                    self._set_weights(matrix, blocks[matrix])
        passes.finish()

    def quantize(
        self, upstream: Mapping[int, torch.Tensor], loop: ColumnLoop, keep_offsets: bool, on_layer: OnLayer
    ) -> dict[str, np.ndarray]:
        """Quantize the layer, and move both streams behind it.

        Args:
            upstream: the gradients for its output, by batch.

        Returns:
            What the store keeps: blocks, offsets and notes.
        """
        on_layer(self._index, "full precision")
        order, closing = self._stages()
        of_all = [matrix for matrix in self._depths if not matrix.is_expert]  # few tokens come to an expert
        outputs = OutputMoments()
        self._full_pass.run(order[:-1] if closing else order, upstream, of_all, outputs.add)
        outputs.finish({m: len(self._weights[m]) for m in of_all}, self._model.device, self._ranks)
        passes = self._quantized_pass(closing)
        for number, stage in enumerate(order):
            on_layer(self._index, ", ".join(map(str, stage[:3])))
            later = {matrix for members in order[number + 1 :] for matrix in members}
            moments = passes.moments(stage, later)
            for same in _by_moments(moments).values():
                self._quantize(same, moments[same[0]], outputs, loop, keep_offsets)
            del moments
        passes.finish()
        return self._done | _notes(self._remarks(), self._searched)

    def _stages(self) -> tuple[Sequence[Sequence[Matrix]], Matrix | None]:
        """The stages, of the layer before any matrix is quantized, and its closing matrix.

        That is the one of the last stage, if it is alone and adds to the output: it can mend all errors of the layer.
        """
        hidden = self._streams.quantized[0].get()[:1].to(self._model.device)
        order = stages(
            self._quantized, list(self._depths), lambda: self._model.run(self._index, self._quantized, hidden)
        )
        closing = None
        if order and len(order[-1]) == 1 and not (matrix := order[-1][0]).is_expert:
            adds = adds_to_output(self._model, self._index, self._quantized, matrix, hidden)
            closing = matrix if adds else None
        return self._ranks.from_first((order, closing))

    def _quantized_pass(self, closing: Matrix | None) -> QuantizedPass:
        return QuantizedPass(self._model, self._index, self._quantized, self._streams, self._full_pass, closing)

    def _remarks(self) -> list[str]:
        if not self._few:
            return []
        return [
            f"layer {self._index}: at most {max(self._few)} tokens came to {len(self._few)} of the experts' matrices, "
            "so they went by weighted search: a longer text (--calib-tokens) reaches more"
        ]

    def _quantize(
        self,
        matrices: Sequence[Matrix],
        moments: Moments,
        outputs: OutputMoments,
        loop: ColumnLoop,
        keep_offsets: bool,
    ) -> None:
        """Quantize matrices with the same inputs, those of the same depth together.

        A matrix that its type cannot hold is left out: the writer stores it in another type.
        """
        moments.finish(self._ranks)
        importance = moments.hessian.diagonal().cpu().numpy().copy() if moments.n_tokens else None
        matrices = [matrix for matrix in matrices if matrix.is_expert or self._is_reached(matrix)]
        if matrices and matrices[0].is_expert and moments.n_tokens < _LEAST_TOKENS:
            self._few.append(moments.n_tokens)
            self._search(matrices, importance)
            return
        groups: dict[int, list[Matrix]] = {}
        for matrix in matrices:
            groups.setdefault(self._depths[matrix], []).append(matrix)
        solver = Solver(moments, self._model.product_type, loop, self._ranks)
        aims = {
            depth: solver.aims(torch.cat([self._weights[matrix] for matrix in group]), moments.target)
            for depth, group in groups.items()
        }
        for depth, group in groups.items():
            of_rows = [block for matrix in group for block in outputs.blocks.pop(matrix, ())]
            try:
                rounded = solver.quantize(aims.pop(depth), depth, of_rows, keep_offsets)
            except (RangeError, NotFiniteError):  # the errors of the columns before have blown up
                self._search(group, importance)
                continue
            firsts = np.cumsum([len(self._weights[matrix]) for matrix in group])[:-1]
            data = pack(rounded.blocks).reshape(sum(len(self._weights[matrix]) for matrix in group), -1)
            for matrix, some in zip(group, np.split(data, firsts), strict=True):
                self._set_weights(matrix, some)
                del self._weights[matrix]
                self._done[str(matrix)] = some
            if rounded.offset is not None:
                for matrix, offset in zip(group, rounded.offset.tensor_split(firsts.tolist()), strict=True):
                    self._done[_OFFSET + str(matrix)] = offset.to(torch.float16).cpu().numpy()

    def _is_reached(self, matrix: Matrix) -> bool:
        """Whether the type reaches down to the weights; the experts of a tensor are judged together, by the writer."""
        return encoder.reaches(self._weights[matrix].cpu().numpy(), self._depths[matrix])

    def _search(self, matrices: Sequence[Matrix], importance: np.ndarray | None) -> None:
        for matrix in matrices:
            with suppress(RangeError):
                data = encoder.quantize(self._weights[matrix].cpu().numpy(), self._depths[matrix], importance)
                self._set_weights(matrix, data)
                self._done[str(matrix)] = data
                self._searched.append(str(matrix))

    def _set_weights(self, matrix: Matrix, data: np.ndarray) -> None:
        """Give the quantized layer the weights of blocks uint8 (rows, bytes per row)."""
        depth = self._depths[matrix]
        weights = matrix.of(self._quantized)
        blocks = unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth]))
        weights.copy_(torch.from_numpy(blocks.decode()).view_as(weights))


def _by_moments(moments: Mapping[Matrix, Moments]) -> dict[int, list[Matrix]]:
    """Matrices with the same moments."""
    found: dict[int, list[Matrix]] = {}
    for matrix, one in moments.items():
        found.setdefault(id(one), []).append(matrix)
    return found


def _notes(remarks: Sequence[str], searched: Sequence[str]) -> dict[str, np.ndarray]:
    """What the store keeps besides blocks."""
    notes = {"remarks": remarks, "searched": searched}
    return {_NOTES: np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)}
