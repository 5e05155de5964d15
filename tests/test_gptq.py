"""gptq: what it makes is valid, and better for the products than what the search makes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tritconv.calibration.moments import Moments
from tritconv.methods.gptq import matrix as gptq
from tritconv.methods.gptq.columns import ColumnLoop
from tritconv.methods.gptq.matrix import Rounded, Solver, _RowOrder
from tritcore import encoder
from tritcore.codec import pack, unpack, validate
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS

pytestmark = pytest.mark.build

ROWS, N = 48, 192


def inputs(n_tokens: int = 1024, seed: int = 0) -> torch.Tensor:
    """float32 (tokens, n): correlated, and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n_tokens, N // 4, generator=generator) @ torch.randn(N // 4, N, generator=generator)
    return (mixed + torch.randn(n_tokens, N, generator=generator)) * torch.logspace(-1, 1, N)


@pytest.fixture(autouse=True)
def _few_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix is small, and its rows should go in steps all the same."""
    monkeypatch.setattr(gptq, "_LEAST_ROWS", 1)


def matrix(seed: int = 1) -> torch.Tensor:
    return 0.05 * torch.randn(ROWS, N, generator=torch.Generator().manual_seed(seed))


def quantize(
    weights: torch.Tensor, depth: int, moments: Moments, outputs: Sequence[torch.Tensor] = (), with_offset: bool = False
) -> Rounded:
    """As the driver quantizes a matrix; the moments stay as they are."""
    kept = Moments(moments.hessian.clone(), moments.drift, moments.target, moments.n_tokens)
    solver = Solver(kept, torch.float32, ColumnLoop(2))
    return solver.quantize(solver.aims(weights, moments.target), depth, [one.clone() for one in outputs], with_offset)


def decoded(data: np.ndarray, depth: int) -> torch.Tensor:
    return torch.from_numpy(unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth])).decode()).view(ROWS, N)


def product_error(weights: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ weights.T - wanted).square().sum())


@pytest.mark.parametrize("depth", DEPTHS)
def test_products_are_nearer_than_those_of_the_search(depth: int) -> None:
    x, weights = inputs(), matrix()
    moments = Moments(x.T @ x, n_tokens=1 << 20)
    blocks = quantize(weights, depth, moments).blocks
    assert np.abs(blocks.codes).max() <= CODE_MAX[depth]
    data = pack(blocks)
    validate(depth, data)

    wanted = x @ weights.T
    searched = encoder.quantize(weights.numpy(), depth, moments.hessian.diagonal().numpy())
    ours = product_error(decoded(data, depth), wanted, x)
    assert ours < 0.8 * product_error(decoded(searched, depth), wanted, x)


def test_unseen_inputs_profit_too() -> None:
    x, unseen, weights = inputs(4096), inputs(4096, seed=0)[2048:], matrix()
    seen = x[:2048]
    blocks = quantize(weights, 2, Moments(seen.T @ seen, n_tokens=len(seen))).blocks
    wanted = unseen @ weights.T
    searched = encoder.quantize(weights.numpy(), 2, None)
    assert product_error(decoded(pack(blocks), 2), wanted, unseen) < 0.8 * product_error(
        decoded(searched, 2), wanted, unseen
    )


@pytest.mark.parametrize("by", ["drift", "target"])
@pytest.mark.parametrize("rows", [ROWS, 4 * N])
def test_inputs_that_are_wrong_are_made_up_for(by: str, rows: int) -> None:
    """The products with the inputs that a quantized model has come near those of the full-precision one."""
    right, weights = inputs(), matrix().repeat(-(-rows // ROWS), 1)[:rows]
    wrong = (
        right
        + 0.3 * right.roll(1, dims=1)
        + 0.05 * torch.randn(right.shape, generator=torch.Generator().manual_seed(3))
    )
    hessian, wanted = wrong.T @ wrong, right @ weights.T
    moments = Moments(hessian, n_tokens=1 << 20)
    if by == "drift":
        moments.drift = wrong.T @ (right - wrong)
    else:
        moments.target = wrong.T @ wanted
    with_it = torch.from_numpy(quantize(weights, 3, moments).blocks.decode()).view(rows, N)
    without = torch.from_numpy(quantize(weights, 3, Moments(hessian, n_tokens=1 << 20)).blocks.decode()).view(rows, N)
    assert product_error(with_it, wanted, wrong) < 0.5 * product_error(without, wanted, wrong)


def test_closing_descent_only_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = inputs(), matrix()
    moments = Moments(x.T @ x, n_tokens=1 << 20)
    full = decoded(pack(quantize(weights, 2, moments).blocks), 2)
    monkeypatch.setattr(gptq, "_SWEEPS", 0)
    plain = decoded(pack(quantize(weights, 2, moments).blocks), 2)
    wanted = x @ weights.T
    assert product_error(full, wanted, x) < product_error(plain, wanted, x)


@pytest.mark.parametrize(
    "hessian",
    [
        torch.zeros(N, N),
        torch.ones(N, N),
        torch.diag(torch.cat([torch.zeros(N // 2), torch.ones(N // 2)])),
        1e12 * torch.eye(N),
        torch.diag(torch.logspace(-12, 12, N)),
    ],
    ids=["zero", "rank one", "dead columns", "large", "ill-conditioned"],
)
def test_degenerate_hessians(hessian: torch.Tensor) -> None:
    weights = matrix()
    data = pack(quantize(weights, 3, Moments(hessian)).blocks)
    validate(3, data)
    # no direction may run away: each weight stays near what it was
    assert float((decoded(data, 3) - weights).abs().max()) < float(weights.abs().max())


def test_same_input_same_blocks() -> None:
    x, weights = inputs(), matrix()
    first, second = (pack(quantize(weights, 2, Moments(x.T @ x, n_tokens=1 << 20)).blocks) for _ in range(2))
    assert (first == second).all()


def test_rows_do_not_depend_on_each_other() -> None:
    x, weights = inputs(), matrix()
    moments = Moments(x.T @ x, n_tokens=1 << 20)
    whole = decoded(pack(quantize(weights, 2, moments).blocks), 2)
    part = pack(quantize(weights[:8], 2, moments).blocks).reshape(8, -1)
    alone = torch.from_numpy(unpack(2, part.reshape(-1, BYTES_PER_BLOCK[2])).decode()).view(8, N)
    # sums run in another order, so a few weights on the edge between two codes may differ
    assert float((whole[:8] != alone).float().mean()) < 0.05


def gradients(n_tokens: int = 4096) -> torch.Tensor:
    """float32 (tokens, rows): those of neighbours point the same way, and some rows matter more than others."""
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randn(n_tokens, ROWS // 4, generator=generator).repeat_interleave(4, dim=1)
    return (mixed + 0.3 * torch.randn(n_tokens, ROWS, generator=generator)) * torch.logspace(-0.5, 0.5, ROWS)


def loss(weights: torch.Tensor, wanted: torch.Tensor, hessian: torch.Tensor, output: torch.Tensor) -> float:
    """To second order, up to a factor."""
    error = weights - wanted
    return float(((output @ error) * (error @ hessian)).sum())


def test_rows_make_up_for_each_other() -> None:
    x, g, weights = inputs(), gradients(), matrix()
    moments, output = Moments(x.T @ x, n_tokens=1 << 20), g.T @ g
    blocks = quantize(weights, 2, moments, [output]).blocks
    validate(2, pack(blocks))
    alone = decoded(pack(quantize(weights, 2, moments).blocks), 2)
    ours = decoded(pack(blocks), 2)
    assert loss(ours, weights, moments.hessian, output) < 0.6 * loss(alone, weights, moments.hessian, output)


def test_outputs_that_have_nothing_to_do_with_each_other() -> None:
    """Then a row is only descended further: how much a row's errors cost makes no difference."""
    x, weights = inputs(), matrix()
    moments = Moments(x.T @ x, n_tokens=1 << 20)
    outputs = [torch.diag(torch.logspace(-3, 3, ROWS)), torch.eye(ROWS)]
    unequal, equal = (decoded(pack(quantize(weights, 2, moments, [output]).blocks), 2) for output in outputs)
    # sums run in another order, so a few weights on the edge between two codes may differ
    assert float((unequal != equal).float().mean()) < 0.05
    alone = decoded(pack(quantize(weights, 2, moments).blocks), 2)
    wanted = x @ weights.T
    assert product_error(unequal, wanted, x) < product_error(alone, wanted, x)


def test_what_is_given_all_other_rows_is_the_best_that_a_step_can_do() -> None:
    g = gradients()
    output = g.T @ g
    order = _RowOrder(ROWS, [output])  # damps it
    for step, rows in enumerate(order.steps):
        errors = matrix().T.contiguous()
        slope = errors @ output
        errors[:, rows] = -order.given_others(step, errors)
        assert float((errors @ output)[:, rows].abs().max()) < 1e-4 * float(slope.abs().max())


def test_matrices_together_are_as_each_alone() -> None:
    x, g, weights = inputs(), gradients(), matrix()
    moments = Moments(x.T @ x, n_tokens=1 << 20)
    parts, outputs = weights.split([30, 18]), [g[:, :30].T @ g[:, :30], g[:, 30:].T @ g[:, 30:]]
    together = decoded(pack(quantize(weights, 2, moments, outputs).blocks), 2)
    alone = [quantize(part, 2, moments, [output]).blocks.decode() for part, output in zip(parts, outputs, strict=True)]
    right = torch.from_numpy(np.concatenate([part.reshape(-1, N) for part in alone]))
    assert float((together != right).float().mean()) < 0.05


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_few_rows(rows: int) -> None:
    x, weights = inputs(), matrix()[:rows]
    output = torch.ones(rows, rows)
    rounded = quantize(weights, 2, Moments(x.T @ x), [output], with_offset=True)
    assert rounded.offset is not None
    assert rounded.offset.shape == weights.shape
    validate(2, pack(rounded.blocks))


@pytest.mark.parametrize("output", [torch.zeros(ROWS, ROWS), 1e-20 * torch.ones(ROWS, ROWS), 1e12 * torch.eye(ROWS)])
def test_degenerate_outputs(output: torch.Tensor) -> None:
    weights = matrix()
    x = inputs()
    ours = decoded(pack(quantize(weights, 3, Moments(x.T @ x), [output]).blocks), 3)
    assert float((ours - weights).abs().max()) < float(weights.abs().max())
