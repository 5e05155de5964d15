"""What it costs a model to store one of its matrices in a type: what mixed depth weighs against the bytes.

The loss is the increase of the KL divergence from the full-precision model, to second order (the Fisher information):
with x the input of a matrix at a token, g the gradient for its output there (see `gradients`), an error dW of the
matrix costs (g . dW x)^2 / 2. The errors of different rows have nothing to do with each other, so the square is taken
row by row, which needs less text.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from gguf import GGMLQuantizationType

from tritconv.allocate import CANDIDATES
from tritconv.calibration.gradients import LayerGradients, Progress, draw, gradients, stride
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.rows import Place, RowMap
from tritconv.calibration.scratch import Scratch
from tritconv.calibration.store import LayerStore
from tritcore import encoder, ggml
from tritcore.errors import RangeError
from tritcore.files import sha256_of_bytes
from tritcore.format import BLOCK_SIZE
from tritcore.gguf_types import DEPTH_OF_TYPE

_TOKENS = 4096  # enough to tell the matrices apart

Losses = dict[str, dict[GGMLQuantizationType, float]]


def origins(tensors: Mapping[str, RowMap]) -> tuple[tuple[str, str], ...]:
    """The tensors by name, with a digest of where their rows come from: losses in the cache depend on it."""
    return tuple((name, _digest(rows)) for name, rows in sorted(tensors.items()))


def _digest(rows: RowMap) -> str:
    places = repr([(number, str(matrix)) for number, matrix in rows.places])
    return sha256_of_bytes(places.encode(), rows.place.tobytes(), rows.row.tobytes())


def measure(
    model: LayeredModel,
    tensors: Mapping[str, RowMap],
    tokens: torch.Tensor,
    seed: int,
    store: LayerStore,
    memory: int,
    progress: Progress,
) -> Losses:
    """The predicted losses of tensors, in nats per token, in each type that can hold them.

    Args:
        tensors: by name, where their rows come from.
        tokens: int64 (sequences, length). Some of the sequences are used.
        seed: of the labels.
        store: has the losses, or gets them.
        memory: bytes for hidden states; those that take more are in a file.

    Returns:
        By tensor and type. A tensor that no token reached is left out, as is one whose rows are no multiple of 64.
    """
    layers = range(model.n_layers)
    kept = {index: store.load(index) for index in layers}
    if None in kept.values():
        scratch = Scratch(memory, store.entry.folder)
        try:
            for index, losses in _Measurement(model, tensors, tokens, seed, progress).run(scratch):
                store.save(index, losses)
                kept[index] = losses
        finally:
            scratch.close()
    return {
        name: {qtype: loss for qtype, loss in zip(CANDIDATES, losses.tolist(), strict=True) if math.isfinite(loss)}
        for index in layers
        for name, losses in (kept[index] or {}).items()
    }


class _Measurement:
    """Weighs the errors of the matrices' products by the gradients for them."""

    def __init__(
        self, model: LayeredModel, tensors: Mapping[str, RowMap], tokens: torch.Tensor, seed: int, progress: Progress
    ) -> None:
        some = range(0, len(tokens), stride(tokens, _TOKENS))
        self._model = model
        self._tokens = tokens[some]
        self._draws = draw(tokens, seed)[some]
        self._progress = progress
        self._tensors = tensors
        self._rows: dict[Place, dict[str, np.ndarray]] = defaultdict(dict)  # of each tensor, in a matrix
        for name, rows in tensors.items():
            for number, place in enumerate(rows.places):
                self._rows[place][name] = rows.row[rows.place == number]

    def run(self, scratch: Scratch) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Layers, the last one first: float64 (candidates,) for each tensor, NaN for a type that cannot hold it."""
        for found in gradients(self._model, self._tokens, self._draws, self._matrices, self._progress, scratch):
            yield found.index, self._losses(found)

    def _matrices(self, index: int, layer: torch.nn.Module) -> list[Matrix]:
        """Those that tensors are made of, as far as blocks fit into their rows."""
        mine = (matrix for number, matrix in self._rows if number == index)
        return [matrix for matrix in mine if matrix.of(layer).shape[1] % BLOCK_SIZE == 0]

    def _losses(self, found: LayerGradients) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = defaultdict(list)
        for matrix, (inputs, output_gradients) in found.products.items():
            weights = matrix.of(found.layer)
            losses = _squares(weights, inputs, output_gradients) / (2 * self._tokens.numel())
            if not matrix.is_expert:  # the experts of a tensor are judged together, by the writer
                losses[[not _reaches(weights, qtype) for qtype in CANDIDATES]] = np.nan
            for name, rows in self._rows[found.index, matrix].items():
                parts[name].append(losses[:, rows].sum(axis=1))
        # experts that no token reached count like the mean of the others
        return {name: np.mean(some, axis=0) * len(self._tensors[name].places) for name, some in parts.items()}


def _squares(weights: torch.Tensor, inputs: torch.Tensor, output_gradients: torch.Tensor) -> np.ndarray:
    """The sums over the tokens of (g . dW x)^2, row by row, dW the error of a matrix in each type.

    Args:
        weights: float32 (rows, n).
        inputs: (tokens, n).
        output_gradients: (tokens, rows).

    Returns:
        float64 (candidates, rows), NaN for a type that cannot hold the matrix.
    """
    importance = inputs.float().square().sum(dim=0).cpu().numpy()
    values = weights.cpu().numpy()
    found = np.full((len(CANDIDATES), len(weights)), np.nan)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the encoders let go of Python's lock
        futures = [pool.submit(_stored, values, qtype, importance) for qtype in CANDIDATES]
        for number, future in enumerate(futures):
            with suppress(RangeError):
                error = torch.from_numpy(future.result()).to(weights.device) - weights
                product = inputs @ error.to(inputs.dtype).T
                found[number] = product.mul_(output_gradients).float().square_().sum(dim=0).cpu()
    return found


def _reaches(weights: torch.Tensor, qtype: GGMLQuantizationType) -> bool:
    """Whether weights are not too small for a type."""
    depth = DEPTH_OF_TYPE.get(qtype)
    return depth is None or encoder.reaches(weights.cpu().numpy(), depth)


def _stored(weights: np.ndarray, qtype: GGMLQuantizationType, importance: np.ndarray) -> np.ndarray:
    """The values that a type has for weights, both float32 (rows, n)."""
    depth = DEPTH_OF_TYPE.get(qtype)
    data = ggml.quantize(weights, qtype) if depth is None else encoder.quantize(weights, depth, importance)
    return ggml.dequantize(data, qtype)
