"""Calibration: layers, stages, rows, and text that the model writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import exact_model, make_checkpoint

from tritconv.calibration import own_text
from tritconv.calibration.inputs import Inputs
from tritconv.calibration.matrices import Matrix, matrices_of, stages
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.rows import RowIndex
from tritconv.calibration.store import LayerStore

LENGTH = 32


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LayeredModel:
    return exact_model(checkpoint)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> LayeredModel:
    return exact_model(make_checkpoint(tmp_path_factory.mktemp("mixtral"), "Mixtral"))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (6, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.build
def test_the_model_goes_on_from_the_text(
    model: LayeredModel, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "_BATCH", 4)

    def write(cache: str, seed: int = 0, count: int = 10) -> torch.Tensor:
        monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / cache))
        steps: list[int] = []
        store = LayerStore(Inputs("own text", "digest", "", seed, model.machinery), "tiny")
        written = own_text.write(model, tokens, count, seed, store, lambda done, _: steps.append(done))
        assert steps == sorted(steps)
        return written

    first = write("a")
    assert first.shape == (10, LENGTH)
    starts = torch.cat([tokens, tokens[:4]])[:, : LENGTH // 2]
    assert torch.equal(first[:, : LENGTH // 2], starts)
    assert not torch.equal(first[:4], first[6:]), "the same beginnings should not go on in the same way"
    assert not (first[:, LENGTH // 2 :] == model.tokenizer.eos_token_id).any()
    assert not torch.equal(first, write("b", seed=1))
    for kept in (tmp_path / "a").glob("*/layer-0001*"):  # as if killed after the first batch
        kept.unlink()
    assert torch.equal(first, write("a"))
    assert torch.equal(first[:7], write("c", count=7))


def test_layers_give_what_the_model_gives(model: LayeredModel, tokens: torch.Tensor) -> None:
    hidden = model.embed(tokens)
    for index in range(model.n_layers):
        hidden = model.run_all(index, model.working_copy(index), hidden)
    with torch.no_grad():
        wanted = model.whole_copy().float()(input_ids=tokens).logits
        logits = model.logits(hidden)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-2)  # positions come in float16


def test_stages_of_a_dense_layer(model: LayeredModel, tokens: torch.Tensor) -> None:
    layer, hidden = model.working_copy(0), model.embed(tokens)
    order = stages(layer, list(matrices_of(layer)), lambda: model.run(0, layer, hidden))
    names = [[matrix.name.split(".")[1] for matrix in stage] for stage in order]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_stages_of_experts(mixtral: LayeredModel, tokens: torch.Tensor) -> None:
    layer, hidden = mixtral.working_copy(0), mixtral.embed(tokens)
    wanted = [matrix for matrix in matrices_of(layer) if "gate.weight" not in matrix.name]
    order = stages(layer, wanted, lambda: mixtral.run(0, layer, hidden))
    assert [len(stage) for stage in order] == [3, 1, 4, 4]
    assert sorted(matrix.expert or 0 for matrix in order[3]) == [0, 1, 2, 3]


def test_rows_are_found_whatever_their_order() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((40, 64)).astype(np.float16)
    weights[7] = weights[3] = 0  # rows that are alike
    places = [(0, Matrix("a")), (1, Matrix("b", 2))]
    index = RowIndex(dict(zip(places, map(torch.from_numpy, np.split(weights, [25])), strict=True)))
    order = rng.permutation(40)
    found = index.find(weights[order])
    assert found is not None
    parts = {place: part.astype(np.float32) for place, part in zip(places, np.split(weights, [25]), strict=True)}
    assert (found.gather(parts) == weights[order]).all()
    changed = weights.copy()
    changed[5, 5] += 1
    assert index.find(changed) is None
