"""The gradients of a model's predictions, and what is made of them."""

from pathlib import Path

import pytest
import torch
from checkpoints import HIDDEN, exact_model, make_checkpoint

from tritconv.calibration import gradients as module
from tritconv.calibration import outputs
from tritconv.calibration.gradients import gradients, stride
from tritconv.calibration.matrices import Matrix, matrices_of
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.outputs import OutputMoments

Q, DOWN = Matrix("self_attn.q_proj.weight"), Matrix("mlp.down_proj.weight")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LayeredModel:
    return exact_model(checkpoint)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (6, 32), generator=torch.Generator().manual_seed(0))


def test_gradients_are_those_of_the_whole_model(
    model: LayeredModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over the tokens of g xT is the gradient for the matrix: compare with that of the whole model."""
    drawn = []

    def likeliest(logits: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        drawn.append(logits.argmax(dim=-1))
        return drawn[-1]

    monkeypatch.setattr(module, "_drawn", likeliest)
    found = {step.index: step for step in gradients(model, tokens, 1, lambda *_: (Q, DOWN), lambda what: None)}
    assert list(found) == [1, 0]

    whole = model.whole_copy().float()
    weights = {(i, m): layer.get_parameter(m.name) for i, layer in enumerate(whole.model.layers) for m in (Q, DOWN)}
    for one in weights.values():
        one.requires_grad_()
    logits = whole(input_ids=tokens).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, torch.cat(drawn), reduction="sum")
    for (index, matrix), right in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        x, g = found[index].products[matrix]
        torch.testing.assert_close(g.T @ x, right, rtol=0.01, atol=0.01 * float(right.abs().max()))


def test_labels_are_drawn_from_the_predictions(model: LayeredModel, tokens: torch.Tensor) -> None:
    """The gradient for the logits is the prediction less the label: drawn fairly, it is zero in the mean."""
    norms = []
    for count in (1, 32):
        mean = sum(
            next(iter(gradients(model, tokens, seed, lambda *_: (), lambda what: None))).upstream
            for seed in range(count)
        )
        norms.append(float(torch.as_tensor(mean / count).norm()))
    assert norms[1] < 0.3 * norms[0]  # a thirty-second, in squares


def moments_of(model: LayeredModel, tokens: torch.Tensor, index: int, seed: int = 0) -> dict[Matrix, torch.Tensor]:
    layer = model.working_copy(index)
    hidden = model.embed(tokens)
    for before in range(index):
        hidden = model.run_all(before, model.working_copy(before), hidden)
    matrices = [matrix for matrix in matrices_of(layer) if not matrix.is_expert]
    return OutputMoments(model, tokens, seed).of(index, layer, matrices, hidden, lambda what: None)


def test_output_moments_are_sums_over_the_text(
    model: LayeredModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_SHARE", 1)
    found = {step.index: step for step in gradients(model, tokens, 0, lambda *_: (Q, DOWN), lambda what: None)}
    for index in (0, 1):
        moments = moments_of(model, tokens, index)
        assert moments.keys() == set(matrices_of(model.layers[index]))
        for matrix in (Q, DOWN):
            _, g = found[index].products[matrix]
            right = g.T @ g
            assert moments[matrix].shape == (len(matrix.of(model.layers[index])),) * 2
            torch.testing.assert_close(moments[matrix], right, rtol=0.02, atol=0.02 * float(right.abs().max()))


def test_only_some_sequences_are_looked_at(
    model: LayeredModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_MOST_TOKENS", 64)
    monkeypatch.setattr(outputs, "_SHARE", 1)
    assert stride(tokens, 64) == 3
    some = moments_of(model, tokens, 1)
    torch.testing.assert_close(some[DOWN], moments_of(model, tokens[::3], 1)[DOWN])
    assert stride(tokens, 1) == len(tokens), "one sequence at least"


def test_matrices_beside_experts_have_output_moments(tmp_path: Path, tokens: torch.Tensor) -> None:
    found = moments_of(exact_model(make_checkpoint(tmp_path / "mixtral", "Mixtral")), tokens, 0)
    output = next(moments for matrix, moments in found.items() if "o_proj" in matrix.name)
    assert output.shape == (HIDDEN, HIDDEN)
    assert torch.linalg.eigvalsh(output).min() > -1e-3 * output.diagonal().max()
