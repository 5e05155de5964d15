"""Second moments of the gradients for the outputs of matrices: which errors of their rows matter, and together."""

from collections.abc import Mapping, Sequence

import torch

from tritconv.calibration.checkpoints import Checkpoints
from tritconv.calibration.gradients import Progress, draw, gradients, stride
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.moments import add_squares, complete
from tritconv.calibration.outside import OutsideMoments
from tritconv.calibration.ranks import Ranks
from tritconv.calibration.scratch import Kept, Scratch

# The share of the text that gradients are taken of: a token takes three times as long as in the forward pass alone.
_SHARE = 8  # an eighth
_SHARE_OF_LITTLE = 4  # a quarter, as long as that is little
_LITTLE = 8192
MOST_ROWS = 2048  # of a block of the moments: the rest of a larger matrix is taken as independent


def n_with_gradients(n_tokens: int) -> int:
    """About how many of so many tokens gradients are taken of."""
    return max(n_tokens // _SHARE, min(n_tokens // _SHARE_OF_LITTLE, _LITTLE))


def some_sequences(tokens: torch.Tensor) -> list[int]:
    """The numbers of the sequences of int64 (sequences, length) that gradients are taken of."""
    return list(range(0, len(tokens), stride(tokens, n_with_gradients(tokens.numel()))))


class UpstreamGradients:
    """The gradients of the predictions for the output of each layer of a full-precision model."""

    def __init__(
        self,
        model: LayeredModel,
        tokens: torch.Tensor,
        batches: Sequence[Sequence[int]],
        seed: int,
        scratch: Scratch,
        checkpoints: Checkpoints,
        first: int,
        moments: OutsideMoments | None,
        progress: Progress,
    ) -> None:
        """Pass through all layers and back, unless that was kept.

        Args:
            tokens: int64 (sequences, length).
            batches: the numbers of the sequences of each batch that is looked at.
            seed: of the labels whose loss it is.
            scratch: keeps the gradients, in bfloat16: they are noise beyond its digits.
            first: the first layer whose gradients will be asked for.
            moments: get what there is outside the layers: then what was kept does not do.
        """
        self._sizes = [len(batch) for batch in batches]
        self._kept: dict[int, Kept] = {}
        known = checkpoints.load_gradients(first) if moments is None else None
        if known is not None:
            self._kept = {index: scratch.keep(values, for_long=True) for index, values in known.items()}
            return
        chosen = [number for batch in batches for number in batch]
        if chosen:
            draws = draw(tokens, seed)[chosen]
            for found in gradients(model, tokens[chosen], draws, lambda *_: (), progress, scratch, moments):
                self._kept[found.index] = scratch.keep(found.upstream.bfloat16(), for_long=True)
        checkpoints.keep_gradients({index: kept.get() for index, kept in self._kept.items()})

    def take(self, index: int) -> dict[int, torch.Tensor]:
        """The gradients for the output of a layer, by batch: float32 (sequences, length, width). They are let go."""
        if index not in self._kept:
            return {}
        kept = self._kept.pop(index)
        found = kept.get().float().split(self._sizes)
        kept.release()
        return dict(enumerate(found))


class OutputMoments:
    """The sums of g gT of the matrices of a layer, g the gradients (rows,) for their outputs, in diagonal blocks.

    Attributes:
        blocks: of each matrix, float32 (some rows, the same rows), in the order of the rows. Only the lower triangles
            are right until `finish` is called.
    """

    def __init__(self) -> None:
        self.blocks: dict[Matrix, list[torch.Tensor]] = {}

    def add(self, matrix: Matrix, g: torch.Tensor) -> None:
        """Add gradients (tokens, rows) of a matrix."""
        parts = g.tensor_split(-(-g.shape[1] // MOST_ROWS), dim=1)
        for block, part in zip(self._of(matrix, g.shape[1], g.device), parts, strict=True):
            add_squares(block, part)

    def finish(self, n_rows: Mapping[Matrix, int], device: torch.device, ranks: Ranks) -> None:
        """Sum up over all processes. `n_rows`: of all matrices that gradients were wanted for."""
        for matrix, count in n_rows.items():
            ranks.sum(*self._of(matrix, count, device))
            for block in self.blocks[matrix]:
                complete(block)

    def _of(self, matrix: Matrix, n_rows: int, device: torch.device) -> list[torch.Tensor]:
        if matrix not in self.blocks:
            sizes = [len(part) for part in torch.arange(n_rows).tensor_split(-(-n_rows // MOST_ROWS))]
            self.blocks[matrix] = [torch.zeros(size, size, device=device) for size in sizes]
        return self.blocks[matrix]
