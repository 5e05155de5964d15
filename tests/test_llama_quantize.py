"""llama-quantize: it makes TRIT files, with and without an importance matrix, and other types as before."""

import hashlib
import platform
import subprocess
from pathlib import Path

import ggml
import numpy as np
import pytest
from checkpoints import llama_quantize, logits
from command_line import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from tiny_gguf import write_tiny_model

from tritcore import encoder
from tritcore.format import DEPTHS

pytestmark = pytest.mark.build

# Of the files that the unpatched llama-quantize of the same source makes of the same model.
UNPATCHED = {
    "Q4_K_S": "9132b07718598eb872e8b64e4e85791c690097e0eb60225519b8cd921a51995a",
    "Q3_K_S": "6811e26804afa00d8a6d866abc35ba3256ef0a4550a648d70d8dba674332a362",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the hashes were taken on x86-64")
@pytest.mark.parametrize("name", UNPATCHED)
def test_other_types_are_as_they_were(name: str, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "f16.gguf", hidden=256)
    target = tmp_path / "out.gguf"
    done = llama_quantize(source, target, name)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(target.read_bytes()).hexdigest() == UNPATCHED[name]


@pytest.mark.parametrize("depth", DEPTHS)
def test_trit_types(depth: int, f16_gguf: Path, tmp_path: Path) -> None:
    target, ours = tmp_path / "out.gguf", tmp_path / "ours.gguf"
    done = llama_quantize(f16_gguf, target, f"TRIT{depth}")
    assert done.returncode == 0, done.stderr
    assert tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", depth, "-o", ours).returncode == 0
    matrices = [
        {t.name: t.data.tobytes() for t in GGUFReader(path).tensors if t.tensor_type == Type[f"TRIT{depth}"]}
        for path in (target, ours)
    ]
    shared = matrices[0].keys() & matrices[1].keys()
    assert len(shared) == 14  # two layers of seven
    assert all(matrices[0][name] == matrices[1][name] for name in shared)
    assert np.isfinite(logits(target, "The capital of France is")).all()


def test_importance_matrix(f16_gguf: Path, tmp_path: Path) -> None:
    text, matrix = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    arguments = [ggml.tool("llama-imatrix"), "-m", f16_gguf, "-f", text, "-o", matrix, "-c", "64", "-t", "2"]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    assert llama_quantize(f16_gguf, plain, "TRIT2").returncode == 0
    done = llama_quantize("--imatrix", matrix, f16_gguf, weighted, "TRIT2")
    assert done.returncode == 0, done.stderr
    a, b = ({t.name: t.data.tobytes() for t in GGUFReader(path).tensors} for path in (plain, weighted))
    assert a["blk.0.ffn_up.weight"] != b["blk.0.ffn_up.weight"]
    assert np.isfinite(logits(weighted, "The capital of France is")).all()


def test_weights_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    write_tiny_model(source)
    tensor = next(t for t in GGUFReader(source).tensors if t.name == "blk.0.ffn_up.weight")
    with source.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.float16(1000).tobytes())
    done = llama_quantize(source, target, "TRIT2")
    assert done.returncode == 1
    assert "is not TRIT2 data" in done.stdout + done.stderr


def _scale(path: Path, name: str, factors: np.ndarray) -> None:
    """Multiply a float16 matrix in a file, (rows, n), by factors that broadcast to it."""
    tensor = next(t for t in GGUFReader(path).tensors if t.name == name)
    values = (tensor.data.astype(np.float32) * factors).astype(np.float16)
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(values.tobytes())


@pytest.mark.parametrize("threads", [1, 2])
def test_small_blocks_are_stored(threads: int, tmp_path: Path) -> None:
    source, target = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    write_tiny_model(source, hidden=256)
    factors = np.ones((512, 1), np.float32)
    factors[::5] = np.ldexp(1.0, -(np.arange(103) % 24))[:, None]
    factors[7:9] = 0
    _scale(source, "blk.0.ffn_up.weight", factors)
    done = llama_quantize(source, target, "TRIT2", threads)
    assert done.returncode == 0, done.stderr
    values, blocks = ({t.name: t.data for t in GGUFReader(path).tensors} for path in (source, target))
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight"):
        assert blocks[name].tobytes() == encoder.quantize(values[name].astype(np.float32), 2).tobytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_matrix_that_is_small_as_a_whole_is_refused_by_name(threads: int, tmp_path: Path) -> None:
    source, target = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    write_tiny_model(source, hidden=256)
    _scale(source, "blk.0.attn_v.weight", np.float32(1e-3) * np.ones(1, np.float32))
    done = llama_quantize(source, target, "TRIT2", threads)
    assert done.returncode == 1
    advice = "--tensor-type blk.0.attn_v.weight=q8_0"
    assert f"the weights of blk.0.attn_v.weight are too small for trit2: give {advice}" in done.stdout + done.stderr
    assert llama_quantize(*advice.split(), source, target, "TRIT2", threads).returncode == 0
    types = {t.name: t.tensor_type for t in GGUFReader(target).tensors if "attn_v" in t.name}
    assert types == {"blk.0.attn_v.weight": Type.Q8_0, "blk.1.attn_v.weight": Type.TRIT2}


def test_damaged_blocks_are_refused(f16_gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    assert llama_quantize(f16_gguf, target, "TRIT2").returncode == 0
    tensor = next(t for t in GGUFReader(target).tensors if t.name == "blk.0.ffn_up.weight")
    with target.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(b"\x01\x00")
    done = llama_quantize("--allow-requantize", target, tmp_path / "again.gguf", "Q8_0")
    assert done.returncode == 1
    assert "is not TRIT2 data" in done.stdout + done.stderr
