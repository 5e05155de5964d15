"""Token embeddings and output matrix: their second moments, what errors cost, and gptq for them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import exact_model, make_checkpoint
from command_line import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from tritconv.calibration.gradients import draw, gradients
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.outside import OutsideMatrix, OutsideMoments
from tritconv.calibration.ranks import ALONE
from tritconv.calibration.scratch import Scratch
from tritconv.methods.gptq.columns import ColumnLoop
from tritconv.methods.gptq.outside import quantize_outside
from tritcore import encoder, ggml
from tritcore.gguf_types import TRIT_TYPE

pytestmark = pytest.mark.build

EMBEDDING, HEAD, BOTH = (OutsideMatrix(*roles, 600) for roles in ((True, False), (False, True), (True, True)))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (32, 32), generator=torch.Generator().manual_seed(0)).clamp_(max=400)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LayeredModel:
    return exact_model(make_checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param))


@pytest.fixture(scope="module")
def moments(model: LayeredModel, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> OutsideMoments:
    found = OutsideMoments.zeros(tokens, model.vocabulary, model.width)
    scratch = Scratch(1 << 30, tmp_path_factory.mktemp("scratch"))
    list(gradients(model, tokens, draw(tokens, 0), lambda *_: (), lambda _: None, scratch, found))
    found.finish(ALONE)
    return found


def test_moments_are_those_of_the_whole_model(
    model: LayeredModel, moments: OutsideMoments, tokens: torch.Tensor
) -> None:
    whole = model.whole_copy().float()
    seen: list[torch.Tensor] = []
    whole.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        p = whole(input_ids=tokens).logits.softmax(dim=-1).flatten(0, 1)
    close = {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(moments.variances, (p * (1 - p)).mean(dim=0), **close)
    torch.testing.assert_close(moments.inputs, seen[0].T @ seen[0] / len(seen[0]), rtol=1e-3, atol=1e-4)
    counts = tokens.flatten().bincount(minlength=600).clamp(min=1)
    assert moments.frequencies.sum() == pytest.approx(1)
    used = tokens.flatten().unique()
    ratio = moments.frequencies[used] / counts[used]
    torch.testing.assert_close(ratio, ratio[:1].expand(len(ratio)))


def test_the_predicted_loss_is_the_divergence(
    model: LayeredModel, moments: OutsideMoments, tokens: torch.Tensor
) -> None:
    whole = model.whole_copy().float()
    tied = model.has_tied_head
    parts = {"both": whole.lm_head} if tied else {"embedding": whole.model.embed_tokens, "head": whole.lm_head}
    roles = {"both": BOTH, "embedding": EMBEDDING, "head": HEAD}

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            return whole(input_ids=tokens).logits.double().log_softmax(dim=-1)

    before = predictions()
    for name, module in parts.items():
        kept = module.weight.detach().clone()
        stored = ggml.dequantize(ggml.quantize(kept.numpy(), Type.TRIT3), Type.TRIT3)
        error = torch.from_numpy(stored) - kept
        with torch.no_grad():
            module.weight += error
            divergence = float((before.exp() * (before - predictions())).sum(dim=-1).mean())
            module.weight.copy_(kept)
        predicted = sum(
            float(roles[name].losses(error[rows], rows, moments).sum()) for rows in torch.arange(600).split(250)
        )
        assert predicted == pytest.approx(divergence, rel=0.35), name


@pytest.mark.parametrize("matrix", [EMBEDDING, HEAD, BOTH], ids=["embedding", "output", "both"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gptq_costs_less_than_the_search(
    matrix: OutsideMatrix, depth: int, model: LayeredModel, moments: OutsideMoments
) -> None:
    values = model.whole_copy().float().lm_head.weight.detach().numpy()

    def loss(data: np.ndarray) -> float:
        error = torch.from_numpy(ggml.dequantize(data, TRIT_TYPE[depth]) - values)
        return float(matrix.losses(error, torch.arange(600), moments).sum())

    found = quantize_outside(values, depth, matrix, moments, model, ColumnLoop(1), ALONE)
    assert found is not None
    data, searched = found
    assert not searched
    assert loss(data) < 0.9 * loss(encoder.quantize(values, depth))


@pytest.mark.parametrize("matrix", [EMBEDDING, HEAD, BOTH], ids=["embedding", "output", "both"])
@pytest.mark.parametrize("count", [150, 599, 600])
def test_some_rows_stand_for_all(
    matrix: OutsideMatrix, count: int, model: LayeredModel, moments: OutsideMoments
) -> None:
    values = model.whole_copy().float().lm_head.weight.detach().numpy()
    values = values * np.geomspace(0.1, 10, 600, dtype=np.float32)[:, None]
    error = torch.from_numpy(ggml.dequantize(ggml.quantize(values, Type.TRIT3), Type.TRIT3) - values)
    rows, factors = matrix.sample(values.astype(np.float16), moments, count)
    assert len(rows) <= count
    estimate = float(matrix.losses(error[rows], rows, moments) @ factors)
    exact = float(matrix.losses(error, torch.arange(600), moments).sum())
    assert estimate == pytest.approx(exact, rel=0.04 if count < 600 else 1e-6)


def test_rows_that_the_model_has_no_prediction_of(model: LayeredModel, moments: OutsideMoments) -> None:
    """A GGUF file may have more tokens than the model, or fewer."""
    values = np.ones((640, model.width), np.float32)
    longer, shorter = OutsideMatrix(True, True, 640), OutsideMatrix(True, True, 500)
    for matrix, some in ((longer, values), (shorter, values[:500])):
        rows = torch.cat([numbers for numbers, _ in matrix.classes(moments)])
        assert sorted(rows.tolist()) == list(range(len(some)))
        assert quantize_outside(some, 2, matrix, moments, model, ColumnLoop(1), ALONE) is not None


def test_a_type_that_does_not_reach_the_weights(model: LayeredModel, moments: OutsideMoments) -> None:
    values = np.full((600, model.width), 1e-7, np.float32)
    assert quantize_outside(values, 2, BOTH, moments, model, ColumnLoop(1), ALONE) is None


@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_calibrated_on_the_quantized_embeddings(tied: bool, tmp_path: Path) -> None:
    """And a second run finds all of it in the cache."""
    folder = make_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    common = ("--depth", 2, "--calib-tokens", 2048, "--calib-seq", 64, "--method", "gptq")
    environment = {"TRITCONV_CACHE": str(tmp_path / "cache")}

    def convert(name: str, *options: object) -> dict[str, np.ndarray]:
        done = tritconv("hf-to-gguf", folder, *common, "-o", tmp_path / name, *options, **environment)
        assert done.returncode == 0, done.stderr
        return {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / name).tensors}

    plain, coarse = convert("plain.gguf"), convert("coarse.gguf", "--embed-type", "trit1")
    again = convert("again.gguf", "--embed-type", "trit1")
    assert all(np.array_equal(coarse[name], again[name]) for name in coarse)
    layers = [name for name in plain if name.startswith("blk.") and plain[name].dtype == np.uint8]
    assert layers
    assert all((plain[name] != coarse[name]).any() for name in layers)
    reader = GGUFReader(tmp_path / "coarse.gguf")
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    field = reader.get_field("trit.tensor.method")
    assert field is not None
    methods = dict(zip(types, field.contents(), strict=True))
    outside = [name for name in types if "blk." not in name and "norm" not in name]
    assert outside == ["token_embd.weight"] if tied else ["token_embd.weight", "output.weight"]
    for name in outside:
        assert types[name] is Type.TRIT1
        assert methods[name] == 1, "gptq"
