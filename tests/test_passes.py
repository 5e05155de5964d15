"""Passes through a layer: moments of its inputs, replayed products, and the streams behind it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import HIDDEN, exact_model, make_checkpoint

from tritconv.calibration.matrices import Matrix, Recorder, matrices_of, stages
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.passes import FullPass, QuantizedPass, Streams, adds_to_output
from tritconv.calibration.ranks import ALONE
from tritconv.calibration.scratch import Scratch

LENGTH = 32
QKV = [Matrix(f"self_attn.{name}_proj.weight") for name in "qkv"]
O_PROJ, GATE, UP, DOWN = (
    Matrix("self_attn.o_proj.weight"),
    Matrix("mlp.gate_proj.weight"),
    Matrix("mlp.up_proj.weight"),
    Matrix("mlp.down_proj.weight"),
)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LayeredModel:
    return exact_model(checkpoint)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> LayeredModel:
    return exact_model(make_checkpoint(tmp_path_factory.mktemp("mixtral"), "Mixtral"))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (6, LENGTH), generator=torch.Generator().manual_seed(0))


def inputs_of(model: LayeredModel, layer: torch.nn.Module, matrix: Matrix, hidden: torch.Tensor) -> torch.Tensor:
    """The inputs of a matrix, (tokens, n)."""
    found: list[torch.Tensor] = []
    with torch.no_grad(), Recorder(layer, [matrix], lambda _, x: found.append(x)):
        model.run(0, layer, hidden)
    return torch.cat(found)


def assert_near(found: torch.Tensor, right: torch.Tensor, within: float = 5e-3) -> None:
    """Up to the rounding of what is kept in bfloat16."""
    torch.testing.assert_close(found, right, rtol=within, atol=within * float(right.abs().max()))


@dataclass
class Setup:
    """A first layer, whose quantized input differs from that of the full-precision model."""

    full: torch.nn.Module
    quantized: torch.nn.Module
    full_in: torch.Tensor
    quantized_in: torch.Tensor
    streams: Streams
    full_pass: FullPass
    passes: QuantizedPass

    def full_out(self) -> torch.Tensor:
        return torch.cat([kept.get() for kept in self.streams.full])

    def quantized_out(self) -> torch.Tensor:
        return torch.cat([kept.get() for kept in self.streams.quantized])


def set_up(model: LayeredModel, tokens: torch.Tensor, order: list[list[Matrix]], budget: int, folder: Path) -> Setup:
    full, quantized = model.working_copy(0), model.working_copy(0)
    hidden = model.embed(tokens)
    other = hidden + 0.1 * hidden.std() * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    streams = Streams(Scratch(budget, folder), [[0, 1, 2], [3, 4], [5]])
    streams.start((hidden[batch], hidden[batch]) for batch in streams.batches)
    for number, batch in enumerate(streams.batches):
        streams.replace(streams.quantized, number, other[batch])
    full_pass = FullPass(model, 0, full, streams)
    full_pass.run(order, {}, [], lambda *_: None)
    closing = DOWN if order[-1] == [DOWN] else None
    passes = QuantizedPass(model, 0, quantized, streams, full_pass, closing)
    return Setup(full, quantized, hidden, other, streams, full_pass, passes)


DENSE = [QKV, [O_PROJ], [GATE, UP], [DOWN]]


@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["in memory", "in a file"])
def test_stages_see_what_is_quantized_before_them(
    model: LayeredModel, tokens: torch.Tensor, tmp_path: Path, budget: int
) -> None:
    """The moments of each stage are those of a layer that has all weights of the stages before it."""
    at = set_up(model, tokens, DENSE, budget, tmp_path)
    torch.testing.assert_close(at.full_out(), model.run_all(0, at.full, at.full_in))
    for number, stage in enumerate(DENSE[:3]):
        later = {matrix for members in DENSE[number + 1 :] for matrix in members}
        found = at.passes.moments(stage, later)
        assert len({id(moments) for moments in found.values()}) == 1, "they have the same inputs"
        moments = found[stage[0]]
        moments.finish(ALONE)
        x = inputs_of(model, at.quantized, stage[0], at.quantized_in)
        right = inputs_of(model, at.full, stage[0], at.full_in)
        assert moments.n_tokens == tokens.numel()
        assert moments.drift is not None
        assert_near(moments.hessian, x.T @ x)
        wanted = x.T @ (right - x)
        assert_near(moments.drift, wanted, within=0.03)
        for matrix in stage:
            matrix.of(at.quantized).mul_(0.9)

    moments = at.passes.moments([DOWN], ())[DOWN]
    moments.finish(ALONE)
    x = inputs_of(model, at.quantized, DOWN, at.quantized_in)
    rest = model.run_all(0, at.quantized, at.quantized_in) - (x @ DOWN.of(at.quantized).T).view(at.quantized_in.shape)
    wanted = (at.full_out() - rest).reshape(-1, HIDDEN)
    assert moments.drift is None
    assert moments.target is not None
    assert_near(moments.target, x.T @ wanted, within=0.03)

    DOWN.of(at.quantized).mul_(0.9)
    at.passes.finish()
    right = model.run_all(0, at.quantized, at.quantized_in)
    assert_near(at.quantized_out(), right)
    at.streams.scratch.close()


def test_products_are_not_computed_again(model: LayeredModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    at = set_up(model, tokens, DENSE, 1 << 30, tmp_path)
    at.passes.moments(QKV, {O_PROJ, GATE, UP, DOWN})
    at.passes.moments([O_PROJ], {GATE, UP, DOWN})
    for matrix in QKV:  # too late: their products are replayed
        matrix.of(at.quantized).zero_()
    moments = at.passes.moments([GATE, UP], {DOWN})[GATE]
    moments.finish(ALONE)
    x = inputs_of(model, at.full, GATE, at.quantized_in)
    assert_near(moments.hessian, x.T @ x)


def test_what_adds_to_the_output(model: LayeredModel, tokens: torch.Tensor) -> None:
    layer, hidden = model.working_copy(0), model.embed(tokens)
    assert adds_to_output(model, 0, layer, DOWN, hidden)
    assert not adds_to_output(model, 0, layer, O_PROJ, hidden), "what follows it depends on it"
    assert not adds_to_output(model, 0, layer, UP, hidden)


def test_equal_inputs_have_no_drift(model: LayeredModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    at = set_up(model, tokens, DENSE, 1 << 30, tmp_path)
    for number, batch in enumerate(at.streams.batches):
        at.streams.replace(at.streams.quantized, number, at.full_in[batch])
    moments = at.passes.moments(QKV, {O_PROJ, GATE, UP, DOWN})[QKV[0]]
    assert moments.drift is not None
    assert not moments.drift.any()


def test_a_last_matrix_that_is_not_the_only_one_goes_without_target(
    model: LayeredModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    at = set_up(model, tokens, [[GATE, UP]], 1 << 30, tmp_path)
    moments = at.passes.moments([GATE, UP], ())[UP]
    assert moments.target is None
    UP.of(at.quantized).mul_(0.5)
    at.passes.finish()
    right = model.run_all(0, at.quantized, at.quantized_in)
    assert_near(at.quantized_out(), right)


def test_experts_have_moments_of_their_own(mixtral: LayeredModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    layer, hidden = mixtral.working_copy(0), mixtral.embed(tokens)
    # without the matrices before them, whose rounded products send a token to another expert now and then
    wanted = [matrix for matrix in matrices_of(layer) if matrix.is_expert]
    order = stages(layer, wanted, lambda: mixtral.run(0, layer, hidden))
    assert len(order) > 1
    at = set_up(mixtral, tokens, order, 1 << 30, tmp_path)
    for number, stage in enumerate(order):
        moments = at.passes.moments(stage, {matrix for members in order[number + 1 :] for matrix in members})
        # two experts for each token
        assert sum(one.n_tokens for one in moments.values()) == 2 * tokens.numel()
        for matrix in stage:
            moments[matrix].finish(ALONE)
            x = inputs_of(mixtral, at.quantized, matrix, at.quantized_in)
            assert_near(moments[matrix].hessian, x.T @ x)
    at.passes.finish()
    right = mixtral.run_all(0, at.quantized, at.quantized_in)
    assert_near(at.quantized_out(), right)


def test_gradients_come_with_the_full_pass(model: LayeredModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    """The sum over the tokens of g xT is the gradient of the loss for the matrix."""
    at = set_up(model, tokens, DENSE, 1 << 30, tmp_path)
    upstream = torch.randn(at.full_in.shape, generator=torch.Generator().manual_seed(2))
    streams = Streams(Scratch(1 << 30, tmp_path), [[0, 1, 2], [3, 4], [5]])
    streams.start((at.full_in[batch], at.full_in[batch]) for batch in streams.batches)
    found: dict[Matrix, list[torch.Tensor]] = {}
    FullPass(model, 0, at.full, streams).run(
        DENSE,
        {0: upstream[:3], 2: upstream[5:]},
        [QKV[0], DOWN],
        lambda matrix, g: found.setdefault(matrix, []).append(g),
    )
    torch.testing.assert_close(torch.cat([kept.get() for kept in streams.full]), at.full_out())
    chosen = [0, 1, 2, 5]
    for matrix in (QKV[0], DOWN):
        parameter = at.full.get_parameter(matrix.name).requires_grad_()
        out = model.run(0, at.full, at.full_in[chosen])
        (right,) = torch.autograd.grad(out, parameter, upstream[chosen])
        x = inputs_of(model, at.full, matrix, at.full_in[chosen])
        torch.testing.assert_close(torch.cat(found[matrix]).T @ x, right, rtol=1e-3, atol=1e-3)
