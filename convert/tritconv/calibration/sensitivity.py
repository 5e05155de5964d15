"""What it costs a model to store one of its matrices in a type: what mixed depth weighs against the bytes.

The loss is the increase of the KL divergence from the full-precision model, to second order (the Fisher information):
labels are drawn from the model's own predictions, and with x the input of a matrix at a token, g the gradient of the
labels' log-likelihood with respect to its output there, an error dW of the matrix costs (g . dW x)^2 / 2. The errors of
different rows have nothing to do with each other, so the square is taken row by row, which needs less text. One pass
through the layers and one back give x and g of all matrices; memory holds one layer, and the hidden states.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch.nn.functional import cross_entropy

from tritconv import ggml
from tritconv.calibration.matrices import Matrix, Recorder, matrices_of
from tritconv.calibration.model import LayeredModel, batches
from tritconv.calibration.rows import Place, RowMap
from tritconv.calibration.store import LayerStore, digest_of_tokens
from tritconv.errors import RangeError
from tritconv.format import BLOCK_SIZE
from tritconv.gguf_types import DEPTH_OF_TYPE, TRIT_TYPE
from tritconv.methods import search

CANDIDATES = (TRIT_TYPE[2], TRIT_TYPE[3], TRIT_TYPE[4], GGMLQuantizationType.Q8_0)

_VERSION = 1  # of the losses: what an older method kept is not taken for this one's
_TOKENS = 4096  # enough to tell the matrices apart

Losses = dict[str, dict[GGMLQuantizationType, float]]
Progress = Callable[[str], None]  # called before each step with what it is


def open_store(model: str, tokens: torch.Tensor, seed: int) -> LayerStore:
    """Where the losses are kept.

    Args:
        model: a digest of its files.
        tokens, seed: as for `measure`.
    """
    text = digest_of_tokens(tokens)
    return LayerStore({"what": "sensitivity", "version": _VERSION, "model": model, "tokens": text, "seed": seed})


def measure(
    model: LayeredModel,
    tensors: Mapping[str, RowMap],
    tokens: torch.Tensor,
    seed: int,
    store: LayerStore,
    progress: Progress,
) -> Losses:
    """The predicted losses of tensors, in nats per token, in each type that can hold them.

    Args:
        tensors: by name, where their rows come from.
        tokens: int64 (sequences, length). Some of the sequences are used.
        seed: of the labels.
        store: has the losses, or gets them.

    Returns:
        By tensor and type. A tensor that no token reached is left out, as is one whose rows are no multiple of 64.
    """
    layers = range(len(model.layers))
    kept = {index: store.load(index) for index in layers}
    if None in kept.values():
        some = tokens[:: math.ceil(tokens.numel() / max(_TOKENS, tokens.shape[1]))]
        for index, losses in _Measurement(model, tensors, some, seed, progress).run():
            store.save(index, losses)
            kept[index] = losses
    return {
        name: {qtype: loss for qtype, loss in zip(CANDIDATES, losses.tolist(), strict=True) if math.isfinite(loss)}
        for index in layers
        for name, losses in (kept[index] or {}).items()
    }


class _Trace(Recorder):
    """Within its context, collects the inputs of a layer's matrices, and the gradients for their outputs.

    Attributes:
        products: of each matrix: pairs of (tokens, n) and (tokens, rows), in the type that products are computed in.
    """

    def __init__(self, layer: torch.nn.Module, matrices: Sequence[Matrix]) -> None:
        super().__init__(layer, matrices, lambda matrix, x: self._begun.append((matrix, x)))
        self.products: dict[Matrix, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._begun: list[tuple[Matrix, torch.Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        while self._begun:
            self._await_gradient(*self._begun.pop(), out)
        return out

    def _await_gradient(self, matrix: Matrix, x: torch.Tensor, out: torch.Tensor) -> None:
        x = x.to(out.dtype)
        out.register_hook(lambda g: self.products[matrix].append((x, g.detach().reshape(-1, g.shape[-1]))))


class _Measurement:
    """A pass through the layers, and one back."""

    def __init__(
        self, model: LayeredModel, tensors: Mapping[str, RowMap], tokens: torch.Tensor, seed: int, progress: Progress
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._seed = seed
        self._progress = progress
        self._tensors = tensors
        self._rows: dict[Place, dict[str, np.ndarray]] = defaultdict(dict)  # of each tensor, in a matrix
        for name, rows in tensors.items():
            for number, place in enumerate(rows.places):
                self._rows[place][name] = rows.row[rows.place == number]

    def run(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Layers, the last one first: float64 (candidates,) for each tensor, NaN for a type that cannot hold it."""
        n_layers = len(self._model.layers)
        self._progress("embeddings")
        hidden = [self._model.embed(self._tokens)]
        for index in range(n_layers):
            self._progress(f"sensitivity: forward, layer {index + 1}/{n_layers}")
            hidden.append(self._model.run_all(index, self._model.working_copy(index), hidden[-1]))
        self._progress("sensitivity: predictions")
        gradient = self._gradient(hidden.pop())
        for index in reversed(range(n_layers)):
            self._progress(f"sensitivity: back, layer {index + 1}/{n_layers}")
            layer = self._model.working_copy(index)
            trace = _Trace(layer, self._matrices(index, layer))
            gradient = self._back(index, layer, hidden.pop(), gradient, trace)
            yield index, self._losses(index, layer, trace)

    def _matrices(self, index: int, layer: torch.nn.Module) -> list[Matrix]:
        """Those that tensors are made of, as far as blocks fit into their rows."""
        mine = (matrix for matrix in matrices_of(layer) if (index, matrix) in self._rows)
        return [matrix for matrix in mine if matrix.of(layer).shape[1] % BLOCK_SIZE == 0]

    def _gradient(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the negative log-likelihood of labels that the model draws, for the last layer's output."""
        generator = torch.Generator().manual_seed(self._seed)
        found = []
        for sequence in hidden.split(1):
            sequence.requires_grad_()
            logits = self._model.logits(sequence)[0]
            labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
            found += torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), sequence)
        return torch.cat(found)

    def _back(
        self, index: int, layer: torch.nn.Module, hidden: torch.Tensor, gradient: torch.Tensor, trace: _Trace
    ) -> torch.Tensor:
        """The gradient for a layer's input, given that for its output."""
        found = []
        for inputs, upstream in zip(batches(hidden), batches(gradient), strict=True):
            inputs = inputs.to(self._model.device).requires_grad_()
            with trace:
                out = self._model.run(index, layer, inputs)
            (downstream,) = torch.autograd.grad(out, inputs, upstream.to(out.device))
            found.append(downstream.cpu())
        return torch.cat(found)

    def _losses(self, index: int, layer: torch.nn.Module, trace: _Trace) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = defaultdict(list)
        for matrix, products in trace.products.items():
            inputs, gradients = (torch.cat(side) for side in zip(*products, strict=True))
            losses = _squares(matrix.of(layer), inputs, gradients) / (2 * self._tokens.numel())
            for name, rows in self._rows[index, matrix].items():
                parts[name].append(losses[:, rows].sum(axis=1))
        # experts that no token reached count like the mean of the others
        return {name: np.mean(some, axis=0) * len(self._tensors[name].places) for name, some in parts.items()}


def _squares(weights: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """The sums over the tokens of (g . dW x)^2, row by row, dW the error of a matrix in each type.

    Args:
        weights: float32 (rows, n).
        inputs: (tokens, n).
        gradients: (tokens, rows).

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
                found[number] = product.mul_(gradients).float().square_().sum(dim=0).cpu()
    return found


def _stored(weights: np.ndarray, qtype: GGMLQuantizationType, importance: np.ndarray) -> np.ndarray:
    """The values that a type has for weights, both float32 (rows, n)."""
    depth = DEPTH_OF_TYPE.get(qtype)
    data = ggml.quantize(weights, qtype) if depth is None else search.quantize(weights, depth, importance)
    return quants.dequantize(data, qtype)
