"""`tritconv verify` finds what is wrong with any GGUF file, and nothing in sound ones."""

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import ggml
import numpy as np
import pytest
from command_line import tritconv
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as V
from test_hostile_headers import HOSTILE, LEGAL
from tiny_gguf import bare_gguf, entry, tensor_entry, write_tiny_model

from tritconv import verify
from tritconv.verify import findings, wrong_blocks
from tritcore.codec import pack, unpack
from tritcore.format import BYTES_PER_BLOCK, DEPTHS
from tritcore.gguf_types import TRIT_TYPE

TRIT2_BLOCK = BYTES_PER_BLOCK[2]


def _blocks(depth: int, n: int) -> np.ndarray:
    """uint8 (n, bytes per block): valid blocks."""
    size = BYTES_PER_BLOCK[depth]
    return pack(unpack(depth, np.random.default_rng(depth).integers(0, 256, (n, size), dtype=np.uint8)))


def _file(
    path: Path, tensors: Mapping[str, tuple[Type, tuple[int, ...], bytes]], entries: tuple[bytes, ...] = ()
) -> Path:
    table, data = [], b""
    for name, (qtype, shape, content) in tensors.items():
        table.append(tensor_entry(name, qtype, shape, len(data)))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(bare_gguf(list(entries), table) + data)
    return path


# ggml has no check of Q8_1, as no file holds it, and takes what overflows a float for infinite in F64
JUDGED_BY_GGML = [qtype for qtype in GGML_QUANT_SIZES if qtype not in (Type.Q8_1, Type.F64)]


@pytest.mark.build
@pytest.mark.parametrize("qtype", JUDGED_BY_GGML, ids=lambda qtype: qtype.name)
def test_ggml_judges_the_same(qtype: Type, capfd: pytest.CaptureFixture[str]) -> None:
    """Each two bytes of a block set to what is NaN or infinite somewhere, in blocks that are sound otherwise."""
    size = GGML_QUANT_SIZES[qtype][1]
    sound = _blocks(size_to_depth[qtype], 1)[0] if qtype in size_to_depth else np.zeros(size, np.uint8)
    changed = [sound]
    for at in range(size):
        for value in (
            b"\xff",
            b"\xff\xff",
            b"\0\x7c",
            b"\0\xfc",
            b"\xf0\x7f",
            b"\x80\x7f",
            b"\0\0\x80\xff",
            b"\x01\x7e",
        ):
            block = sound.copy()
            block[at : at + len(value)] = np.frombuffer(value, np.uint8)[: size - at]
            changed.append(block)
    rng = np.random.default_rng(0)
    data = np.concatenate([np.stack(changed), rng.integers(0, 256, (500, size), dtype=np.uint8)])
    check = ggml.base().ggml_validate_row_data
    check.restype = bool
    theirs = [
        i
        for i, block in enumerate(data)
        if not check(int(qtype), ctypes.c_void_p(block.ctypes.data), ctypes.c_size_t(size))
    ]
    assert wrong_blocks(qtype, data).tolist() == theirs
    assert 0 not in theirs
    capfd.readouterr()


size_to_depth = {qtype: depth for depth, qtype in TRIT_TYPE.items()}


def test_the_others() -> None:
    q8_1 = np.zeros((4, 36), np.uint8)
    q8_1[1, 1], q8_1[3, 3] = 0x7C, 0xFC
    assert wrong_blocks(Type.Q8_1, q8_1).tolist() == [1, 3]
    doubles = np.array([[1e300], [np.nan], [-1e-300], [-np.inf]], "<f8")
    assert wrong_blocks(Type.F64, doubles.view(np.uint8)).tolist() == [1, 3]


def test_a_finding_for_each_tensor(tmp_path: Path) -> None:
    trit = _blocks(2, 300_000)  # several chunks
    trit[[7, 299_999], 0:2] = 1, 0
    floats = np.zeros(1000, np.float32)
    floats[[5, 6]] = np.nan, -np.inf
    scales = np.zeros((4, 34), np.uint8)
    scales[2, :2] = 0, 0x7C
    path = _file(
        tmp_path / "any name at all",
        {
            "sound": (Type.F16, (8,), bytes(16)),
            "trit": (Type.TRIT2, (64, 300_000), trit.tobytes()),
            "floats": (Type.F32, (1000,), floats.tobytes()),
            "numbers": (Type.I32, (2,), b"\xff" * 8),
            "q8": (Type.Q8_0, (32, 4), scales.tobytes()),
        },
        (entry("x.rope.freq_base", V.FLOAT32, float("nan")),),
    )
    done: list[tuple[int, int]] = []
    found = findings(path, 2, lambda n_bytes, total: done.append((n_bytes, total)))
    assert found == [
        f"{path}: metadata key 'x.rope.freq_base' is NaN",
        f"{path}: tensor 'trit': block 7, as the first of 2, is not TRIT2 data",
        f"{path}: tensor 'floats': value 5, as the first of 2, is NaN or infinite",
        f"{path}: tensor 'q8': block 2 has a scale that is NaN or infinite",
    ]
    assert {total for _, total in done} == {16 + 300_000 * TRIT2_BLOCK + 4000 + 8 + 4 * 34}
    assert sum(n_bytes for n_bytes, _ in done) == done[0][1] - 8  # integers need no check


@pytest.mark.parametrize("depth", DEPTHS)
def test_one_bad_word_anywhere(depth: int, tmp_path: Path) -> None:
    n = 2 * verify._CHUNK // BYTES_PER_BLOCK[depth]
    blocks = _blocks(depth, n)
    content = {"w": (TRIT_TYPE[depth], (64, n), blocks.tobytes())}
    assert findings(_file(tmp_path / "sound", content), 2) == []
    for block in (0, n // 2, n - 1):
        damaged = blocks.copy()
        damaged[block, -2:] = 1, 0
        path = _file(tmp_path / "damaged", {"w": (TRIT_TYPE[depth], (64, n), damaged.tobytes())})
        assert findings(path, 2) == [f"{path}: tensor 'w': block {block} is not TRIT{depth} data"]


@pytest.mark.parametrize("what", HOSTILE)
def test_a_bad_header_is_one_finding(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[what][0])
    (found,) = findings(path, 1)
    assert found.startswith(f"{path}: ")
    assert HOSTILE[what][1] in found


@pytest.mark.parametrize("what", LEGAL)
def test_what_is_legal_is_sound(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(LEGAL[what])
    assert findings(path, 1) == []


def test_all_parts_are_checked(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for number, path in enumerate(paths):
        numbers = ((V.UINT16, "no", number), (V.UINT16, "count", 2), (V.INT32, "tensors.count", 2))
        entries = tuple(entry(f"split.{key}", value_type, value) for value_type, key, value in numbers)
        _file(path, {f"w{number}": (Type.F32, (1,), struct.pack("<f", float("inf") if number else 0))}, entries)
    damage = f"{paths[1]}: tensor 'w1': value 0 is NaN or infinite"
    assert findings(paths[0], 1) == findings(paths[1], 1) == [damage]
    paths[0].unlink()
    missing, found = findings(paths[1], 1)
    assert "m-00001-of-00002.gguf is not beside it" in missing
    assert found == damage


def test_a_file_that_shrinks_meanwhile_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path / "x", {"w": (Type.F32, (64,), bytes(256))})
    spans = verify._spans

    def shrink(*arguments: object) -> object:
        os.truncate(path, path.stat().st_size - 4)
        return spans(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(verify, "_spans", shrink)
    assert findings(path, 1) == [f"{path}: cannot be read: it has become shorter meanwhile"]


@pytest.mark.build
def test_the_command_goes_on_after_a_bad_file(tmp_path: Path) -> None:
    sound = write_tiny_model(tmp_path / "[b]sound.gguf")
    damaged = tmp_path / "damaged\x1b[2J.gguf"
    damaged.write_bytes(HOSTILE["two tensors of one name"][0])
    done = tritconv("verify", tmp_path / "none.gguf", damaged, sound)
    assert (done.returncode, done.stderr) == (1, "")
    assert [line.removeprefix(f"{tmp_path}/") for line in done.stdout.splitlines()] == [
        "none.gguf: no such file",
        "damaged[2J.gguf: damaged header: tensor 'w' is there twice; download or convert the model again",
        "[b]sound.gguf: ok",
    ]
    assert tritconv("verify", sound).returncode == 0
    assert tritconv("verify").returncode == 2


@pytest.mark.build
def test_what_llama_cpp_would_refuse_is_a_finding(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "x.gguf")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"output_norm.weight", b"output_mron.weight"))
    done = tritconv("verify", path)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{path}: llama.cpp would not load it: ")
    assert "output_norm" in line


@pytest.mark.build
def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / os.fsdecode(b"x\xff.gguf"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    for command, words in (("verify", "x?.gguf: ok"), ("inspect", "x?.gguf: metadata")):
        done = subprocess.run(
            [sys.executable, "-m", "tritconv", command, path], capture_output=True, env=environment, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert words in done.stdout.decode("ascii")
