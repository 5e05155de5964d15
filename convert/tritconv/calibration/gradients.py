"""What the outputs of matrices do to the predictions: gradients, a layer at a time, from the last to the first.

The loss is that of labels drawn from the model's own predictions. The mean of gradient times gradient is then the
Fisher information, and half of it the second-order term of the KL divergence from the full-precision model.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from tritconv.calibration.matrices import Matrix, Product, Recorder
from tritconv.calibration.model import LayeredModel, batches

Progress = Callable[[str], None]  # called before each step with what it is
Products = Mapping[Matrix, tuple[torch.Tensor, torch.Tensor]]  # inputs (tokens, n) and gradients (tokens, rows)
ChooseMatrices = Callable[[int, torch.nn.Module], Sequence[Matrix]]  # of a layer and its number


@dataclass(frozen=True)
class LayerGradients:
    """Of one layer.

    Attributes:
        layer: a copy in float32, on the model's device.
        upstream: the gradient for the layer's output, float32 (sequences, length, width), on the CPU.
        products: of the matrices that were chosen, as far as a token reached them.
    """

    index: int
    layer: torch.nn.Module
    upstream: torch.Tensor
    products: Products


def stride(tokens: torch.Tensor, wanted: int) -> int:
    """How far apart sequences are that have about the tokens wanted between them."""
    return math.ceil(tokens.numel() / max(wanted, tokens.shape[1]))


def gradients(
    model: LayeredModel, tokens: torch.Tensor, seed: int, choose: ChooseMatrices, progress: Progress
) -> Iterator[LayerGradients]:
    """One pass through the layers and one back, the last layer first. Memory holds a layer, and the hidden states.

    Args:
        tokens: int64 (sequences, length).
        seed: of the labels.
        choose: whose products are wanted.
    """
    n_layers = len(model.layers)
    progress("embeddings")
    hidden = [model.embed(tokens)]
    for index in range(n_layers):
        progress(f"gradients: forward, layer {index + 1}/{n_layers}")
        hidden.append(model.run_all(index, model.working_copy(index), hidden[-1]))
    progress("gradients: predictions")
    upstream = _of_predictions(model, hidden.pop(), seed)
    for index in reversed(range(n_layers)):
        progress(f"gradients: back, layer {index + 1}/{n_layers}")
        layer = model.working_copy(index)
        downstream, products = go_back(model, index, layer, choose(index, layer), hidden.pop(), upstream)
        yield LayerGradients(index, layer, upstream, products)
        upstream = downstream


def go_back(
    model: LayeredModel,
    index: int,
    layer: torch.nn.Module,
    matrices: Sequence[Matrix],
    hidden: torch.Tensor,
    upstream: torch.Tensor,
) -> tuple[torch.Tensor, Products]:
    """The gradient for a layer's input, and the products of some matrices.

    Args:
        hidden: the layer's input, (sequences, length, width), on the CPU.
        upstream: the gradient for its output, the same.

    Returns:
        float32 (sequences, length, width) on the CPU; products in the type that they are computed in, on the device.
    """
    found = []
    trace = _Trace(layer, matrices)
    for inputs, gradient in zip(batches(hidden), batches(upstream), strict=True):
        inputs = inputs.to(model.device).requires_grad_()
        with trace:
            out = model.run(index, layer, inputs)
        (downstream,) = torch.autograd.grad(out, inputs, gradient.to(out))
        found.append(downstream.cpu())
    products = {}
    for matrix, pairs in trace.products.items():
        x, g = zip(*pairs, strict=True)
        products[matrix] = torch.cat(x), torch.cat(g)
    return torch.cat(found), products


class _Trace(Recorder):
    """Within its context, collects the inputs of a layer's matrices, and the gradients for their outputs.

    Attributes:
        products: of each matrix: pairs of (tokens, n) and (tokens, rows), in the type that products are computed in.
    """

    def __init__(self, layer: torch.nn.Module, matrices: Sequence[Matrix]) -> None:
        super().__init__(layer, matrices, lambda matrix, x: None)
        self.products: dict[Matrix, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def _after(self, product: Product, out: torch.Tensor) -> None:
        x = product.inputs.to(out.dtype)
        if len(x):
            out.register_hook(lambda g: self.products[product.matrix].append((x, product.part(g.detach()))))


def _of_predictions(model: LayeredModel, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """Of the negative log-likelihood of labels that the model draws, for the last layer's output."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for sequence in hidden.split(1):
        sequence.requires_grad_()
        logits = model.logits(sequence)[0]
        labels = _drawn(logits.detach(), generator)
        found += torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), sequence)
    return torch.cat(found)


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels (tokens,) from predictions (tokens, vocabulary), much faster than torch.multinomial."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn)[:, 0].clamp_(max=logits.shape[1] - 1)
