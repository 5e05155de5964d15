"""Importance matrices: read as llama-quantize reads them, and used as it uses them."""

import re
import struct
import subprocess
from pathlib import Path

import ggml
import numpy as np
import pytest
from checkpoints import llama_quantize, make_checkpoint, to_f16_gguf
from command_line import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from test_hostile_headers import HOSTILE

from tritconv.methods.imatrix_file import read_imatrix
from tritcore import encoder
from tritcore.errors import TritError
from tritcore.format import DEPTHS
from tritcore.gguf_header import read_model_file


def _write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["made up"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _f32(*values: object) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def _matrices(path: Path, qtype: Type) -> dict[str, bytes]:
    """The bytes of the matrices of the layers."""
    tensors = GGUFReader(path).tensors
    return {t.name: t.data.tobytes() for t in tensors if t.tensor_type == qtype and t.name.startswith("blk.")}


@pytest.fixture(scope="module")
def made_by_llama(f16_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix of the tiny Llama."""
    folder = tmp_path_factory.mktemp("imatrix")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = ["-m", f16_gguf, "-f", folder / "text.txt", "-o", folder / "imatrix.gguf", "-c", 64, "-t", 2]
    command = [str(ggml.tool("llama-imatrix")), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "imatrix.gguf"


def test_sums_over_counts(tmp_path: Path) -> None:
    sums = _f32([1, 2, 3, 4], [10, 20, 30, 40], [5, 0, 7, 8])
    path = _write(tmp_path / "x.gguf", {"a.weight.in_sum2": sums, "a.weight.counts": _f32([2], [0], [1])})
    (found,) = read_imatrix(path).items()
    assert found[0] == "a.weight"
    assert found[1].dtype == np.float32
    assert found[1].tolist() == [[0.5, 1, 1.5, 2], [1, 1, 1, 1], [5, 0, 7, 8]]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no importances"),
        ({"a.weight": _f32(1)}, "holds no importances"),
        ({"a.in_sum2": _f32(1, 2)}, "a has sums but no counts"),
        ({"a.in_sum2": _f32(1, 2, 3), "a.counts": _f32(1, 2)}, "3 sums for 2 counts"),
        (
            {"a.in_sum2": _f32(1, 2), "a.counts": np.zeros(0, np.float32)},
            "tensor 'a.counts' has the impossible shape 0",
        ),
        ({"a.in_sum2": _f32(1, np.nan), "a.counts": _f32(1)}, "a: a value is negative or not finite"),
        ({"a.in_sum2": _f32(1, np.inf), "a.counts": _f32(1)}, "a: a value is negative or not finite"),
        ({"a.in_sum2": _f32(1, -2), "a.counts": _f32(1)}, "a: a value is negative or not finite"),
        ({"a.in_sum2": _f32(1, 2), "a.counts": _f32(np.nan)}, "a: a value is negative or not finite"),
        ({"a.in_sum2": _f32(1, 2).astype(np.float16), "a.counts": _f32(1)}, "the type is F16, not F32"),
    ],
)
def test_damaged(tensors: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "x.gguf", tensors)
    with pytest.raises(TritError) as caught:
        read_imatrix(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.gguf", {"a.in_sum2": _f32(*range(20)), "a.counts": _f32(3)})
    data = path.read_bytes()
    for length in range(0, len(data) - 32, 7):  # the last bytes are padding
        path.write_bytes(data[:length])
        with pytest.raises(TritError):
            read_imatrix(path)


@pytest.mark.build
def test_not_an_imatrix_file(made_by_llama: Path, f16_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(TritError, match="no such file"):
        read_imatrix(tmp_path / "none.gguf")
    with pytest.raises(TritError, match="not a regular file"):
        read_imatrix(tmp_path)
    with pytest.raises(TritError, match="holds no importances"):
        read_imatrix(f16_gguf)


def _old(path: Path, entries: list[tuple[bytes, int, np.ndarray]]) -> Path:
    """A file in the old format: names, calls, and mean squares times the calls."""
    content = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        content += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, values.size)
        content += values.astype("<f4").tobytes()
    path.write_bytes(content + struct.pack("<ii", 7, 5) + b"a.txt")
    return path


@pytest.mark.build
def test_the_old_format_says_the_same(made_by_llama: Path, f16_gguf: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old.dat", tmp_path / "new.gguf"
    command = [str(ggml.tool("llama-imatrix")), "-m", str(f16_gguf), "--in-file"]
    subprocess.run([*command, made_by_llama, "--output-format", "dat", "-o", old], capture_output=True, check=True)
    subprocess.run([*command, old, "-o", new], capture_output=True, check=True)
    wanted = read_imatrix(made_by_llama)
    for path in (old, new):
        got = read_imatrix(path)
        assert got.keys() == wanted.keys()
        assert all(np.allclose(got[name], wanted[name], rtol=1e-5) for name in wanted)


@pytest.mark.build
def test_the_old_format_for_experts(experts_gguf: Path, tmp_path: Path) -> None:
    """As llama-quantize takes it: mean squares of each expert, and ones for those that saw no token."""
    made_up = _made_up(experts_gguf)
    names = [name.removesuffix(".in_sum2") for name in made_up if name.endswith(".in_sum2")]
    entries = []
    for name in names:
        counts = made_up[f"{name}.counts"]
        means = np.where(counts > 0, made_up[f"{name}.in_sum2"] / np.maximum(counts, 1), 1)
        entries.append((name.encode(), 3, 3 * means))
    old = _old(tmp_path / "imatrix.dat", entries)
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    done = llama_quantize("--imatrix", old, experts_gguf, theirs, "TRIT2")
    assert done.returncode == 0, done.stderr
    done = tritconv("gguf-to-gguf", experts_gguf, "--depth", 2, "-o", ours, "--imatrix", old)
    assert done.returncode == 0, done.stderr
    assert "experts that saw no token, so all columns alike: 1 of 4 in blk.0.ffn_" in " ".join(done.stdout.split())
    wanted, got = (_matrices(path, Type.TRIT2) for path in (theirs, ours))
    assert len([name for name in got if "_exps." in name]) == 6
    assert wanted == got


ONES = np.ones(4)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "0 entries"),
        ([(b"", 1, ONES)], "0 bytes in a name"),
        ([(b"n" * 5000, 1, ONES)], "5000 bytes in a name"),
        ([(b"a", -1, ONES)], "-1 calls"),
        ([(b"a", 1, ONES[:0])], "0 values"),
        ([(b"a", 1, ONES), (b"a", 1, ONES)], "a is there twice"),
        ([(b"a\x1b", 1, -ONES)], "a has a value that is negative or not finite"),
        ([(b"a", 1, np.nan * ONES)], "a has a value that is negative or not finite"),
    ],
)
def test_damaged_in_the_old_format(entries: list[tuple[bytes, int, np.ndarray]], words: str, tmp_path: Path) -> None:
    path = _old(tmp_path / "x.dat", entries)
    with pytest.raises(TritError, match="is no imatrix, in GGUF or in the old format, or it is damaged: ") as caught:
        read_imatrix(path)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_cut_off_in_the_old_format(tmp_path: Path) -> None:
    path = _old(tmp_path / "x.dat", [(b"a.weight", 1, ONES), (b"b.weight", 2, 2 * ONES)])
    data = path.read_bytes()
    for length in range(len(data) - 13):  # which are the text's
        path.write_bytes(data[:length])
        with pytest.raises(TritError, match="is no imatrix"):
            read_imatrix(path)
    path.write_bytes(data[:-13])
    assert {name: values.tolist() for name, values in read_imatrix(path).items()} == {
        "a.weight": [[1, 1, 1, 1]],
        "b.weight": [[1, 1, 1, 1]],
    }


@pytest.mark.parametrize("values", [2**31 - 1, 2**27])
def test_a_sparse_file_in_the_old_format(values: int, tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(struct.pack("<ii1sii", 2, 1, b"a", 1, values))
    with pytest.raises(TritError, match="is no imatrix"):
        read_imatrix(path)


@pytest.mark.parametrize("what", HOSTILE)
def test_bad_headers(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[what][0])
    with pytest.raises(TritError, match=re.escape(HOSTILE[what][1])):
        read_imatrix(path)


@pytest.mark.build
@pytest.mark.parametrize("depth", DEPTHS)
def test_same_blocks_as_llama_quantize(depth: int, made_by_llama: Path, f16_gguf: Path, tmp_path: Path) -> None:
    theirs, ours, plain = tmp_path / "theirs.gguf", tmp_path / "ours.gguf", tmp_path / "plain.gguf"
    done = llama_quantize("--imatrix", made_by_llama, f16_gguf, theirs, f"TRIT{depth}")
    assert done.returncode == 0, done.stderr
    done = tritconv("gguf-to-gguf", f16_gguf, "--depth", depth, "-o", ours, "--imatrix", made_by_llama)
    assert done.returncode == 0, done.stderr
    assert "without importances" not in done.stdout
    assert tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", depth, "-o", plain).returncode == 0
    wanted, got, other = (_matrices(path, Type[f"TRIT{depth}"]) for path in (theirs, ours, plain))
    assert wanted.keys() == got.keys()
    assert len(wanted) == 14  # two layers of seven
    assert all(wanted[name] == got[name] for name in wanted)
    assert all(got[name] != other[name] for name in got)
    assert read_model_file(ours).metadata["trit.method"] == "imatrix"
    assert read_model_file(plain).metadata["trit.method"] == "search"


@pytest.fixture(scope="module")
def experts_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral in F16."""
    folder = tmp_path_factory.mktemp("mixtral")
    return to_f16_gguf(make_checkpoint(folder / "tiny", "Mixtral"), folder / "f16.gguf")


def _made_up(model: Path, skip: str = "-") -> dict[str, np.ndarray]:
    """Importances for all matrices of a model but those with `skip` in their name; the second experts saw nothing."""
    rng = np.random.default_rng(0)
    tensors = {}
    for tensor in GGUFReader(model).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1 and skip not in tensor.name:
            n_matrices = int(np.prod(tensor.shape[2:]))
            counts = np.full((n_matrices, 1), 1000, np.float32)
            if n_matrices > 1:
                counts[1] = 0
            sums = np.exp(2 * rng.standard_normal((n_matrices, int(tensor.shape[0])))).astype(np.float32)
            tensors[f"{tensor.name}.in_sum2"] = sums * (counts > 0)
            tensors[f"{tensor.name}.counts"] = counts
    return tensors


@pytest.mark.build
def test_experts_have_their_own_importances(experts_gguf: Path, tmp_path: Path) -> None:
    imatrix = _write(tmp_path / "imatrix.gguf", _made_up(experts_gguf))
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    done = llama_quantize("--imatrix", imatrix, experts_gguf, theirs, "TRIT2")
    assert done.returncode == 0, done.stderr
    done = tritconv("gguf-to-gguf", experts_gguf, "--depth", 2, "-o", ours, "--imatrix", imatrix)
    assert done.returncode == 0, done.stderr
    assert "experts that saw no token, so all columns alike: 1 of 4 in blk.0.ffn_" in " ".join(done.stdout.split())

    wanted, got = (_matrices(path, Type.TRIT2) for path in (theirs, ours))
    experts = [name for name in got if "_exps." in name]
    assert len(experts) == 6  # two layers of gate, up and down
    assert set(experts) <= wanted.keys()
    assert all(wanted[name] == got[name] for name in wanted)
    weights = {t.name: t.data.astype(np.float32) for t in GGUFReader(experts_gguf).tensors if t.name in experts}
    for name, matrices in weights.items():
        size = len(got[name]) // 4
        alike = [encoder.quantize(m, 2, np.ones(m.shape[1], np.float32)).tobytes() for m in matrices]
        same = [got[name][i * size : (i + 1) * size] == alike[i] for i in range(4)]
        assert same == [False, True, False, False]


@pytest.mark.build
def test_matrices_without_importances_are_named(experts_gguf: Path, tmp_path: Path) -> None:
    imatrix = _write(tmp_path / "imatrix.gguf", _made_up(experts_gguf, skip="blk.1.attn_v"))
    ours, plain = tmp_path / "ours.gguf", tmp_path / "plain.gguf"
    done = tritconv("gguf-to-gguf", experts_gguf, "--depth", 2, "-o", ours, "--imatrix", imatrix)
    assert done.returncode == 0, done.stderr
    assert "without importances, so by plain search: blk.1.attn_v.weight" in " ".join(done.stdout.split())
    assert tritconv("gguf-to-gguf", experts_gguf, "--fast", "--depth", 2, "-o", plain).returncode == 0
    got, other = _matrices(ours, Type.TRIT2), _matrices(plain, Type.TRIT2)
    assert [name for name in got if got[name] == other[name]] == ["blk.1.attn_v.weight"]


@pytest.mark.build
def test_of_another_model(experts_gguf: Path, f16_gguf: Path, tmp_path: Path) -> None:
    tensors = _made_up(f16_gguf)
    tensors["blk.1.ffn_up.weight.in_sum2"] = np.ones((2, 192), np.float32)
    imatrix = _write(tmp_path / "imatrix.gguf", tensors)
    out = tmp_path / "out.gguf"
    done = tritconv("gguf-to-gguf", f16_gguf, "--depth", 2, "-o", out, "--imatrix", imatrix)
    assert done.returncode == 1
    assert "imatrix.gguf is of another model: it has 1 x 384 importances for blk.1.ffn_up.weight" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imatrix.gguf"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--fast", "--imatrix", "x.gguf"), 2, "--fast is plain search: leave out --method, --imatrix"),
        (("--method", "search", "--imatrix", "x.gguf"), 2, "--method search does not use --imatrix"),
        (("--imatrix", "none.gguf"), 1, "none.gguf: no such file"),
    ],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], code: int, words: str, f16_gguf: Path, tmp_path: Path
) -> None:
    done = tritconv("gguf-to-gguf", f16_gguf, "--depth", 2, "-o", tmp_path / "x.gguf", *options)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.build
def test_from_a_checkpoint_as_from_gguf(checkpoint: Path, f16_gguf: Path, made_by_llama: Path, tmp_path: Path) -> None:
    from_hf, from_gguf = tmp_path / "hf.gguf", tmp_path / "gguf.gguf"
    options = ("--depth", 3, "--imatrix", made_by_llama)
    assert tritconv("hf-to-gguf", checkpoint, *options, "-o", from_hf).returncode == 0
    assert tritconv("gguf-to-gguf", f16_gguf, *options, "-o", from_gguf).returncode == 0
    assert _matrices(from_hf, Type.TRIT3) == _matrices(from_gguf, Type.TRIT3)
