"""tune: it lowers the divergence on text that it does not train on, and never leaves it higher."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritconv.calibration.inputs import Inputs
from tritconv.calibration.matrices import matrices_of
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.rows import Place
from tritconv.calibration.store import LayerStore
from tritconv.calibration.text import hold_out
from tritconv.methods.tune import Latent, QuantizedEnds, Tuned, TuneOptions, load_tuned, save_tuned, tune
from tritcore import encoder
from tritcore.codec import Blocks, unpack
from tritcore.format import BYTES_PER_BLOCK

pytestmark = pytest.mark.build

DEPTH = 1
LENGTH = 64


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LayeredModel:
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("model") / "louder")
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if name.endswith("_proj.weight"):  # random layers of the usual size hardly matter for the predictions
            values.mul_(4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return LayeredModel(folder)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (64, LENGTH), generator=torch.Generator().manual_seed(0))


def blocks_of(weights: torch.Tensor) -> Blocks:
    return unpack(DEPTH, encoder.quantize(weights.float().numpy(), DEPTH, None).reshape(-1, BYTES_PER_BLOCK[DEPTH]))


def train(model: LayeredModel, tokens: torch.Tensor, options: TuneOptions) -> tuple[Tuned, dict[Place, Blocks], list]:
    """Train from what the search makes; also what that was, and the losses of the epochs."""
    layers = [model.working_copy(index) for index in range(model.n_layers)]
    start = {(i, m): blocks_of(m.of(layer)) for i, layer in enumerate(layers) for m in matrices_of(layer)}
    latents = {
        (index, matrix): Latent(blocks, torch.zeros(matrix.of(layers[index]).shape))
        for (index, matrix), blocks in start.items()
    }
    norms = [(i, name) for i, layer in enumerate(layers) for name, p in layer.named_parameters() if p.dim() == 1]
    losses: list[float] = []
    steps: list[tuple[int, int]] = []
    tuned = tune(
        model,
        layers,
        latents,
        norms,
        QuantizedEnds(),
        *hold_out(tokens),
        options,
        lambda *step: steps.append(step),
        lambda epoch, loss: losses.append(loss),
    )
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))
    assert tuned.norms.keys() == set(norms)
    assert tuned.losses == losses
    return tuned, start, losses


def test_held_out_divergence_falls(model: LayeredModel, tokens: torch.Tensor) -> None:
    tuned, start, losses = train(model, tokens, TuneOptions(epochs=8, code_rate=0.1, norm_rate=0.01))
    assert len(losses) == 9
    assert min(losses[1:]) < 0.9 * losses[0]
    assert any((tuned.blocks[place].codes != start[place].codes).any() for place in start)


def test_the_start_is_kept_where_training_does_harm(model: LayeredModel, tokens: torch.Tensor) -> None:
    tuned, start, losses = train(model, tokens, TuneOptions(epochs=1, code_rate=50, norm_rate=50))
    assert losses[1] > losses[0]
    for place, blocks in start.items():
        assert (tuned.blocks[place].codes == blocks.codes).all()
    for (index, name), norm in tuned.norms.items():
        assert torch.equal(norm, model.working_copy(index).get_parameter(name))


def test_same_seed_same_result(model: LayeredModel, tokens: torch.Tensor) -> None:
    options = TuneOptions(epochs=1, code_rate=0.1)
    (first, _, _), (second, _, _) = (train(model, tokens[:16], options) for _ in range(2))
    for place, blocks in first.blocks.items():
        assert (blocks.codes == second.blocks[place].codes).all()


def test_a_finished_result_is_kept(
    model: LayeredModel,
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path))
    options = TuneOptions(epochs=2, code_rate=0.1)
    tuned, _, losses = train(model, tokens[:16], options)
    store = LayerStore(Inputs("tune", "tiny", "", 0, model.machinery), "tiny")
    depths = dict.fromkeys(tuned.blocks, DEPTH)
    assert load_tuned(store, depths) is None
    save_tuned(store, tuned)
    kept = load_tuned(store, depths)
    assert kept is not None
    assert kept.blocks.keys() == tuned.blocks.keys()
    for place, blocks in tuned.blocks.items():
        assert (kept.blocks[place].codes == blocks.codes).all()
        assert (kept.blocks[place].scales == blocks.scales).all()
    assert kept.norms.keys() == tuned.norms.keys()
    assert all(torch.equal(kept.norms[place], norm) for place, norm in tuned.norms.items())
    assert kept.losses == losses


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_latent_weights(depth: int) -> None:
    """They round to the codes that they start at, stay within the type's range, and pass gradients on."""
    weights = torch.randn(4, 128, generator=torch.Generator().manual_seed(depth))
    data = encoder.quantize(weights.numpy(), depth, None)
    blocks = unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth]))
    latent = Latent(blocks, torch.full((4, 128), 0.499))
    assert (latent.blocks().codes == blocks.codes).all()
    torch.testing.assert_close(latent.weights(), torch.from_numpy(blocks.decode()).view(4, 128))
    scales = torch.from_numpy(blocks.group_scales()).repeat_interleave(16, 1).view(4, 128)
    torch.testing.assert_close(latent.scaled(torch.ones(4, 128)), scales)
    latent.codes += 1000
    assert (latent.blocks().codes == latent.code_max).all()


@pytest.mark.parametrize(("n", "n_held_out"), [(2, 1), (16, 1), (40, 2), (1000, 16)])
def test_held_out(n: int, n_held_out: int) -> None:
    text, held_out = hold_out(torch.arange(n)[:, None])
    assert len(held_out) == n_held_out
    assert sorted([*text.flatten().tolist(), *held_out.flatten().tolist()]) == list(range(n))


def test_a_single_sequence_is_both() -> None:
    text, held_out = hold_out(torch.zeros(1, 4))
    assert len(text) == len(held_out) == 1
