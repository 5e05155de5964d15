"""Models with small and zero blocks and rows: every matrix gets its type, by every method, and that costs nothing."""

from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file
from test_imatrix import _write as write_imatrix
from test_small_blocks import least, planted
from typer.testing import CliRunner

from tritconv.cli import app
from tritconv.methods.gptq.matrix import Solver
from tritcore.codec import validate
from tritcore.errors import NotFiniteError
from tritcore.format import BYTES_PER_BLOCK
from tritcore.gguf_types import TRIT_TYPE

pytestmark = pytest.mark.build

LAYERS = 2
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
METHODS = ("search", "uniform", "imatrix", "gptq", "tune")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint with small blocks in all matrices, a text, and an imatrix with columns that saw nothing."""
    folder = tmp_path_factory.mktemp("small")
    weights = make_checkpoint(folder / "model", "Qwen2", num_hidden_layers=LAYERS) / "model.safetensors"
    tensors = load_file(weights)
    importances = {}
    rng = np.random.default_rng(0)
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if name.endswith("_proj.weight"):
            tensors[name] = torch.from_numpy(planted(tensor.numpy(), number))
    for layer in range(LAYERS):
        for gguf_name, name in NAMES.items():
            n = tensors[f"model.layers.{layer}.{name}.weight"].shape[1]
            sums = rng.choice([0, 1e-38, 1e-20, 1, 100], (1, n)).astype(np.float32)
            importances[f"blk.{layer}.{gguf_name}.weight.in_sum2"] = sums
            importances[f"blk.{layer}.{gguf_name}.weight.counts"] = np.array([[3]], np.float32)
    save_file(tensors, weights, metadata={"format": "pt"})
    write_imatrix(folder / "imatrix.gguf", importances)
    (folder / "text.txt").write_text("\n\n".join(topics.topics.values())[:20_000], encoding="utf-8")
    return folder


def convert(
    folder: Path, model: str, method: str, monkeypatch: pytest.MonkeyPatch, cache: str = "cache"
) -> tuple[Path, str]:
    """A file in TRIT2, and what was printed."""
    monkeypatch.setenv("TRITCONV_CACHE", str(folder / cache))
    target = folder / f"{model}-{method}.gguf"
    options: list[object] = ["--depth", 2, "--method", method, "-o", target, "--force"]
    if method == "imatrix":
        options += ["--imatrix", folder / "imatrix.gguf"]
    if method in ("gptq", "tune"):
        options += ["--calibrate", folder / "text.txt", "--calib-tokens", 1024, "--calib-seq", 64]
    if method == "tune":
        options += ["--epochs", 1]
    done = CliRunner().invoke(app, ["hf-to-gguf", str(folder / model), *map(str, options)])
    assert done.exit_code == 0, done.output
    return target, done.output


@pytest.mark.parametrize("method", METHODS)
def test_every_matrix_gets_its_type(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, printed = convert(folder, "model", method, monkeypatch)
    assert "is stored as" not in printed
    matrices = [t for t in GGUFReader(target).tensors if t.name.removesuffix(".weight").split(".")[-1] in NAMES]
    assert len(matrices) == LAYERS * len(NAMES)
    for tensor in matrices:
        assert tensor.tensor_type == TRIT_TYPE[2]
        assert 8 * tensor.n_bytes == 3.5 * tensor.n_elements
        validate(2, np.asarray(tensor.data).reshape(-1, BYTES_PER_BLOCK[2]))


def test_small_blocks_cost_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL divergence is what it would be if the small blocks were exact, to a part in a hundred."""
    from transformers import AutoModelForCausalLM

    target, _ = convert(folder, "model", "search", monkeypatch)
    stored = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(target).tensors if "blk" in t.name}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokens = torch.randint(3, 600, (8, 64), generator=torch.Generator().manual_seed(0))

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).logits.log_softmax(dim=-1)

    right = predictions()
    divergences = []
    for exact in (False, True):
        for layer in range(LAYERS):
            for gguf_name, name in NAMES.items():
                weights = model.get_parameter(f"model.layers.{layer}.{name}.weight").data
                blocks = weights.view(-1, 64)
                small = blocks.abs().amax(dim=1, keepdim=True) < least(2)
                assert 0 < small.float().mean() < 0.5
                values = torch.from_numpy(stored[f"blk.{layer}.{gguf_name}.weight"].copy()).view(-1, 64)
                weights.copy_(torch.where(small & exact, blocks, values).view_as(weights))
        divergences.append(float((right.exp() * (right - predictions())).sum(dim=-1).mean()))
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    as_stored, with_exact = divergences
    assert with_exact > 0
    assert as_stored <= 1.01 * with_exact


def test_aims_that_blow_up_end_in_the_search(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blow_up(*_: object) -> None:
        raise NotFiniteError(7)

    monkeypatch.setattr(Solver, "quantize", blow_up)
    target, _ = convert(folder, "model", "gptq", monkeypatch, cache="another")
    types = {t.name: t.tensor_type for t in GGUFReader(target).tensors if ".ffn_" in t.name or ".attn_" in t.name}
    assert {types[f"blk.{layer}.{name}.weight"] for layer in range(LAYERS) for name in NAMES} == {TRIT_TYPE[2]}


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_matrix_that_is_small_as_a_whole(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(folder / f"whole-{method}", "Qwen2", num_hidden_layers=LAYERS)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    target, printed = convert(folder, model.name, method, monkeypatch)
    assert "below the range" in " ".join(printed.split())
    types = {t.name: t.tensor_type.name for t in GGUFReader(target).tensors}
    assert types["blk.1.attn_v.weight"] == "Q8_0"
    assert types["blk.1.attn_k.weight"] == types["blk.0.attn_v.weight"] == "TRIT2"
