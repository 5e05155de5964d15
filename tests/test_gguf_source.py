"""GGUF files as sources: what is copied, what is not, and what is no model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as V
from tiny_gguf import bare_gguf, entry, list_entry, tensor_entry, u32_entry, write_tiny_model

from tritconv.convert import Job, gguf_to_gguf
from tritconv.plan import Plan
from tritconv.sources.gguf import open_gguf
from tritconv.verify import findings
from tritcore import encoder
from tritcore.codec import pack, unpack
from tritcore.errors import TritError
from tritcore.gguf_header import parts_of, raw_values, read_model_file
from tritcore.gguf_types import TRIT_TYPE

PLAN = Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0)
LLAMA = entry("general.architecture", V.STRING, "llama")


Changes = dict[str, tuple[Any, V]]


def _again(
    source: Path,
    target: Path,
    changes: Changes | None = None,
    *,
    alignment: int | None = None,
    part: slice = slice(None),
) -> Path:
    """Write a GGUF file again, by gguf-py: its metadata with changes, and some of its tensors."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind is V.ARRAY else None)
    for key, (value, kind) in (changes or {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind, V.STRING if kind is V.ARRAY else None)
    for tensor in reader.tensors[part]:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _converted(source: Path, target: Path) -> Path:
    gguf_to_gguf(source, Job(PLAN, target, threads=1))
    assert findings(target, 1) == []
    return target


def _content(path: Path) -> dict[str, tuple[Type, bytes]]:
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and what it is converted to."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_tiny_model(folder / "tiny-F16.gguf")
    return source, _converted(source, folder / "tiny-TRIT2.gguf")


@pytest.mark.build
@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_any_alignment(alignment: int, whole: tuple[Path, Path], tmp_path: Path) -> None:
    source = _again(whole[0], tmp_path / "aligned.gguf", alignment=alignment)
    out = _converted(source, tmp_path / "out.gguf")
    assert _content(out) == _content(whole[1])
    assert "general.alignment" not in read_model_file(out).metadata


FOREIGN: Changes = {
    "general.file_type": (2, V.UINT32),
    "general.quantization_version": (1, V.UINT32),
    "general.quantized_by": ("somebody", V.STRING),
    "mradermacher.quantize_version": ("2", V.STRING),
    "quantize.imatrix.chunks_count": (125, V.INT32),
    "quantize.imatrix.file": ("/home/somebody/imatrix.dat", V.STRING),
    "split.count": (1, V.UINT16),
    "split.no": (0, V.UINT16),
    "split.tensors.count": (21, V.INT32),
    "trit.calibration": (["made", "up"], V.ARRAY),
    "trit.imported": (7, V.UINT32),
    "trit.method": ("tune", V.STRING),
}


@pytest.mark.build
def test_what_tells_of_the_source_alone_is_not_copied(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source = _again(whole[0], tmp_path / "foreign.gguf", {"general.license": ("mit", V.STRING), **FOREIGN})
    metadata = read_model_file(_converted(source, tmp_path / "out.gguf")).metadata
    assert metadata.pop("general.license") == "mit"
    own = read_model_file(whole[1]).metadata
    assert {key: value for key, value in metadata.items() if key != "trit.source"} == {
        key: value for key, value in own.items() if key != "trit.source"
    }


@pytest.mark.build
def test_metadata_are_copied_byte_for_byte(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """Tokens need not be UTF-8: a vocabulary of bytes has each alone."""
    tokens: list[Any] = GGUFReader(whole[0]).fields["tokenizer.ggml.tokens"].contents()
    tokens[-3:] = [b"\xff", b"\xc3", bytes(range(0x80, 0x90))]
    changes: Changes = {
        "tokenizer.ggml.tokens": (tokens, V.ARRAY),
        "general.name": (b"caf\xe9", V.STRING),
        "x.float": (0.1, V.FLOAT64),
        "x.least": (-(2**63), V.INT64),
    }
    source = _again(whole[0], tmp_path / "bytes.gguf", changes)
    out = _converted(source, tmp_path / "out.gguf")
    before, after = (
        {key: (f.type, f.element_type, v) for key, f, v in raw_values(read_model_file(p))} for p in (source, out)
    )
    assert before["general.name"][2] == b"caf\xe9"
    assert before["tokenizer.ggml.tokens"][2][-3:] == tokens[-3:]
    assert {
        key: value for key, value in after.items() if not key.startswith(("trit.", "general.file", "general.quant"))
    } == before


@pytest.mark.build
@pytest.mark.parametrize("given", [0, 1, 2])
def test_split_files(given: int, whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, wanted = whole
    paths = [tmp_path / f"tiny-F16-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for n, (path, part) in enumerate(zip(paths, (slice(0, 0), slice(0, 9), slice(9, None)), strict=True)):
        numbers: Changes = {
            "split.no": (n, V.UINT16),
            "split.count": (3, V.UINT16),
            "split.tensors.count": (21, V.INT32),
        }
        _again(source, path, numbers, part=part)
        if n:  # as gguf-split has it: the metadata are in the first part
            entries = [entry(key, kind, value) for key, (value, kind) in numbers.items()]
            content = path.read_bytes()
            model = read_model_file(path)
            table = [tensor_entry(t.name, t.type, t.shape, t.offset) for t in model.tensors]
            path.write_bytes(bare_gguf(entries, table) + content[model.data_start :])
    assert [len(part.tensors) for part in parts_of(read_model_file(paths[given]))] == [0, 9, 12]
    out = _converted(paths[given], tmp_path / "out.gguf")
    assert _content(out) == _content(wanted)
    assert read_model_file(out).metadata.keys() == read_model_file(wanted).metadata.keys()
    paths[2 - given].unlink()
    with pytest.raises(TritError, match=r"is not beside it|no such file") as caught:
        open_gguf(paths[given])
    assert "gguf-split" not in str(caught.value)


@pytest.mark.build
def test_the_name_of_a_part_is_not_the_output_s(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: Changes = {"split.no": (0, V.UINT16), "split.count": (1, V.UINT16)}
    source = _again(whole[0], tmp_path / "tiny-F16-00001-of-00001.gguf", numbers)
    monkeypatch.chdir(tmp_path)
    written = gguf_to_gguf(source, Job(PLAN, threads=1))
    assert written is not None
    assert written.path.name == "tiny-TRIT2.gguf"


WEIGHT = tensor_entry("blk.0.attn_q.weight", Type.F32, (64, 1))
TOKENS = list_entry("tokenizer.ggml.tokens", V.STRING, ["a"])


@pytest.mark.parametrize(
    ("entries", "table", "words"),
    [
        ([LLAMA, entry("general.type", V.STRING, "adapter")], [WEIGHT], "is a LoRA adapter, not a model"),
        ([LLAMA], [tensor_entry("blk.0.attn_q.weight.lora_a", Type.F32, (64, 1))], "is a LoRA adapter, not a model"),
        ([LLAMA, entry("general.type", V.STRING, "mmproj")], [WEIGHT], "is the vision or audio part of a model"),
        ([entry("general.architecture", V.STRING, "clip")], [WEIGHT], "is the vision or audio part of a model"),
        ([entry("general.architecture", V.STRING, "controlvector")], [WEIGHT], "is a control vector, not a model"),
        ([entry("general.type", V.STRING, "imatrix")], [WEIGHT], "is an importance matrix, not a model"),
        ([], [tensor_entry("a.in_sum2", Type.F32, (64, 1))], "is an importance matrix, not a model"),
        ([LLAMA, entry("general.type", V.STRING, "dataset")], [WEIGHT], "is of the type dataset, not a model"),
        ([LLAMA, TOKENS], [], "holds only a vocabulary"),
        ([LLAMA], [], "holds no tensors"),
        ([], [WEIGHT], "does not say of which architecture it is"),
        ([entry("general.architecture", V.STRING, "")], [WEIGHT], "does not say of which architecture it is"),
    ],
)
def test_what_is_no_model(entries: list[bytes], table: list[bytes], words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(bare_gguf(entries, table, 256 if table else 0))
    with pytest.raises(TritError) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(f"{path} {words}")
    assert findings(path, 1) == []  # but sound


def test_tensors_that_gguf_py_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    table = [
        tensor_entry("scalar", Type.F32, ()),
        tensor_entry("double", Type.F64, (2, 1), 32),
        tensor_entry("blk.0.ffn_up.weight", Type.F64, (2, 2), 64),
    ]
    doubles = np.array([0.5, 1e300, 1, 2, 3, 4])
    data = np.float32(7).tobytes().ljust(32, b"\0") + doubles[:2].tobytes().ljust(32, b"\0") + doubles[2:].tobytes()
    path.write_bytes(bare_gguf([LLAMA], table) + data)
    matrix, scalar, double = open_gguf(path).tensors
    assert (scalar.shape, scalar.kept_type, scalar.load().tolist()) == ((1,), Type.F32, [7])
    assert (double.shape, double.kept_type, double.load().tolist()) == ((1, 2), Type.F32, [[0.5, np.inf]])
    assert (matrix.kept_type, matrix.load().dtype, matrix.load().tolist()) == (None, np.float32, [[1, 2], [3, 4]])


@pytest.mark.build
@pytest.mark.parametrize("qtype", [Type.F16, Type.F32, Type.Q4_K, Type.Q8_0, TRIT_TYPE[2]])
def test_tensors_are_read_again_and_in_part(qtype: Type, tmp_path: Path) -> None:
    block, size = GGML_QUANT_SIZES[qtype]
    n = 256
    blocks = np.random.default_rng(0).integers(0, 256, (3 * 7, n // block * size), np.uint8)
    if qtype is TRIT_TYPE[2]:
        blocks = encoder.quantize(np.random.default_rng(0).standard_normal((3 * 7, n)).astype(np.float32), 2)
    path = tmp_path / "x.gguf"
    table = [tensor_entry("blk.0.ffn_up_exps.weight", qtype, (n, 7, 3))]
    path.write_bytes(bare_gguf([LLAMA, u32_entry("trit.format_version", 1)], table) + blocks.tobytes())
    (tensor,) = open_gguf(path).tensors
    whole = tensor.load()
    assert whole.shape == (3, 7, n)
    assert np.array_equal(tensor.load(), whole, equal_nan=True)
    assert np.array_equal(tensor.sample(3), whole[:, ::3], equal_nan=True)


def test_tensors_are_in_the_order_of_the_layers(tmp_path: Path) -> None:
    names = ["output.weight", "blk.10.ffn_up.weight", "blk.2.ffn_up.weight", "rope_freqs.weight", "token_embd.weight"]
    path = tmp_path / "x.gguf"
    table = [tensor_entry(name, Type.F32, (32, 1), 128 * number) for number, name in enumerate(names)]
    path.write_bytes(bare_gguf([LLAMA], table, 128 * len(names)))
    assert [tensor.name for tensor in open_gguf(path).tensors] == [
        "token_embd.weight",
        "blk.2.ffn_up.weight",
        "blk.10.ffn_up.weight",
        "output.weight",
        "rope_freqs.weight",
    ]


def test_damaged_blocks_are_not_read_as_weights(tmp_path: Path) -> None:
    blocks = pack(unpack(2, np.zeros((4, 28), np.uint8)))
    blocks[3, :2] = 1, 0
    path = tmp_path / "x.gguf"
    table = [tensor_entry("blk.0.ffn_up.weight", TRIT_TYPE[2], (64, 4))]
    path.write_bytes(bare_gguf([LLAMA, u32_entry("trit.format_version", 1)], table) + blocks.tobytes())
    (tensor,) = open_gguf(path).tensors
    with pytest.raises(TritError, match=r"tensor blk\.0\.ffn_up\.weight: block 3 is not TRIT2 data"):
        tensor.load()


@pytest.mark.build
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("qtype", [Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.IQ4_XS])
def test_scales_that_are_no_numbers_give_no_warnings(qtype: Type, tmp_path: Path) -> None:
    """The one line that refuses them comes when the weights are stored."""
    block, size = GGML_QUANT_SIZES[qtype]
    path = tmp_path / "x.gguf"
    table = [tensor_entry("blk.0.ffn_up.weight", qtype, (block, 2))]
    path.write_bytes(bare_gguf([LLAMA], table) + b"\x00\x7e\x00\x7c" * (size // 2) + bytes(size % 2))
    assert not np.isfinite(open_gguf(path).tensors[0].load()).any()
