"""The walk over the layers: interrupted anywhere, it goes on to the same blocks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import exact_model, make_checkpoint

from tritconv.calibration import checkpoints
from tritconv.calibration.inputs import Inputs
from tritconv.calibration.matrices import matrices_of
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.store import LayerStore
from tritconv.methods.gptq.layers import FinishedLayer, LayerQuantizer

pytestmark = pytest.mark.build

N_LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LayeredModel:
    return exact_model(make_checkpoint(tmp_path_factory.mktemp("model"), "Qwen2", num_hidden_layers=N_LAYERS))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (9, 64), generator=torch.Generator().manual_seed(0))


def quantizer(model: LayeredModel, memory: int = 1 << 30) -> LayerQuantizer:
    layer = model.working_copy(0)
    matrices = [matrix for matrix in matrices_of(layer) if matrix.of(layer).shape[1] % 64 == 0]
    depths = {(index, matrix): 2 for index in range(N_LAYERS) for matrix in matrices}
    store = LayerStore(Inputs("layers", "digest", "", 0, model.machinery), "tiny")
    return LayerQuantizer(model, depths, store, 0, memory)


def blocks_of(layers: list[FinishedLayer]) -> dict[tuple[int, str], bytes]:
    return {(layer.index, str(m)): data.tobytes() for layer in layers for m, data in layer.blocks.items()}


@pytest.fixture
def whole(
    model: LayeredModel, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, str], bytes]:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "whole"))
    layers = list(quantizer(model).run(tokens, lambda index, what: None))
    assert [layer.index for layer in layers] == list(range(N_LAYERS))
    return blocks_of(layers)


def test_the_budget_changes_nothing(
    whole: dict[tuple[int, str], bytes],
    model: LayeredModel,
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "small"))
    assert blocks_of(list(quantizer(model, memory=0).run(tokens, lambda index, what: None))) == whole


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["kept", "computed again"])
@pytest.mark.parametrize("n_done", [1, 3])
def test_a_run_that_ended_early_goes_on(
    whole: dict[tuple[int, str], bytes],
    model: LayeredModel,
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_done: int,
    seconds: float,
) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "_WORTH_KEEPING", seconds)
    layers = quantizer(model).run(tokens, lambda index, what: None)
    for _ in range(n_done):
        next(layers)
    if n_done + 1 < N_LAYERS:  # killed within the next layer, whose input is kept already
        monkeypatch.setattr(LayerStore, "save", _killed_at(LayerStore.save, n_done))
        with pytest.raises(KeyboardInterrupt):
            next(layers)
        monkeypatch.undo()
        monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(checkpoints, "_WORTH_KEEPING", seconds)
    del layers  # it gives its file back

    read: list[int] = []
    plain = model.working_copy

    def watched(index: int) -> torch.nn.Module:
        read.append(index)
        return plain(index)

    monkeypatch.setattr(model, "working_copy", watched)
    assert blocks_of(list(quantizer(model).run(tokens, lambda index, what: None))) == whole
    if seconds == 0.0 and n_done + 1 < N_LAYERS:
        assert set(read[1:]) == set(range(n_done, N_LAYERS)), "finished layers are not read again"
    left = [path.name for path in (tmp_path / "cache").glob("*/*.safetensors")]
    assert all(name.startswith("layer-") for name in left), "nothing but layers is kept in the end"


def _killed_at(plain: Callable[..., None], layer: int) -> Callable[..., None]:
    """`LayerStore.save` that is interrupted where a layer is to be kept."""

    def save(self: LayerStore, number: int, arrays: object, kind: str = "layer") -> None:
        if kind == "layer" and number == layer:
            raise KeyboardInterrupt
        plain(self, number, arrays, kind)

    return save
