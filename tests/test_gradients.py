"""The gradients of a model's predictions, and what is made of them."""

from pathlib import Path

import pytest
import torch
from checkpoints import exact_model

from tritconv.calibration import outputs
from tritconv.calibration.checkpoints import Checkpoints
from tritconv.calibration.gradients import LayerGradients, draw, gradients, stride
from tritconv.calibration.inputs import Inputs
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.outputs import OutputMoments, UpstreamGradients, some_sequences
from tritconv.calibration.ranks import ALONE
from tritconv.calibration.scratch import Scratch
from tritconv.calibration.store import LayerStore

Q, DOWN = Matrix("self_attn.q_proj.weight"), Matrix("mlp.down_proj.weight")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LayeredModel:
    return exact_model(checkpoint)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(1 << 30, tmp_path)


def found_by_layer(
    model: LayeredModel, tokens: torch.Tensor, seed: int, scratch: Scratch, matrices: tuple[Matrix, ...] = (Q, DOWN)
) -> dict[int, LayerGradients]:
    steps = gradients(model, tokens, draw(tokens, seed), lambda *_: matrices, lambda what: None, scratch)
    return {step.index: step for step in steps}


def test_gradients_are_those_of_the_whole_model(
    model: LayeredModel, tokens: torch.Tensor, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over the tokens of g xT is the gradient for the matrix: compare with that of the whole model."""
    whole = model.whole_copy().float()
    weights = {(i, m): layer.get_parameter(m.name) for i, layer in enumerate(whole.model.layers) for m in (Q, DOWN)}
    for one in weights.values():
        one.requires_grad_()
    logits = whole(input_ids=tokens).logits
    labels = logits.detach().argmax(dim=-1)

    def of_likeliest(hidden: torch.Tensor, *_: object) -> torch.Tensor:
        hidden = hidden.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
        return torch.autograd.grad(loss, hidden)[0]

    monkeypatch.setattr(model, "label_gradients", of_likeliest)
    found = found_by_layer(model, tokens, 1, scratch)
    assert list(found) == [1, 0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    for (index, matrix), right in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        x, g = found[index].products[matrix]
        torch.testing.assert_close(g.T @ x, right, rtol=0.02, atol=0.02 * float(right.abs().max()))


def test_labels_are_drawn_from_the_predictions(model: LayeredModel, tokens: torch.Tensor, scratch: Scratch) -> None:
    """The gradient for the logits is the prediction less the label: drawn fairly, it is zero in the mean."""
    norms = []
    for count in (1, 32):
        mean = sum(found_by_layer(model, tokens, seed, scratch, ())[1].upstream for seed in range(count))
        norms.append(float(torch.as_tensor(mean / count).norm()))
    assert norms[1] < 0.3 * norms[0]  # a thirty-second, in squares


@pytest.mark.build
def test_upstream_gradients_by_batch(
    model: LayeredModel, tokens: torch.Tensor, scratch: Scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels belong to sequences: a process that has some of them draws the same ones."""
    whole = found_by_layer(model, tokens, 7, scratch)
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))
    checkpoints = Checkpoints(LayerStore(Inputs("layers", "digest", "", 7, model.machinery), "tiny"), ALONE, 2)
    found = UpstreamGradients(model, tokens, [[4, 1], [3]], 7, scratch, checkpoints, 0, None, lambda what: None)
    for index in (1, 0):
        batches = found.take(index)
        for batch, numbers in enumerate(([4, 1], [3])):
            right = whole[index].upstream[numbers]
            torch.testing.assert_close(batches[batch], right, rtol=0.02, atol=0.02 * float(right.abs().max()))
    assert found.take(0) == {}, "they are let go"


def test_output_moments_are_sums_in_diagonal_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "MOST_ROWS", 20)
    g = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    moments = OutputMoments()
    for part in g.split(30):
        moments.add(Q, part)
    moments.finish({Q: 50, DOWN: 8}, torch.device("cpu"), ALONE)
    right = g.T @ g
    start = 0
    assert [len(block) for block in moments.blocks[Q]] == [17, 17, 16]
    for block in moments.blocks[Q]:
        part = slice(start, start + len(block))
        torch.testing.assert_close(block, right[part, part], rtol=1e-4, atol=1e-3)
        start += len(block)
    assert not moments.blocks[DOWN][0].any(), "no token has reached it"


def test_only_some_sequences_are_looked_at(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "n_with_gradients", lambda n_tokens: 64)
    assert stride(tokens, 64) == 3
    assert some_sequences(tokens) == [0, 3]
    assert stride(tokens, 1) == len(tokens), "one sequence at least"


@pytest.mark.parametrize(("n_tokens", "some"), [(16384, 4096), (32768, 8192), (65536, 8192), (262144, 32768)])
def test_the_longer_the_text_the_smaller_the_share_that_is_looked_at(n_tokens: int, some: int) -> None:
    assert outputs.n_with_gradients(n_tokens) == some
