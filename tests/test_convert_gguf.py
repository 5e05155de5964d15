"""GGUF files encoded again, and the tables of `tritconv inspect`."""

from pathlib import Path

import ggml
import numpy as np
import pytest
from checkpoints import llama_quantize
from command_line import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from tritcore.codec import unpack
from tritcore.format import BYTES_PER_BLOCK, DEPTHS
from tritcore.gguf_header import read_model_file

pytestmark = pytest.mark.build


def _fails(*arguments: object, words: tuple[str, ...], code: int = 1) -> None:
    done = tritconv(*arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("depth", DEPTHS)
def test_same_tensors_as_from_the_checkpoint(depth: int, checkpoint: Path, f16_gguf: Path, tmp_path: Path) -> None:
    from_gguf, from_hf = tmp_path / "gguf.gguf", tmp_path / "hf.gguf"
    assert tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", depth, "-o", from_gguf).returncode == 0
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", depth, "-o", from_hf).returncode == 0
    a, b = ({t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(p).tensors} for p in (from_gguf, from_hf))
    assert a == b
    kept = ("general.architecture", "llama.block_count", "tokenizer.ggml.model", "tokenizer.chat_template")
    metadata_a, metadata_b = read_model_file(from_gguf).metadata, read_model_file(from_hf).metadata
    assert [metadata_a.get(key) for key in kept] == [metadata_b.get(key) for key in kept]


def test_every_token_and_merge_survives(f16_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", 2, "-o", out).returncode == 0
    before, after = GGUFReader(f16_gguf), GGUFReader(out)
    for key in before.fields:
        if key.startswith(("tokenizer.", "llama.")):
            assert after.fields[key].contents() == before.fields[key].contents()


@pytest.mark.parametrize("source_type", ["BF16", "Q8_0", "Q5_0", "Q4_1", "TRIT4"])
def test_from_other_types(source_type: str, f16_gguf: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    done = llama_quantize("--pure", f16_gguf, source, source_type)
    assert done.returncode == 0, done.stderr
    assert tritconv("gguf-to-gguf", source, "--fast", "--depth", 3, "-o", out).returncode == 0
    types = {t.name: t.type for t in read_model_file(out).tensors}
    assert types["blk.0.ffn_up.weight"] is Type.TRIT3
    assert types["blk.0.attn_norm.weight"] is Type.F32
    assert types["token_embd.weight"] is Type.Q8_0


def test_refusals(f16_gguf: Path, tmp_path: Path) -> None:
    no_gguf = tmp_path / "x.bin"
    no_gguf.write_bytes(b"no")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(f16_gguf.read_bytes()[:-100])
    out = tmp_path / "out.gguf"
    common = ("--depth", 2, "-o", out)
    _fails("gguf-to-gguf", tmp_path / "none.gguf", *common, words=("none.gguf: no such file",))
    _fails("gguf-to-gguf", no_gguf, *common, words=("x.bin: not a GGUF file",))
    _fails("gguf-to-gguf", cut, *common, words=("cut.gguf: truncated",))
    _fails("gguf-to-gguf", cut, "--fast", "--depth", 7, "-o", out, words=("--depth 7 is out of range",), code=2)
    same = tmp_path / "same.gguf"
    same.write_bytes(f16_gguf.read_bytes())
    _fails("gguf-to-gguf", same, "--fast", "--depth", 2, "-o", same, "--force", words=("is the source itself",))
    assert not out.exists()


def test_inspect_lists_everything(f16_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", 2, "-o", out).returncode == 0
    done = tritconv("inspect", out, COLUMNS="160")
    assert done.returncode == 0, done.stderr
    for tensor in read_model_file(out).tensors:
        assert tensor.name in done.stdout
    assert "trit.format_version" in done.stdout
    assert "3.50" in done.stdout


@pytest.mark.parametrize("depth", DEPTHS)
def test_inspect_counts_codes(depth: int, f16_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", depth, "-o", out).returncode == 0
    name = "blk.1.ffn_down.weight"
    done = tritconv("inspect", out, "--tensor", name)
    assert done.returncode == 0, done.stderr
    data = next(t.data for t in GGUFReader(out).tensors if t.name == name)
    codes = unpack(depth, np.asarray(data).reshape(-1, BYTES_PER_BLOCK[depth])).codes
    share = f"{100 * np.mean(codes == 0):.2f}%"
    rows = [line.strip("│ ").split("│") for line in done.stdout.split("scale indexes")[0].splitlines()]
    assert [row[1].strip() for row in rows if row[0].strip() == "0"] == [share]


def test_inspect_refuses(f16_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", 2, "-o", out).returncode == 0
    _fails("inspect", out, "--tensor", "nope", words=("has no tensor nope",))
    _fails("inspect", out, "--tensor", "output_norm.weight", words=("is F32, only TRIT tensors",))
    _fails("inspect", tmp_path / "none.gguf", words=("no such file",))

    tensor = next(t for t in GGUFReader(out).tensors if t.name == "blk.0.ffn_up.weight")
    with out.open("r+b") as file:
        file.seek(int(tensor.data_offset) + 28 * 5)
        file.write(b"\x01\x00")  # 1 is no encoding
    _fails("inspect", out, "--tensor", tensor.name, words=("block 5 is not TRIT2 data",))
    tampered = np.asarray(next(t.data for t in GGUFReader(out).tensors if t.name == tensor.name))
    assert not ggml.validate(2, tampered.reshape(-1, 28))
