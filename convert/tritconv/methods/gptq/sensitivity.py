"""What it costs a model to store one of its matrices in a type: what mixed depth weighs against the bytes.

The loss is the increase of the KL divergence from the full-precision model, to second order (the Fisher information):
with x the input of a matrix at a token, g the gradient for its output there (see `gradients`), an error dW of the
matrix costs (g . dW x)^2 / 2. The errors of different rows have nothing to do with each other, so the square is taken
row by row, which needs less text, and of some rows only. The errors are those that gptq makes of the matrix alone, on
tokens that it did not see; those of an expert, to which few tokens come, are those of the search, on the same tokens.
Outside the layers, `OutsideMatrix` says what errors cost.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from gguf import GGMLQuantizationType

from tritconv.allocate import CANDIDATES
from tritconv.calibration.context import Context
from tritconv.calibration.gradients import LayerGradients, Progress, draw, gradients, stride
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.moments import Moments
from tritconv.calibration.outside import OutsideMatrix, OutsideMoments
from tritconv.calibration.ranks import ALONE
from tritconv.calibration.rows import OUTSIDE, Place, RowMap
from tritconv.calibration.scratch import Scratch
from tritconv.calibration.store import LayerStore
from tritconv.methods.gptq.columns import ColumnLoop
from tritconv.methods.gptq.matrix import Solver
from tritconv.methods.gptq.outside import holds, solvers
from tritcore import encoder, ggml
from tritcore.errors import NotFiniteError, RangeError
from tritcore.files import sha256_of_bytes
from tritcore.format import BLOCK_SIZE
from tritcore.gguf_types import DEPTH_OF_TYPE

LOSS_TOKENS = 4096  # enough to tell the matrices apart
_SEEN = 0.75  # the share of them that gptq sees
_SOME_ROWS = 512  # of a tensor's share of a matrix
_SOME_LAYERS = 8  # that stand for all
_SOME_OUTSIDE = 8192  # rows of a matrix outside the layers
_OUTSIDE = "outside"  # the kind, in the store, of what lies outside the layers

Types = Sequence[GGMLQuantizationType]
Losses = dict[str, dict[GGMLQuantizationType, float]]
Outside = Mapping[str, tuple[OutsideMatrix, Callable[[], np.ndarray]]]  # with what loads the values (rows, n)


def sensitivities(context: Context, types: Types, progress: Progress, *, of_all: bool) -> Losses:
    """The predicted losses of the tensors that are reached, in nats per token.

    Args:
        types: of the layers. What lies outside may have any of `CANDIDATES`.
        of_all: whether the losses of all layers are wanted. A few stand for all, if not.

    Raises:
        TritError: the disk is full.
    """
    if not context.ranks.is_first:
        return context.ranks.from_first({})
    step = 1 if of_all else -(-context.model.n_layers // _SOME_LAYERS)
    wanted = {*range(step // 2, context.model.n_layers, step)}
    layers = {name: rows for name, rows in context.maps.items() if rows.places[0][0] in wanted}
    loads = {tensor.name: tensor.load for tensor in context.source.tensors}
    outside = {name: (matrix, loads[name]) for name, matrix in context.outside.items()}
    store = context.store("sensitivity", matrices=origins(layers, types))
    measurement = Measurement(context.model, layers, outside, context.tokens, context.inputs.seed, types, progress)
    return context.ranks.from_first(measurement.losses(store, context.memory))


def origins(tensors: Mapping[str, RowMap], types: Types) -> tuple[tuple[str, str], ...]:
    """What losses in the cache depend on: the types, and tensors with a digest of where their rows come from."""
    names = ",".join(qtype.name for qtype in types)
    return (("types", names), *((name, _digest(rows)) for name, rows in sorted(tensors.items())))


def _digest(rows: RowMap) -> str:
    places = repr([(number, str(matrix)) for number, matrix in rows.places])
    return sha256_of_bytes(places.encode(), rows.place.tobytes(), rows.row.tobytes())


class Measurement:
    """Weighs the errors of the matrices' products by the gradients for them."""

    def __init__(
        self,
        model: LayeredModel,
        tensors: Mapping[str, RowMap],
        outside: Outside,
        tokens: torch.Tensor,
        seed: int,
        types: Types,
        progress: Progress,
    ) -> None:
        """Prepare.

        Args:
            tensors: of the layers by name, where their rows come from.
            outside: tensors outside the layers, by name.
            tokens: int64 (sequences, length). Some of the sequences are used.
            seed: of the labels.
            types: of the layers; what lies outside may have any of `CANDIDATES`.
        """
        some = range(0, len(tokens), stride(tokens, LOSS_TOKENS))
        self._model = model
        self._all_tokens, self._tokens = tokens, tokens[some]
        self._draws = draw(tokens, seed)[some]
        self._types = types
        self._progress = progress
        self._tensors = tensors
        self._outside = outside
        self._loop = ColumnLoop(torch.get_num_threads())
        self._rows: dict[Place, dict[str, np.ndarray]] = defaultdict(dict)  # of each tensor, in a matrix
        for name, rows in tensors.items():
            for number, place in enumerate(rows.places):
                self._rows[place][name] = rows.row[rows.place == number]

    def losses(self, store: LayerStore, memory: int) -> Losses:
        """The predicted losses of the tensors, in nats per token, in each type that can hold them.

        Args:
            store: has the losses, or gets them.
            memory: bytes for hidden states; those that take more are in a file.

        Returns:
            By tensor and type. A tensor that no token reached is left out, as is one whose rows are no multiple of 64.
        """
        layers = range(self._model.n_layers)
        kept = {index: store.load(index) for index in layers}
        kept[OUTSIDE] = store.load(0, _OUTSIDE)
        if None in kept.values():
            scratch = Scratch(memory, store.entry.folder)
            try:
                for index, losses in self._run(scratch):
                    store.save(max(index, 0), losses, _OUTSIDE if index == OUTSIDE else "layer")
                    kept[index] = losses
            finally:
                scratch.close()
        return {
            name: {qtype: loss for qtype, loss in zip(some, losses.tolist(), strict=True) if math.isfinite(loss)}
            for some, numbers in ((CANDIDATES, [OUTSIDE]), (self._types, layers))
            for index in numbers
            for name, losses in (kept[index] or {}).items()
        }

    def _run(self, scratch: Scratch) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Layers, the last one first, then what lies outside: float64 by tensor and type, NaN where it does not fit."""
        model, moments = self._model, None
        if self._outside:
            moments = OutsideMoments.zeros(self._all_tokens, model.vocabulary, model.width)
        steps = gradients(model, self._tokens, self._draws, self._matrices, self._progress, scratch, moments)
        for found in steps:
            yield found.index, self._losses(found)
        if moments is not None:
            self._progress("embeddings and output matrix")
            moments.finish(ALONE)
        yield OUTSIDE, {name: self._of_outside(*about, moments) for name, about in self._outside.items() if moments}

    def _matrices(self, index: int, layer: torch.nn.Module) -> list[Matrix]:
        """Those that tensors are made of, as far as blocks fit into their rows."""
        mine = (matrix for number, matrix in self._rows if number == index)
        return [matrix for matrix in mine if matrix.of(layer).shape[1] % BLOCK_SIZE == 0]

    def _losses(self, found: LayerGradients) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = defaultdict(list)
        for matrix, (inputs, output_gradients) in found.products.items():
            weights, rows = matrix.of(found.layer), self._rows[found.index, matrix]
            if matrix.is_expert:
                losses = self._of_expert(weights, inputs, output_gradients)
                for name, mine in rows.items():
                    parts[name].append(losses[:, mine].sum(axis=1))
            else:
                for name, values in self._of_matrix(weights, inputs, output_gradients, rows).items():
                    parts[name].append(values)
        # experts that no token reached count like the mean of the others
        return {name: np.mean(some, axis=0) * len(self._tensors[name].places) for name, some in parts.items()}

    def _of_matrix(
        self,
        weights: torch.Tensor,
        inputs: torch.Tensor,
        output_gradients: torch.Tensor,
        rows: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """float64 (types,) for each tensor that has rows of a matrix.

        Args:
            weights: float32 (rows, n).
            inputs: (tokens, n).
            output_gradients: (tokens, rows).
            rows: of each tensor, by name.
        """
        some = {name: mine[:: -(-len(mine) // _SOME_ROWS)] for name, mine in rows.items()}
        picked = np.unique(np.concatenate(list(some.values())))
        at = torch.from_numpy(picked).to(weights.device)
        weights = weights[at]
        n_seen = int(_SEEN * len(inputs))
        moments = Moments.zeros(weights.shape[1], weights.device)
        moments.add(inputs[:n_seen].to(self._model.product_type))
        moments.finish(ALONE)
        importance = moments.hessian.diagonal().cpu().numpy().copy()
        solver = Solver(moments, self._model.product_type, self._loop)
        x, g = inputs[n_seen:], output_gradients[n_seen:, at]
        losses = {name: np.full(len(self._types), np.nan) for name in rows}
        for number, qtype in enumerate(self._types):
            depth = DEPTH_OF_TYPE.get(qtype)
            if depth is not None and not encoder.reaches(weights.cpu().numpy(), depth):
                continue
            stored = _by_gptq(solver, weights, qtype, importance)
            if stored is not None:
                error = stored.to(weights.device) - weights
                costs = (x @ error.to(x.dtype).T).mul_(g).float().square_().mean(dim=0).cpu().numpy() / 2
                for name, mine in some.items():
                    mean = costs[np.searchsorted(picked, mine)].mean(dtype=np.float64)
                    losses[name][number] = mean * len(rows[name])
        return losses

    def _of_expert(self, weights: torch.Tensor, inputs: torch.Tensor, output_gradients: torch.Tensor) -> np.ndarray:
        """float64 (types, rows). Args: as `_of_matrix` has them."""
        importance = inputs.float().square().sum(dim=0).cpu().numpy()
        losses = np.full((len(self._types), len(weights)), np.nan)
        for number, qtype in enumerate(self._types):
            with suppress(RangeError):
                error = (
                    torch.from_numpy(_by_search(weights.cpu().numpy(), qtype, importance)).to(weights.device) - weights
                )
                product = inputs @ error.to(inputs.dtype).T
                losses[number] = product.mul_(output_gradients).float().square_().sum(dim=0).cpu()
        return losses / (2 * self._tokens.numel())

    def _of_outside(self, matrix: OutsideMatrix, load: Callable[[], np.ndarray], moments: OutsideMoments) -> np.ndarray:
        """float64 (candidates,). Some rows stand for all."""
        values = load()
        rows, factors = matrix.sample(values, moments, _SOME_OUTSIDE)
        fitting = [
            number
            for number, qtype in enumerate(CANDIDATES)
            if (depth := DEPTH_OF_TYPE.get(qtype)) is None or holds(values, depth)
        ]
        losses = np.full(len(CANDIDATES), np.nan)
        losses[fitting] = 0.0
        for members, solver, importance in solvers(matrix, moments, self._model, self._loop, ALONE):
            drawn = torch.isin(rows, members)
            mine = rows[drawn]
            if not len(mine):
                continue
            weights = torch.from_numpy(values[mine.numpy()].astype(np.float32)).to(self._model.device)
            for number in fitting:
                stored = _by_gptq(solver, weights, CANDIDATES[number], importance)
                if stored is None:
                    losses[number] = np.nan
                else:
                    error = stored - weights.cpu()
                    losses[number] += float(matrix.losses(error, mine, moments) @ factors[drawn])
        return losses


def _by_gptq(
    solver: Solver, weights: torch.Tensor, qtype: GGMLQuantizationType, importance: np.ndarray
) -> torch.Tensor | None:
    """The values that a type has for weights, both float32 (rows, n); None where they lie above its range."""
    depth = DEPTH_OF_TYPE.get(qtype)
    values = weights.cpu().numpy()
    if depth is None:
        return torch.from_numpy(_by_search(values, qtype, importance))
    try:
        blocks = solver.quantize(weights.T.contiguous(), depth).blocks
    except (RangeError, NotFiniteError):
        try:
            return torch.from_numpy(_by_search(values, qtype, importance))
        except RangeError:
            return None
    return torch.from_numpy(blocks.decode()).view(weights.shape)


def _by_search(weights: np.ndarray, qtype: GGMLQuantizationType, importance: np.ndarray) -> np.ndarray:
    """As `_by_gptq`. Raises RangeError."""
    depth = DEPTH_OF_TYPE.get(qtype)
    data = ggml.quantize(weights, qtype) if depth is None else encoder.quantize(weights, depth, importance)
    return ggml.dequantize(data, qtype)
