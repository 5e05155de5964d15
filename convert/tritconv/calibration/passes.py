"""Passes of a text through one layer: once in full precision, and stage by stage while its matrices are quantized.

A stage is a set of matrices with the same input. A quantized pass ends where the next stage begins. The products before
that are not computed again: the first pass that reaches a product keeps its output, and later passes replay it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from tritconv.calibration.matrices import Matrix, Product, Recorder
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.moments import Moments
from tritconv.calibration.scratch import Kept, Scratch

_SAME = 0.02  # the most that an output may differ from a sum of products, relative to the product


class _Stop(Exception):
    """Ends a pass that has reached its last product."""


class Streams:
    """The hidden states of a text between two layers, in both models, batch by batch.

    Attributes:
        batches: the numbers of the sequences of each batch, this process's share of the text.
        full, quantized: of each batch: float32 (sequences, length, width). Nothing is quantized for a method that
            needs the full-precision model alone.
    """

    def __init__(self, scratch: Scratch, batches: Sequence[Sequence[int]]) -> None:
        """Prepare for batches; the hidden states come with `start`."""
        self.scratch = scratch
        self.batches = batches
        self.full: list[Kept] = []
        self.quantized: list[Kept] = []

    def start(self, inputs: Iterable[tuple[torch.Tensor, ...]]) -> None:
        """Take the input of a layer, of each batch: in full precision and, if wanted, quantized."""
        for full, *quantized in inputs:
            self.full.append(self.scratch.keep(full))
            self.quantized += map(self.scratch.keep, quantized)

    def replace(self, stream: list[Kept], batch: int, hidden: torch.Tensor) -> None:
        """Put other hidden states in the place of a batch."""
        stream[batch].release()
        stream[batch] = self.scratch.keep(hidden)


class FullPass:
    """The pass of a text through a layer in full precision.

    Attributes:
        inputs: of each stage that has one input: that input in each batch, bfloat16 (tokens, n).
    """

    def __init__(self, model: LayeredModel, index: int, layer: torch.nn.Module, streams: Streams) -> None:
        self._model = model
        self._index = index
        self._layer = layer
        self._streams = streams
        self.inputs: dict[Matrix, list[Kept]] = {}

    def run(
        self,
        stages: Sequence[Sequence[Matrix]],
        upstream: Mapping[int, torch.Tensor],
        matrices: Sequence[Matrix],
        on_gradient: Callable[[Matrix, torch.Tensor], None],
    ) -> None:
        """Move the full-precision stream of all batches behind the layer, and let go of the layer.

        Args:
            stages: those whose inputs are wanted. Experts' inputs are not kept.
            upstream: the gradients for the layer's output, by batch; a batch without them is only run.
            matrices: those whose outputs' gradients are wanted.
            on_gradient: called with such a matrix and the gradients (tokens, rows) of a batch.
        """
        first = [stage[0] for stage in stages if not stage[0].is_expert]
        self.inputs = {matrix: [] for matrix in first}
        for batch, kept in enumerate(self._streams.full):
            hidden = kept.get().to(self._model.device).detach()
            seen: dict[Matrix, torch.Tensor] = {}
            gradient = upstream.get(batch)

            def on_product(matrix: Matrix, x: torch.Tensor, seen: dict[Matrix, torch.Tensor] = seen) -> None:
                if matrix in self.inputs:
                    seen.setdefault(matrix, x)

            recorder = _GradientRecorder(self._layer, [*first, *matrices], on_product, matrices, on_gradient)
            with torch.set_grad_enabled(gradient is not None), recorder:
                if gradient is not None:
                    hidden.requires_grad_()
                out = self._model.run(self._index, self._layer, hidden)
            if gradient is not None:
                torch.autograd.grad(out, hidden, gradient.to(out))
            self._model.check_finite(out, f"layer {self._index} puts out")
            for matrix in self.inputs:
                self.inputs[matrix].append(self._streams.scratch.keep(seen[matrix].bfloat16()))
            self._streams.replace(self._streams.full, batch, out)
        del self._layer

    def release(self, matrix: Matrix) -> None:
        """Forget the inputs of a stage, which its first matrix names."""
        for kept in self.inputs.pop(matrix, ()):
            kept.release()


class _GradientRecorder(Recorder):
    """Tells of inputs, and of the gradients for the outputs of some matrices."""

    def __init__(
        self,
        layer: torch.nn.Module,
        matrices: Sequence[Matrix],
        on_product: Callable[[Matrix, torch.Tensor], None],
        wanted: Collection[Matrix],
        on_gradient: Callable[[Matrix, torch.Tensor], None],
    ) -> None:
        super().__init__(layer, list(dict.fromkeys(matrices)), on_product)
        self._wanted = set(wanted)
        self._on_gradient = on_gradient

    def _after(self, product: Product, out: torch.Tensor) -> None:
        if product.matrix in self._wanted and out.requires_grad and len(product.inputs):
            out.register_hook(lambda g: self._on_gradient(product.matrix, product.part(g.detach())))


class QuantizedPass:
    """The passes of a text through a layer whose matrices are quantized stage by stage.

    The matrices of a stage have their full-precision weights until the passes for the next stage begin.
    """

    def __init__(
        self,
        model: LayeredModel,
        index: int,
        layer: torch.nn.Module,
        streams: Streams,
        full: FullPass,
        closing: Matrix | None = None,
    ) -> None:
        """Prepare.

        Args:
            full: has run.
            closing: a stage of its own, the last one, of which `adds_to_output` holds.
        """
        self._closing = closing
        self._model = model
        self._index = index
        self._layer = layer
        self._streams = streams
        self._full = full
        self._replayed: list[list[Kept]] = [[] for _ in streams.batches]
        self._lacking: list[Kept] = []  # the inputs of the closing matrix, once the streams lack its product

    def moments(self, stage: Sequence[Matrix], later: Collection[Matrix]) -> dict[Matrix, Moments]:
        """The moments of the matrices of a stage, summed over this process's share of the text.

        Matrices with the same input share one. Experts have no cross-covariance: the two models route tokens
        differently.

        Args:
            later: the matrices of later stages: a pass ends where the first of them is used.
        """
        if stage[0].is_expert:
            return self._of_experts(stage, [matrix for matrix in later if not matrix.is_expert])
        if stage[0] == self._closing:
            return {stage[0]: self._of_closing(stage[0])}
        return dict.fromkeys(stage, self._of_shared_input(stage))

    def skip(self, stage: Sequence[Matrix]) -> None:
        """Do what `moments` does to the passes that follow, and nothing else: products are kept in bfloat16."""
        if stage[0] == self._closing:
            for _ in self._without_closing(stage[0]):
                pass
        elif not stage[0].is_expert:
            for _ in self._shared_inputs(stage):
                pass

    def finish(self) -> None:
        """Move the quantized stream of all batches behind the layer, all of whose matrices are quantized now."""
        for batch, kept in enumerate(self._streams.quantized):
            if self._lacking:
                assert self._closing is not None
                x = self._lacking[batch].get().to(self._model.device, self._model.product_type)
                product = linear(x, self._closing.of(self._layer).to(x.dtype)).float()
                self._lacking[batch].release()
                out = kept.get().to(product.device)
                out = out + product.view(out.shape)
            else:
                ended = self._pass(batch, kept.get(), [], lambda *_: None)
                assert ended is not None
                out = ended
            self._model.check_finite(out, f"layer {self._index} puts out")
            self._streams.replace(self._streams.quantized, batch, out)
            self._forget(batch)

    def _forget(self, batch: int) -> None:
        """Let go of the products of a batch."""
        while self._replayed[batch]:
            self._replayed[batch].pop().release()

    def _of_experts(self, stage: Sequence[Matrix], later: Sequence[Matrix]) -> dict[Matrix, Moments]:
        found = {m: Moments.zeros(m.of(self._layer).shape[1], self._model.device) for m in stage}

        def on_product(matrix: Matrix, x: torch.Tensor) -> None:
            if matrix in later:  # an expert is done before the next one begins
                raise _Stop
            if matrix in found:
                found[matrix].add(x.to(self._model.product_type))

        for batch, kept in enumerate(self._streams.quantized):
            self._pass(batch, kept.get(), [*stage, *later], on_product, keep=False)
        return found

    def _of_shared_input(self, stage: Sequence[Matrix]) -> Moments:
        shared = Moments.zeros(stage[0].of(self._layer).shape[1], self._model.device, drift=True)
        for batch, x in self._shared_inputs(stage):
            # both rounded: equal inputs have no drift
            shared.add(x, self._full.inputs[stage[0]][batch].get().to(x.device).float() - x.bfloat16())
        self._full.release(stage[0])
        return shared

    def _shared_inputs(self, stage: Sequence[Matrix]) -> Iterator[tuple[int, torch.Tensor]]:
        """The input (tokens, n) of the matrices of a stage, by batch."""
        for batch, kept in enumerate(self._streams.quantized):
            found: list[torch.Tensor] = []

            def on_product(_: Matrix, x: torch.Tensor, found: list[torch.Tensor] = found) -> None:
                found.append(x.to(self._model.product_type))
                raise _Stop

            self._pass(batch, kept.get(), stage, on_product)
            yield batch, found[0]

    def _of_closing(self, matrix: Matrix) -> Moments:
        """With the full-precision layer's output as the target: this matrix can mend all errors of the layer."""
        rows, n = matrix.of(self._layer).shape
        moments = Moments.zeros(n, self._model.device, rows=rows)
        for batch, x, rest in self._without_closing(matrix):
            wanted = self._streams.full[batch].get().to(rest.device) - rest
            moments.add(x, wanted.view(-1, rows))
        return moments

    def _without_closing(self, matrix: Matrix) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The input (tokens, n) of the closing matrix, and the layer's output without its product, by batch.

        Afterwards, that is the quantized stream.
        """
        for batch, kept in enumerate(self._streams.quantized):
            hidden = kept.get().to(self._model.device)
            x, rest = _without(self._model, self._index, self._layer, matrix, hidden, self._replayed[batch])
            x = x.to(self._model.product_type)
            self._forget(batch)
            self._lacking.append(self._streams.scratch.keep(x.bfloat16()))
            self._streams.replace(self._streams.quantized, batch, rest)
            yield batch, x, rest

    def _pass(
        self,
        batch: int,
        hidden: torch.Tensor,
        matrices: Sequence[Matrix],
        on_product: Callable[[Matrix, torch.Tensor], None],
        *,
        keep: bool = True,
    ) -> torch.Tensor | None:
        """Put the hidden states of a batch through the layer, and replay its products.

        Args:
            on_product: called for products of `matrices`; `_Stop` from it ends the pass.
            keep: whether the outputs of further products are kept, to be replayed.

        Returns:
            float32 (sequences, length, width), on the device; None if the pass was stopped.
        """
        scratch = self._streams.scratch if keep else None
        recorder = _Replay(self._layer, matrices, on_product, self._replayed[batch], scratch)
        with suppress(_Stop), torch.no_grad(), recorder:
            return self._model.run(self._index, self._layer, hidden.to(self._model.device))
        return None


def adds_to_output(
    model: LayeredModel, index: int, layer: torch.nn.Module, matrix: Matrix, hidden: torch.Tensor
) -> bool:
    """Whether a layer puts out the product of `matrix` plus something that does not depend on it.

    Args:
        hidden: an input of the layer, (sequences, length, width), on the device.
    """
    found: list[torch.Tensor] = []
    with torch.no_grad(), Recorder(layer, [matrix], lambda _, x: found.append(x)):
        out = model.run(index, layer, hidden)
    x, rest = _without(model, index, layer, matrix, hidden, [])
    product = x.float() @ matrix.of(layer).float().T
    if len(found) > 1 or product.numel() != out.numel():
        return False
    return bool((out - rest - product.view(out.shape)).norm() <= _SAME * product.norm())


def _without(
    model: LayeredModel,
    index: int,
    layer: torch.nn.Module,
    matrix: Matrix,
    hidden: torch.Tensor,
    replayed: list[Kept],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The input (tokens, n) of a matrix, and the layer's output as if its product were zero."""
    found: list[torch.Tensor] = []
    recorder = _Replay(layer, [matrix], lambda _, x: found.append(x), replayed, zero=matrix)
    with torch.no_grad(), recorder:
        out = model.run(index, layer, hidden)
    return found[0], out


class _Replay(Recorder):
    """Gives the outputs of the first products of a pass from an earlier one, and keeps those of the next ones.

    Only `linear` and attention are replayed: they are the same operations in the same order in each pass.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        matrices: Sequence[Matrix],
        on_product: Callable[[Matrix, torch.Tensor], None],
        replayed: list[Kept],
        scratch: Scratch | None = None,
        zero: Matrix | None = None,
    ) -> None:
        """Prepare.

        Args:
            on_product: called for products of `matrices` that are not replayed.
            replayed: the outputs of the first products.
            scratch: takes the outputs of the next ones, if there is one.
            zero: a matrix whose product is to be zero.
        """
        super().__init__(layer, matrices, on_product)
        self._replayed = replayed
        self._scratch = scratch
        self._zero = zero
        self._count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (linear, scaled_dot_product_attention):
            return super().__torch_function__(func, types, args, kwargs)
        number, self._count = self._count, self._count + 1
        if number < len(self._replayed):
            return self._replayed[number].get().to(args[0])
        for product in self._products(func, (*args, *kwargs.values())):
            self._on_product(product.matrix, product.inputs)
            if product.matrix == self._zero:
                inputs, weight = (*args, *kwargs.values())[:2]
                return inputs.new_zeros(*inputs.shape[:-1], len(weight))
        out = func(*args, **kwargs)
        if self._scratch is not None:
            self._replayed.append(self._scratch.keep(out.bfloat16()))
        return out
