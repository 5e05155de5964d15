"""Gradients of a model's predictions for the outputs of its layers, from the last layer to the first.

The loss is that of labels drawn from the model's own predictions. The mean of gradient times gradient is then the
Fisher information, and half of it the second-order term of the KL divergence from the full-precision model.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tritconv.calibration.matrices import Matrix, Product, Recorder
from tritconv.calibration.model import LayeredModel, batches
from tritconv.calibration.outside import OutsideMoments
from tritconv.calibration.scratch import Scratch

Progress = Callable[[str], None]  # called before each step with its description
Products = Mapping[Matrix, tuple[torch.Tensor, torch.Tensor]]  # inputs (tokens, n) and gradients (tokens, rows)
ChooseMatrices = Callable[[int, torch.nn.Module], Sequence[Matrix]]  # of a layer and its number


@dataclass(frozen=True)
class LayerGradients:
    """The gradients of one layer.

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
    """The distance of sequences that have about the tokens wanted between them."""
    return math.ceil(tokens.numel() / max(wanted, tokens.shape[1]))


def draw(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Numbers in 0 .. 1 that choose a label for each of int64 (sequences, length): float32 of the same shape."""
    return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))


def gradients(
    model: LayeredModel,
    tokens: torch.Tensor,
    draws: torch.Tensor,
    choose: ChooseMatrices,
    progress: Progress,
    scratch: Scratch,
    moments: OutsideMoments | None = None,
) -> Iterator[LayerGradients]:
    """One pass through the layers and one back, the last layer first. Memory holds one layer.

    Args:
        tokens: int64 (sequences, length).
        draws: the labels, as `draw` has them.
        choose: the matrices of a layer whose products are wanted.
        scratch: takes the input of each layer, in bfloat16: the gradients are noise beyond its digits.
        moments: get what there is outside the layers.
    """
    progress("embeddings")
    hidden = model.embed(tokens)
    inputs = []
    for index in range(model.n_layers):
        progress(f"gradients: forward, layer {index + 1}/{model.n_layers}")
        inputs.append(scratch.keep(hidden.bfloat16(), for_long=True))
        hidden = model.run_all(index, model.working_copy(index), hidden)
    progress("gradients: predictions")
    upstream = model.label_gradients(hidden, draws, moments)
    for index in reversed(range(model.n_layers)):
        progress(f"gradients: back, layer {index + 1}/{model.n_layers}")
        layer = model.working_copy(index)
        kept = inputs.pop()
        downstream, products = _go_back(model, index, layer, choose(index, layer), kept.get().float(), upstream)
        kept.release()
        yield LayerGradients(index, layer, upstream, products)
        upstream = downstream
    if moments is not None:
        moments.add_gradients(upstream.flatten(0, 1))


def _go_back(
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
