"""Second moments of what matrices are multiplied with, summed over the calibration text."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from tritconv.calibration.matrices import Matrix, Recorder
from tritconv.calibration.model import LayeredModel, batches


@dataclass
class Moments:
    """Of the inputs x of a matrix W, row length n, in the quantized model.

    Attributes:
        hessian: float32 (n, n): the sum of x xT, half the Hessian of the squared error of the product.
        pull: float32 (n, rows), the sum of x yT, y what the product should be besides W x so that the quantized model
            comes back to the full-precision one; None where that is unknown.
        n_tokens: how many tokens the sums are over.
    """

    hessian: torch.Tensor
    pull: torch.Tensor | None = None
    n_tokens: int = 0


@dataclass(frozen=True)
class LayerStreams:
    """A layer of the quantized model and of the full-precision one, and what each of them is given and puts out.

    Attributes:
        index: which layer.
        quantized, full: the layers; `quantized` changes as its matrices are quantized.
        quantized_in, full_in: hidden states (sequences, length, width), on the CPU.
        full_out: what `full` makes of `full_in`.
    """

    model: LayeredModel
    index: int
    quantized: torch.nn.Module
    full: torch.nn.Module
    quantized_in: torch.Tensor
    full_in: torch.Tensor
    full_out: torch.Tensor

    def moments(self, stage: Sequence[Matrix], later: Collection[Matrix]) -> dict[Matrix, Moments]:
        """Moments for the matrices of a stage.

        Matrices with the same input share their Hessian. Experts have no pull: the two models route tokens differently.

        Args:
            later: the matrices of later stages: a pass ends where the first of them is used.
        """
        if stage[0].is_expert:
            return self._of_experts(stage, later)
        if not later and len(stage) == 1 and self._adds_to_output(stage[0]):
            return {stage[0]: self._of_last(stage[0])}
        return self._of_shared_input(stage)

    def _of_experts(self, stage: Sequence[Matrix], later: Collection[Matrix]) -> dict[Matrix, Moments]:
        width = {matrix: matrix.of(self.quantized).shape[1] for matrix in stage}
        found = {m: Moments(torch.zeros(n, n, device=self.model.device)) for m, n in width.items()}
        later = [matrix for matrix in later if not matrix.is_expert]  # an expert is done before the next one begins

        def on_product(matrix: Matrix, x: torch.Tensor) -> None:
            if matrix in later:
                raise _Stop
            if matrix in found:
                _add(found[matrix], x.float())

        for hidden in batches(self.quantized_in):
            self._pass(self.quantized, [*stage, *later], hidden, on_product)
        return found

    def _of_shared_input(self, stage: Sequence[Matrix]) -> dict[Matrix, Moments]:
        n = stage[0].of(self.quantized).shape[1]
        shared = Moments(torch.zeros(n, n, device=self.model.device))
        drift = torch.zeros_like(shared.hessian)  # the sum of x (x' - x)T, x' the inputs in the full-precision model
        for quantized_in, full_in in zip(batches(self.quantized_in), batches(self.full_in), strict=True):
            x = self._first_input(self.quantized, stage, quantized_in)
            _add(shared, x)
            drift.addmm_(x.T, self._first_input(self.full, stage, full_in) - x)
        return {matrix: Moments(shared.hessian, drift @ matrix.of(self.full).T, shared.n_tokens) for matrix in stage}

    def _of_last(self, matrix: Matrix) -> Moments:
        """With the pull towards the full-precision layer's output: whatever is wrong with it, this matrix can mend."""
        rows, n = matrix.of(self.quantized).shape
        moments = Moments(torch.zeros(n, n, device=self.model.device), torch.zeros(n, rows, device=self.model.device))
        assert moments.pull is not None
        for quantized_in, full_out in zip(batches(self.quantized_in), batches(self.full_out), strict=True):
            x, out = self._input_and_output(matrix, quantized_in)
            _add(moments, x)
            moments.pull.addmm_(x.T, full_out.to(out.device).reshape(out.shape) - out)
        return moments

    def _adds_to_output(self, matrix: Matrix) -> bool:
        """Whether the layer puts out the product of `matrix` plus something that does not depend on it."""
        weights = matrix.of(self.quantized)
        hidden = next(batches(self.quantized_in))[:1]
        x, out = self._input_and_output(matrix, hidden)
        kept = weights.clone()
        weights.zero_()
        _, without = self._input_and_output(matrix, hidden)
        weights.copy_(kept)
        product = x @ weights.T
        if product.shape != out.shape:
            return False
        return bool((out - without - product).norm() <= 0.02 * product.norm())

    def _first_input(self, layer: torch.nn.Module, stage: Sequence[Matrix], hidden: torch.Tensor) -> torch.Tensor:
        found = []

        def on_product(matrix: Matrix, x: torch.Tensor) -> None:
            found.append(x.float())
            raise _Stop

        self._pass(layer, stage, hidden, on_product)
        return found[0]

    def _input_and_output(self, matrix: Matrix, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        out = self._pass(self.quantized, [matrix], hidden, lambda _, x: found.append(x.float()))
        assert out is not None
        return found[0], out.reshape(-1, out.shape[-1])

    def _pass(
        self,
        layer: torch.nn.Module,
        matrices: Sequence[Matrix],
        hidden: torch.Tensor,
        on_product: Callable[[Matrix, torch.Tensor], None],
    ) -> torch.Tensor | None:
        """Put hidden states through a layer; None if `on_product` stopped it."""
        try:
            with torch.no_grad(), Recorder(layer, matrices, on_product):
                return self.model.run(self.index, layer, hidden.to(self.model.device))
        except _Stop:
            return None


class _Stop(Exception):
    """Ends a pass through a layer that has shown enough."""


def _add(moments: Moments, x: torch.Tensor) -> None:
    moments.hessian.addmm_(x.T, x)
    moments.n_tokens += len(x)
