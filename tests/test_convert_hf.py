"""Checkpoints of several architectures become TRIT files that llama.cpp computes with."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import ARCHITECTURES, logits, make_checkpoint, to_f16_gguf
from command_line import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from tritcore.gguf_header import read_model_file

pytestmark = pytest.mark.build

PROMPTS = ["The capital of France is", "def main():\n    return", "Once upon a time there was a little"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_next_token_as_in_f16(architecture: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / architecture, architecture)
    base = to_f16_gguf(folder, tmp_path / "f16.gguf")
    trit = tmp_path / "trit4.gguf"
    done = tritconv("hf-to-gguf", folder, "--fast", "--depth", 4, "-o", trit, "--embed-type", "f16")
    assert done.returncode == 0, done.stderr

    same = 0
    for prompt in PROMPTS:
        expected, got = logits(base, prompt), logits(trit, prompt)
        assert np.corrcoef(expected, got)[0, 1] > 0.995
        same += int(expected.argmax() == got.argmax())
    assert same == len(PROMPTS)

    layers = [t for t in read_model_file(trit).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    routers = [t for t in layers if "ffn_gate_inp" in t.name]
    assert all(t.type is Type.F32 for t in routers)
    assert all(t.type is Type.TRIT4 for t in layers if t not in routers)
    assert bool(routers) == any("_exps." in t.name for t in layers) == (architecture == "Mixtral")


def test_types_and_metadata(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    done = tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2)
    assert done.returncode == 0, done.stderr
    path = tmp_path / f"{checkpoint.name}-TRIT2.gguf"
    model = read_model_file(path)
    types = {tensor.name: tensor.type for tensor in model.tensors}
    assert types["token_embd.weight"] is types["output.weight"] is Type.Q8_0
    assert types["blk.0.attn_norm.weight"] is types["output_norm.weight"] is Type.F32
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert {types[f"blk.{i}.{name}.weight"] for i in range(2) for name in matrices} == {Type.TRIT2}
    expected = {
        "general.file_type": 86,
        "general.quantization_version": 2,
        "trit.format_version": 1,
        "trit.depth": 2,
        "trit.method": "search",
        "trit.source": checkpoint.name,
    }
    assert expected.items() <= model.metadata.items()
    assert str(model.metadata["trit.codec"]).startswith("tritconv ")
    # the report says what the bytes are
    assert all(text in done.stdout for text in ("layers", "3.50", "embeddings", "largest error"))


@pytest.mark.parametrize(
    ("options", "embedding", "output"),
    [
        (["--embed-type", "f16"], Type.F16, Type.F16),
        (["--embed-type", "bf16", "--output-type", "q8_0"], Type.BF16, Type.Q8_0),
        (["--output-type", "f32"], Type.Q8_0, Type.F32),
    ],
)
def test_embedding_types(options: list[str], embedding: Type, output: Type, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    done = tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 1, "-o", path, *options)
    assert done.returncode == 0, done.stderr
    types = {tensor.name: tensor.type for tensor in read_model_file(path).tensors}
    assert (types["token_embd.weight"], types["output.weight"]) == (embedding, output)


def test_rows_that_do_not_fit_fall_back_and_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "odd", intermediate_size=352)
    for fallback in ("q8_0", "f16"):
        path = tmp_path / f"{fallback}.gguf"
        done = tritconv("hf-to-gguf", folder, "--fast", "--depth", 2, "-o", path, "--fallback-type", fallback)
        assert done.returncode == 0, done.stderr
        types = {tensor.name: tensor.type for tensor in read_model_file(path).tensors}
        assert types["blk.0.ffn_down.weight"] is types["blk.1.ffn_down.weight"] is Type[fallback.upper()]
        assert types["blk.0.ffn_up.weight"] is Type.TRIT2
        text = " ".join(done.stdout.split())
        assert f"blk.1.ffn_down.weight is stored as {fallback.upper()}: its rows of 352 weights" in text
        assert np.isfinite(logits(path, PROMPTS[0])).all()


def test_a_matrix_below_the_range_falls_back_and_is_named(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tiny-weights"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][5, :64] = 1e-5  # a block among larger ones: the least anchor will do
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    path = tmp_path / "out.gguf"
    done = tritconv("hf-to-gguf", folder, "--fast", "--depth", 2, "-o", path)
    assert done.returncode == 0, done.stderr
    types = {tensor.name: tensor.type for tensor in read_model_file(path).tensors}
    assert types["blk.1.ffn_up.weight"] is Type.Q8_0
    assert types["blk.0.ffn_up.weight"] is Type.TRIT2
    assert "blk.1.ffn_up.weight is stored as Q8_0: block" in " ".join(done.stdout.split())
    # the header was written before the fallback was known: every tensor must still be where it says
    reader = GGUFReader(path)
    after = next(t for t in reader.tensors if t.name == "output_norm.weight")
    assert np.array_equal(after.data, np.ones(192, np.float32))


def test_bin_checkpoints_and_shards(checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    whole = tmp_path / "whole.gguf"
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", whole).returncode == 0
    data = {t.name: t.data.tobytes() for t in GGUFReader(whole).tensors}

    as_bin = tmp_path / "bin"
    as_bin.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (as_bin / name).write_bytes((checkpoint / name).read_bytes())
    torch.save(load_file(checkpoint / "model.safetensors"), as_bin / "pytorch_model.bin")

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16).save_pretrained(sharded, max_shard_size="1MB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    (sharded / "tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())

    for folder in (as_bin, sharded):
        path = tmp_path / f"{folder.name}.gguf"
        done = tritconv("hf-to-gguf", folder, "--fast", "--depth", 2, "-o", path)
        assert done.returncode == 0, done.stderr
        assert {t.name: t.data.tobytes() for t in GGUFReader(path).tensors} == data


def test_same_file_whatever_the_threads(checkpoint: Path, tmp_path: Path) -> None:
    files = []
    for threads in (1, 3):
        path = tmp_path / f"{threads}.gguf"
        done = tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 3, "-o", path, "--threads", threads)
        assert done.returncode == 0, done.stderr
        files.append(path.read_bytes())
    assert files[0] == files[1]


def _peak_memory(folder: Path, target: Path) -> int:
    """Peak resident memory of a conversion, in bytes."""
    command = [sys.executable, "-m", "tritconv", "hf-to-gguf", str(folder), "--fast", "--depth", "2", "-o", str(target)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Eighteen layers more, 150 MB in float16 and twice that in float32, take hardly more memory."""
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    few = make_checkpoint(tmp_path / "few", num_hidden_layers=2, **sizes)
    many = make_checkpoint(tmp_path / "many", num_hidden_layers=20, **sizes)
    more = (many / "model.safetensors").stat().st_size - (few / "model.safetensors").stat().st_size
    assert more > 140e6
    assert _peak_memory(many, tmp_path / "many.gguf") - _peak_memory(few, tmp_path / "few.gguf") < 40e6
