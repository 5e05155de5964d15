"""Second moments for the matrices outside the layers: the token embeddings and the output matrix.

An error d of a row costs, to second order of the KL divergence and per token of the text,
    dT (f G + v H) d / 2
with f how often the row's token occurs and G the mean of g gT, g the gradients for the embeddings of tokens; v the mean
of p (1 - p), p the probabilities of the row's token, and H the mean of x xT, x what the output matrix is multiplied by.
Embeddings have the first term only, an output matrix the second one; a matrix that is both has both. That p and x are
independent is an approximation, as in K-FAC (Martens and Grosse, 2015, arXiv:1503.05671).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tritconv.calibration.moments import add_squares, complete
from tritconv.calibration.ranks import Ranks

_UNSEEN = 0.5  # occurrences of a token that the text does not have
_CLASSES = 12  # of rows with about the same ratio of both terms


@dataclass
class OutsideMoments:
    """The moments: sums over tokens until `finish` is called, then means.

    Attributes:
        gradients: G, float32 (width, width).
        inputs: H, float32 (width, width).
        variances: v, float32 (vocabulary,).
        frequencies: f, float32 (vocabulary,).
        counts: tokens that G and H are of, int64 (2,).
    """

    gradients: torch.Tensor
    inputs: torch.Tensor
    variances: torch.Tensor
    frequencies: torch.Tensor
    counts: torch.Tensor

    @staticmethod
    def zeros(tokens: torch.Tensor, vocabulary: int, width: int) -> "OutsideMoments":
        """Of a text, int64, of which only the frequencies are known yet."""
        occurrences = tokens.flatten().bincount(minlength=vocabulary).float().clamp_(min=_UNSEEN)
        frequencies = occurrences / occurrences.sum()
        g, h = torch.zeros(width, width), torch.zeros(width, width)
        return OutsideMoments(g, h, torch.zeros(vocabulary), frequencies, torch.zeros(2, dtype=torch.int64))

    def add_predictions(self, rows: range, x: torch.Tensor, p: torch.Tensor) -> None:
        """Add what a model predicts.

        Args:
            rows: of the output matrix.
            x: what it is multiplied by, (tokens, width).
            p: the probabilities of these rows, float32 (tokens, rows).
        """
        self.variances[rows.start : rows.stop] += (p * (1 - p)).sum(dim=0)
        if rows.start == 0:
            add_squares(self.inputs, x)
            self.counts[1] += len(x)

    def add_gradients(self, g: torch.Tensor) -> None:
        """Add gradients (tokens, width) for embeddings."""
        add_squares(self.gradients, g)
        self.counts[0] += len(g)

    def finish(self, ranks: Ranks) -> None:
        """Make means of the sums, over all processes."""
        ranks.sum(self.gradients, self.inputs, self.variances, self.counts)
        n_gradients, n_inputs = self.counts.clamp(min=1).tolist()
        self.variances /= n_inputs
        complete(self.gradients.div_(n_gradients))
        complete(self.inputs.div_(n_inputs))


@dataclass(frozen=True)
class OutsideMatrix:
    """A matrix outside the layers.

    Attributes:
        is_embedding, is_output: what it is used as; one of them at least.
        n_rows: the tokens that it has rows of.
    """

    is_embedding: bool
    is_output: bool
    n_rows: int

    def weights(self, moments: OutsideMoments) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors f and v of each row, float32 (rows,)."""
        found = []
        for has, values in ((self.is_embedding, moments.frequencies), (self.is_output, moments.variances)):
            known = values[: self.n_rows] * has
            found.append(torch.cat([known, known.new_zeros(self.n_rows - len(known))]))
        return found[0], found[1]

    def classes(self, moments: OutsideMoments) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows with about the same Hessian, up to a factor: their numbers, and that Hessian, float32 (width, width)."""
        f, v = self.weights(moments)
        share = f * moments.gradients.trace()
        share /= (share + v * moments.inputs.trace()).clamp(min=1e-30)
        n_classes = _CLASSES if self.is_embedding and self.is_output else 1
        for rows in share.argsort(stable=True).tensor_split(n_classes):
            if len(rows):
                yield rows.sort().values, f[rows].mean() * moments.gradients + v[rows].mean() * moments.inputs

    def losses(self, error: torch.Tensor, rows: torch.Tensor, moments: OutsideMoments) -> torch.Tensor:
        """What errors cost, in nats per token: float32 (some rows,).

        Args:
            error: of rows, float32 (some rows, width).
            rows: the numbers of these rows.
        """
        f, v = self.weights(moments)
        parts = ((f[rows], moments.gradients), (v[rows], moments.inputs))
        return sum(((error @ hessian) * error).sum(dim=1) * weight for weight, hessian in parts) / 2

    def sample(self, values: np.ndarray, moments: OutsideMoments, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that stand for all when it comes to losses.

        They are drawn with a probability in proportion to the loss that they would have without any weights, by
        systematic sampling (Madow, 1949).

        Args:
            values: (rows, n).
            count: rows to draw, some of them more than once. If there are no more, each comes once.

        Returns:
            The numbers of the rows, and what to multiply their losses by for a sum that stands for all rows.
        """
        if self.n_rows <= count:
            return torch.arange(self.n_rows), torch.ones(self.n_rows)
        f, v = self.weights(moments)
        squares = np.concatenate(
            [
                np.square(values[first : first + count], dtype=np.float32).sum(axis=1)
                for first in range(0, len(values), count)
            ]
        )
        shares = (f * moments.gradients.trace() + v * moments.inputs.trace()).double() * torch.from_numpy(squares)
        shares /= shares.sum()
        points = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        drawn = torch.searchsorted(shares.cumsum(0), points).clamp_(max=self.n_rows - 1)
        rows, times = drawn.unique(return_counts=True)
        return rows, (times / (count * shares[rows])).float()
