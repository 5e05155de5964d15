"""Importances measured on a text: those of llama-imatrix, and the same after an interruption."""

import subprocess
from pathlib import Path

import ggml
import numpy as np
import pytest
import torch
from checkpoints import exact_model, make_checkpoint, maps_of, to_f16_gguf
from command_line import tritconv

from tritconv.calibration import checkpoints
from tritconv.calibration import model as model_module
from tritconv.calibration.context import Context
from tritconv.calibration.importance import TextImportances
from tritconv.calibration.inputs import Inputs
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.rows import OUTSIDE, RowMap
from tritconv.methods.imatrix_file import read_imatrix
from tritconv.sources.gguf import open_gguf
from tritconv.sources.source import Kind, Origin, Source, SourceTensor

pytestmark = pytest.mark.build


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LayeredModel:
    return exact_model(make_checkpoint(tmp_path_factory.mktemp("model"), "Mixtral", num_hidden_layers=3))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (5, 32), generator=torch.Generator().manual_seed(0))


def context_of(model: LayeredModel, tokens: torch.Tensor) -> tuple[Context, list[SourceTensor]]:
    """With a tensor for each parameter of the layers, and one outside them."""
    maps, tensors = maps_of(model), []
    for name, rows in maps.items():
        index, matrix = rows.places[0]
        experts, n = len(rows.places), matrix.of(model.working_copy(index)).shape[1]
        shape = (experts, len(rows.row) // experts, n) if experts > 1 else (len(rows.row), n)
        tensors.append(SourceTensor(name, shape, Kind.MATRIX, lambda: np.empty(0)))
    maps["token_embd.weight"] = RowMap.whole((OUTSIDE, Matrix("token_embd.weight")), 600)
    tensors.append(SourceTensor("token_embd.weight", (600, 192), Kind.EMBEDDING, lambda: np.empty(0)))
    source = Source("tiny", "llama", {}, tuple(tensors), Origin(Path("tiny")))
    inputs = Inputs("", "digest", "", 0, model.machinery)
    return Context(model, source, maps, {}, tokens, tokens[:0], inputs, 1 << 30, ()), tensors


def test_the_mean_squares_of_inputs(model: LayeredModel, tokens: torch.Tensor) -> None:
    """As the whole model has them, under hooks."""
    context, tensors = context_of(model, tokens)
    found = {tensor.name: TextImportances(context, lambda what: None).of(tensor) for tensor in tensors[::4]}
    assert found.pop("token_embd.weight", None) is None
    whole = model.whole_copy().float()
    inputs: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(whole.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(
                    lambda _, args, key=f"blk.{index}.{name}.weight": inputs.__setitem__(key, args[0])
                )
    with torch.no_grad():
        whole(input_ids=tokens)
    compared = 0
    for name, importance in found.items():
        assert importance is not None
        if name in inputs:
            right = inputs[name].flatten(0, -2).square().mean(dim=0).numpy()
            np.testing.assert_allclose(importance, right[None], rtol=1e-3)
            compared += 1
        assert len(importance) == (4 if "experts" in name else 1)
    assert compared >= 2


def test_an_expert_that_no_token_came_to_has_ones(model: LayeredModel) -> None:
    context, tensors = context_of(model, torch.full((2, 32), 5))  # all tokens go to the same two experts
    importances = TextImportances(context, lambda what: None)
    experts = next(tensor for tensor in tensors if len(tensor.shape) == 3)
    found = importances.of(experts)
    assert found is not None
    assert (found == 1).all(axis=1).sum() == 2


def test_an_interrupted_pass_goes_on(
    model: LayeredModel, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_WORTH_KEEPING", 0.0)
    context, tensors = context_of(model, tokens)
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "whole"))
    importances = TextImportances(context, lambda what: None)
    whole = [importances.of(tensor) for tensor in tensors]

    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "parts"))
    n_mine = sum(tensor.name.startswith(("blk.0.", "blk.1.")) for tensor in tensors)
    importances = TextImportances(context, lambda what: None)
    first = [importances.of(tensor) for tensor in tensors[:n_mine]]
    again: list[str] = []
    importances = TextImportances(context, again.append)
    rest = [importances.of(tensor) for tensor in tensors]
    for parts in (first, rest):
        for part, right in zip(parts, whole, strict=False):
            np.testing.assert_array_equal(part, right)
    measured = [what for what in again if what.startswith("importances")]
    assert measured == ["importances: layer 2/3", "importances: layer 3/3"]
    importances = TextImportances(context, lambda what: pytest.fail("all layers were kept"))
    np.testing.assert_array_equal(importances.of(tensors[0]), whole[0])


def test_those_of_llama_imatrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text, in sequences of the same length: the same importances, but for the rounding to F16."""
    monkeypatch.setattr(model_module, "fast_precision", lambda _: torch.float32)
    folder = make_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    gguf = to_f16_gguf(folder, tmp_path / "F16.gguf")
    command = [ggml.tool("llama-imatrix"), "-m", gguf, "-f", text, "-o", tmp_path / "i.gguf", "-c", 64, "-t", 2]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=300)
    theirs = read_imatrix(tmp_path / "i.gguf")
    common = ("--depth", 2, "--force", "-o", tmp_path / "x.gguf")
    measured = tritconv(
        *("hf-to-gguf", folder, *common, "--method", "imatrix", "--calibrate", text, "--calib-seq", 64),
    )
    assert measured.returncode == 0, measured.stderr
    read = tritconv("hf-to-gguf", folder, "--depth", 2, "-o", tmp_path / "y.gguf", "--imatrix", tmp_path / "i.gguf")
    assert read.returncode == 0, read.stderr
    plain = tritconv("hf-to-gguf", folder, "--depth", 2, "-o", tmp_path / "z.gguf", "--fast")
    assert plain.returncode == 0, plain.stderr
    right = {t.name: t.load() for t in open_gguf(tmp_path / "y.gguf").tensors if t.name in theirs}

    def alike(path: Path) -> float:
        """The share of the weights that are the same as with the importances of llama-imatrix."""
        return float(np.mean([(t.load() == right[t.name]).mean() for t in open_gguf(path).tensors if t.name in right]))

    # the first token of each sequence is another one
    assert alike(tmp_path / "x.gguf") > 0.8
    assert alike(tmp_path / "x.gguf") > 1.2 * alike(tmp_path / "z.gguf")
