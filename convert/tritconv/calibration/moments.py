"""Second moments of the inputs of matrices, summed over the calibration text."""

from dataclasses import dataclass

import torch

from tritconv.calibration.ranks import Ranks

_PART = 256  # columns of a symmetric matrix that one product makes


@dataclass
class Moments:
    """The moments of the inputs x of a matrix W, row length n, in the quantized model.

    At most one of the two cross-covariances is there; without one, the inputs are taken as they are.

    Attributes:
        hessian: float32 (n, n): the sum of x xT, half the Hessian of the squared error of the product. Only the lower
            triangle is right until `finish` is called.
        drift: float32 (n, n): the sum of x (x' - x)T, x' the same inputs in the full-precision model.
        target: float32 (n, rows): the sum of x yT, y the product that would bring the quantized model back to the
            full-precision one.
        n_tokens: the number of tokens that the sums are over.
    """

    hessian: torch.Tensor
    drift: torch.Tensor | None = None
    target: torch.Tensor | None = None
    n_tokens: int = 0

    @staticmethod
    def zeros(n: int, device: torch.device, *, drift: bool = False, rows: int | None = None) -> "Moments":
        """Moments of no tokens, with room for the drift, or for the targets of `rows` rows."""
        return Moments(
            torch.zeros(n, n, device=device),
            torch.zeros(n, n, device=device) if drift else None,
            None if rows is None else torch.zeros(n, rows, device=device),
        )

    def add(self, x: torch.Tensor, other: torch.Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: (tokens, n), in the type of the products.
            other: x' - x, (tokens, n), for the drift; or y, (tokens, rows), for the targets.
        """
        if not len(x):
            return
        add_squares(self.hessian, x)
        if self.drift is not None:
            assert other is not None
            _add_product(self.drift, x, other.to(x.dtype))
        if self.target is not None:
            assert other is not None
            _add_product(self.target, x, other.to(x.dtype))
        self.n_tokens += len(x)

    def finish(self, ranks: Ranks) -> None:
        """Sum up over all processes, and fill in the upper triangle of the Hessian."""
        ranks.sum(*(values for values in (self.hessian, self.drift, self.target) if values is not None))
        self.n_tokens = ranks.total(self.n_tokens)
        complete(self.hessian)


def add_squares(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add xT x of (tokens, n) to the lower triangle of float32 (n, n). What is above it is undefined."""
    for start in range(0, x.shape[1], _PART):
        _add_product(total[start:, start : start + _PART], x[:, start:], x[:, start : start + _PART])


def complete(total: torch.Tensor) -> None:
    """Make (n, n) symmetric: the lower triangle goes to the upper one."""
    for start in range(0, len(total), _PART):
        part = slice(start, start + _PART)
        total[part, start:] = total[start:, part].T.clone()


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add xT y to a float32 matrix. Products in another type are rounded to it, batch by batch."""
    if x.dtype is torch.float32:
        total.addmm_(x.T, y)
    else:
        total.add_(x.T @ y)
