"""Second moments of what the outputs of matrices do to the predictions: which of their errors matter, and together."""

from collections.abc import Sequence

import torch

from tritconv.calibration.gradients import Progress, go_back, gradients, stride
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel

# Of the text, so much is looked at: to go back takes longer than the rest of the calibration, token for token.
_SHARE = 4  # a quarter
_MOST_TOKENS = 8192


class OutputMoments:
    """Of the matrices of a full-precision model, a layer at a time.

    A pass through all layers and back leaves the gradients for each layer's output, (tokens, width); it is made when
    the first layer is asked for. What they are for the matrices within a layer, a pass back through that layer says.
    """

    def __init__(self, model: LayeredModel, tokens: torch.Tensor, seed: int) -> None:
        """Prepare.

        Args:
            tokens: int64 (sequences, length). Some of the sequences are used.
            seed: of the labels whose loss it is.
        """
        self._model = model
        self._tokens = tokens
        self._stride = stride(tokens, min(tokens.numel() // _SHARE, _MOST_TOKENS))
        self._seed = seed
        self._upstream: dict[int, torch.Tensor] = {}

    def of(
        self, index: int, layer: torch.nn.Module, matrices: Sequence[Matrix], hidden: torch.Tensor, progress: Progress
    ) -> dict[Matrix, torch.Tensor]:
        """Of matrices of a layer, as far as a token reached them.

        Args:
            layer: the one at `index`, in float32, on the device.
            hidden: its input for all tokens, (sequences, length, width), on the CPU.

        Returns:
            float32 (rows, rows): the sum of g gT, g the gradients of the loss for the outputs.
        """
        if not self._upstream:
            some = self._tokens[:: self._stride]
            for found in gradients(self._model, some, self._seed, lambda *_: (), progress):
                self._upstream[found.index] = found.upstream.bfloat16()  # noise has no more digits
        upstream = self._upstream[index].float()
        _, products = go_back(self._model, index, layer, matrices, hidden[:: self._stride], upstream)
        moments = {}
        for matrix, (_, g) in products.items():
            g = g.float()
            moments[matrix] = g.T @ g
        return moments
