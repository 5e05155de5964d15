"""Headers of GGUF files that hold anything: what llama.cpp reads gets through, everything else is one clear line."""

import struct
import time
import tracemalloc
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf import GGUFValueType as V
from tiny_gguf import bare_gguf, entry, list_entry, string, tensor_entry, u32_entry, write_tiny_model
from typer.testing import CliRunner

from tritcore.codec import pack, unpack
from tritcore.errors import TritError
from tritcore.gguf_header import parts_of, raw_values, read_header, read_model_file

F32, TRIT3 = 0, 87
LLAMA = entry("general.architecture", V.STRING, "llama")


def refusal(content: bytes) -> str:
    """The error that a header gives."""
    with pytest.raises(TritError) as caught:
        read_header(Path("model.gguf"), content)
    message = str(caught.value)
    assert message.startswith("model.gguf: ")
    assert message.isprintable()
    assert len(message) < 500
    return message


def tensors(*shapes: tuple[int, ...], names: tuple[bytes, ...] = ()) -> bytes:
    """A file of F32 tensors, in order, with all their data."""
    entries, offset = [], 0
    for index, shape in enumerate(shapes):
        name = names[index] if names else b"w%d" % index
        entries.append(tensor_entry(name, F32, shape, offset))
        n_bytes = 4
        for n in shape:
            n_bytes *= n
        offset += n_bytes + -n_bytes % 32
    return bare_gguf([], entries, offset)


def named(name: bytes) -> bytes:
    return tensors((8,), names=(name,))


WRONG_LISTS: list[tuple[str, V, list[Any]]] = [
    ("general.name", V.STRING, ["a"]),
    ("split.count", V.UINT16, [2]),
    ("tokenizer.chat_template", V.STRING, ["a"]),
    ("tokenizer.ggml.tokens", V.UINT32, [1]),
    ("tokenizer.ggml.merges", V.UINT8, [1]),
    ("tokenizer.ggml.scores", V.STRING, ["0"]),
    ("tokenizer.ggml.token_type", V.BOOL, [True]),
    ("llama.block_count", V.UINT32, [1]),
    ("llama.attention.head_count_kv", V.FLOAT32, [1.0]),
]

HOSTILE = {
    # counts and lengths
    "2^63 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "9223372036854775808 metadata keys"),
    "2^63 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "9223372036854775808 tensors"),
    "100000 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 100000), "100000 metadata keys"),
    "more keys than there are": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "truncated or damaged"),
    "endless key": (bare_gguf([struct.pack("<Q", 2**64 - 1)], []), "truncated or damaged"),
    "endless string": (bare_gguf([string("a") + struct.pack("<IQ", 8, 2**64 - 1)], []), "truncated or damaged"),
    "endless list": (bare_gguf([string("a") + struct.pack("<IIQ", 9, 10, 2**61)], []), "truncated or damaged"),
    "endless strings": (bare_gguf([string("a") + struct.pack("<IIQ", 9, 8, 2**64 - 1)], []), "has 184467440737095516"),
    "a million strings in no bytes": (
        bare_gguf([string("a") + struct.pack("<IIQ", 9, 8, 10**6)], []),
        "truncated or damaged",
    ),
    "string past the end in a list": (
        bare_gguf([string("a") + struct.pack("<IIQQ", 9, 8, 1, 2**63)], []),
        "truncated or damaged",
    ),
    # keys
    "empty key": (bare_gguf([u32_entry("", 1)], []), "an empty metadata key"),
    "key of 70000 bytes": (bare_gguf([u32_entry("k" * 70000, 1)], []), "a metadata key of 70000 bytes"),
    "long key of a bad type": (bare_gguf([string("k" * 60000) + struct.pack("<I", 13)], []), "metadata key 'kkkk"),
    "key twice": (bare_gguf([u32_entry("a", 1), u32_entry("a", 1)], []), "metadata key 'a' is there twice"),
    "key not UTF-8": (bare_gguf([string(b"a\xff") + struct.pack("<II", 4, 1)], []), "a metadata key that is not UTF-8"),
    "key with an escape": (bare_gguf([u32_entry("a\x1b[2J", 1)], []), "a metadata key with control characters"),
    "key with a line feed": (bare_gguf([u32_entry("a\nb", 1)], []), "a metadata key with control characters"),
    "key with a zero byte": (bare_gguf([u32_entry("a\0b", 1)], []), "a metadata key with control characters"),
    # values
    "unknown type": (bare_gguf([string("a") + struct.pack("<II", 13, 0)], []), "'a' has the unknown type 13"),
    "unknown type in a list": (
        bare_gguf([string("a") + struct.pack("<IIQ", 9, 99, 0)], []),
        "'a' has the unknown type 99",
    ),
    "list of lists": (bare_gguf([string("a") + struct.pack("<IIQ", 9, 9, 0)], []), "'a' is a list of lists"),
    "bool of 2": (bare_gguf([string("a") + struct.pack("<IB", 7, 2)], []), "'a' is a bool of 2, not of 0 or 1"),
    "bool of 255 in a list": (
        bare_gguf([string("a") + struct.pack("<IIQ2B", 9, 7, 2, 1, 255)], []),
        "'a' has a bool that is neither 0 nor 1",
    ),
    # types of keys
    **{
        f"{key} as {value_type.name}": (bare_gguf([LLAMA, entry(key, value_type, value)], []), f"'{key}' is {found}")
        for key, value_type, value, found in [
            ("general.name", V.UINT32, 1, "uint32, not text"),
            ("general.type", V.BOOL, True, "bool, not text"),
            ("general.file_type", V.STRING, "F16", "string, not an integer"),
            ("general.quantization_version", V.FLOAT32, 2.0, "float32, not an integer"),
            ("split.count", V.STRING, "2", "string, not an integer"),
            ("split.no", V.FLOAT64, 0.0, "float64, not an integer"),
            ("split.tensors.count", V.BOOL, True, "bool, not an integer"),
            ("trit.format_version", V.BOOL, True, "bool, not an integer"),
            ("trit.method", V.INT8, -1, "int8, not text"),
            ("tokenizer.chat_template.tool_use", V.UINT32, 1, "uint32, not text"),
            ("tokenizer.ggml.model", V.UINT8, 1, "uint8, not text"),
            ("tokenizer.ggml.precompiled_charsmap", V.STRING, "x", "string, not a list of bytes"),
            ("tokenizer.ggml.tokens", V.STRING, "<s>", "string, not a list of texts"),
            ("tokenizer.ggml.eos_token_id", V.STRING, "</s>", "string, not an integer"),
            ("tokenizer.ggml.add_bos_token", V.UINT32, 1, "uint32, not a bool"),
            ("llama.block_count", V.FLOAT32, 2.0, "float32, not an integer"),
            ("llama.context_length", V.STRING, "4096", "string, not an integer"),
            ("llama.attention.head_count", V.BOOL, True, "bool, not an integer or a list of integers"),
        ]
    },
    **{
        f"{key} as a list of {element_type.name}": (
            bare_gguf([LLAMA, list_entry(key, element_type, values)], []),
            f"'{key}' is a list of {element_type.name.lower()}, not ",
        )
        for key, element_type, values in WRONG_LISTS
    },
    "architecture as a number": (
        bare_gguf([u32_entry("general.architecture", 1)], []),
        "'general.architecture' is uint32",
    ),
    "architecture as a list": (
        bare_gguf([list_entry("general.architecture", V.STRING, ["llama"])], []),
        "'general.architecture' is a list of string, not text",
    ),
    "architecture not UTF-8": (
        bare_gguf([entry("general.architecture", V.STRING, b"ll\xe4ma")], []),
        "general.architecture is not the name of an architecture",
    ),
    "architecture with an escape": (
        bare_gguf([entry("general.architecture", V.STRING, "\x1b]0;x\x07")], []),
        "general.architecture is not the name",
    ),
    "architecture of 100 KB": (
        bare_gguf([entry("general.architecture", V.STRING, "a" * 100000)], []),
        "general.architecture is not the name",
    ),
    # alignment
    **{
        f"alignment {value}": (bare_gguf([u32_entry("general.alignment", value)], []), f"general.alignment is {value}")
        for value in (0, 24, 33, 2**31, 2**32 - 1)
    },
    "alignment as uint64": (
        bare_gguf([entry("general.alignment", V.UINT64, 32)], []),
        "'general.alignment' is uint64, not a uint32",
    ),
    "alignment as a string": (bare_gguf([entry("general.alignment", V.STRING, "32")], []), "is string, not a uint32"),
    # TRIT
    "TRIT version 2": (bare_gguf([u32_entry("trit.format_version", 2)], []), "TRIT format version 2 is not known"),
    # names of tensors
    "empty tensor name": (named(b""), "an empty tensor name"),
    "tensor name of 64 bytes": (named(b"w" * 64), "a tensor name of 64 bytes"),
    "tensor name not UTF-8": (named(b"\xc3"), "a tensor name that is not UTF-8"),
    "tensor name with a zero byte": (named(b"w\0"), "a tensor name with control characters"),
    "tensor name with an escape": (named(b"\x1b[31mw"), "a tensor name with control characters"),
    "tensor name with a C1 control": (named("w\x9b2J".encode()), "a tensor name with control characters"),
    "two tensors of one name": (tensors((8,), (8,), names=(b"w", b"w")), "tensor 'w' is there twice"),
    # shapes and types of tensors
    "5 dimensions": (bare_gguf([], [tensor_entry("w", F32, (1,) * 5)]), "tensor 'w' has 5 dimensions"),
    "2^32 - 1 dimensions": (bare_gguf([], [string("w") + b"\xff" * 4]), "tensor 'w' has 4294967295 dimensions"),
    "dimension 0": (bare_gguf([], [tensor_entry("w", F32, (0, 4))]), "tensor 'w' has the impossible shape 0 x 4"),
    "zero rows": (bare_gguf([], [tensor_entry("w", F32, (64, 0))]), "has the impossible shape 64 x 0"),
    "negative dimension": (
        bare_gguf([], [tensor_entry("w", F32, (2**64 - 1,))]),
        "impossible shape 18446744073709551615",
    ),
    "product over 2^63": (bare_gguf([], [tensor_entry("w", F32, (2**32, 2**32))]), "shape 4294967296 x 4294967296"),
    "product that wraps to 4": (
        bare_gguf([], [tensor_entry("w", F32, (2**62, 2**2 + 1))]),
        "impossible shape 4611686018427387904 x 5",
    ),
    "a tensor beyond the file": (bare_gguf([], [tensor_entry("w", F32, (2**61,))]), "truncated: tensor 'w'"),
    "rows of 96 in TRIT3": (
        bare_gguf([], [tensor_entry("w", TRIT3, (96,))]),
        "tensor 'w' has rows of 96, not a multiple of 64",
    ),
    "scalar of a type with blocks": (bare_gguf([], [tensor_entry("w", TRIT3, ())]), "has rows of 1, not a multiple of"),
    "tensor type 89": (bare_gguf([], [tensor_entry("w", 89, (64,))]), "tensor 'w' has the unknown type 89"),
    "tensor type 4, which is gone": (bare_gguf([], [tensor_entry("w", 4, (64,))]), "has the unknown type 4"),
    "tensor type 2^32 - 1": (bare_gguf([], [tensor_entry("w", 2**32 - 1, (64,))]), "has the unknown type 4294967295"),
    # offsets
    "offset past the end": (
        bare_gguf([], [tensor_entry("w", F32, (1,), 2**64 - 1)]),
        "begin at byte 184467440737095516",
    ),
    "first offset not 0": (bare_gguf([], [tensor_entry("w", F32, (8,), 32)], 64), "begin at byte 32, not at 0"),
    **{
        what: (
            bare_gguf([], [tensor_entry("a", F32, (9,)), tensor_entry("b", F32, (8,), offset)], 128),
            f"tensor 'b' begin at byte {offset}, not at 64",
        )
        for what, offset in {"unaligned": 36, "overlapping": 32, "the same": 0, "with a gap": 96}.items()
    },
    "unordered": (
        bare_gguf([], [tensor_entry("a", F32, (8,), 32), tensor_entry("b", F32, (8,), 0)], 64),
        "tensor 'a' begin at byte 32, not at 0",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_refused(what: str) -> None:
    content, message = HOSTILE[what]
    assert message in refusal(content)


# {bad} is the file, {good} a sound one, {text} a text
COMMANDS = [
    ("tritconv", "inspect", "{bad}"),
    ("tritconv", "inspect", "{bad}", "--tensor", "w"),
    ("tritconv", "gguf-to-gguf", "{bad}", "--fast", "--depth", "2"),
    ("tritconv", "gguf-to-gguf", "{good}", "--depth", "2", "--imatrix", "{bad}"),
    *(
        pytest.param(("tritrun", *arguments), marks=pytest.mark.build)
        for arguments in [
            ("chat", "{bad}", "--prompt", "x"),
            ("perplexity", "{bad}", "--file", "{text}"),
            ("perplexity", "{good}", "--file", "{text}", "--base", "{bad}"),
            ("bench", "{good}", "{bad}"),
            ("compare", "--base", "{bad}", "--text", "{text}", "{good}"),
            ("compare", "--base", "{good}", "--text", "{text}", "{bad}"),
        ]
    ),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_refuses(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = command
    app = import_module(f"{program}.cli").app
    monkeypatch.chdir(tmp_path)
    bad, good, text = Path("bad.gguf"), write_tiny_model(Path("good.gguf")), Path("text.txt")
    text.write_text("Once upon a time. " * 100)
    for what in ("dimension 0", "key not UTF-8", "split.count as STRING", "endless strings"):
        bad.write_bytes(HOSTILE[what][0])
        done = CliRunner().invoke(app, [argument.format(bad=bad, good=good, text=text) for argument in arguments])
        assert (done.exit_code, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: bad.gguf: ")
        assert HOSTILE[what][1] in line
    assert {path.name for path in tmp_path.iterdir()} == {"bad.gguf", "good.gguf", "text.txt"}


def test_inspect_shows_names_and_values_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "[b]\x1b[2Jx.gguf"
    entries = [
        LLAMA,
        entry("[red]key", V.STRING, "\x1b]0;title\x07 [link=x]y[/link]\r\n\x9b31mz"),
        entry("general.name", V.STRING, bytes(range(256))),
    ]
    block = pack(unpack(3, np.zeros((1, 42), np.uint8))).tobytes()
    path.write_bytes(bare_gguf(entries, [tensor_entry("[i]w[/i]", TRIT3, (64,))]) + block)
    app = import_module("tritconv.cli").app
    done = [CliRunner().invoke(app, ["inspect", str(path), *more]) for more in ([], ["--tensor", "[i]w[/i]"])]
    assert [result.exit_code for result in done] == [0, 0], [result.stderr for result in done]
    assert all(character.isprintable() or character == "\n" for result in done for character in result.stdout)
    for words in ("[b][2Jx.gguf: metadata", "[red]key", "]0;title [link=x]y[/link] 31mz", "[i]w[/i]"):
        assert words in done[0].stdout
    assert "codes of [i]w[/i]" in done[1].stdout


ANY_BYTES = bytes(range(256))
LEGAL = {
    "nothing": bare_gguf([], []),
    "version 2": bare_gguf([LLAMA], [tensor_entry("w", F32, (8,))], 32, version=2),
    "empty lists": bare_gguf([list_entry("a", V.STRING, []), list_entry("b", V.FLOAT32, [])], []),
    "empty strings": bare_gguf([entry("general.name", V.STRING, ""), list_entry("b", V.STRING, [""] * 9)], []),
    "strings of any bytes": bare_gguf(
        [
            entry("general.name", V.STRING, ANY_BYTES),
            list_entry("tokenizer.ggml.tokens", V.STRING, [ANY_BYTES, b"\xff"]),
        ],
        [],
    ),
    "a chat template of 200 KB": bare_gguf([entry("tokenizer.chat_template", V.STRING, "é" * 100000)], []),
    "heads of each layer": bare_gguf(
        [LLAMA]
        + [
            list_entry(f"llama.{key}", V.INT32, [1, 0, 2])
            for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        ],
        [],
    ),
    "keys of another architecture": bare_gguf([LLAMA, entry("clip.vision.block_count", V.STRING, "many")], []),
    "integer scores": bare_gguf([list_entry("tokenizer.ggml.scores", V.INT32, [1, -1])], []),
    "all types": bare_gguf(
        [entry(f"k.{t.name}", t, 1) for t in V if t not in (V.STRING, V.ARRAY)]
        + [list_entry(f"l.{t.name}", t, [0, 1]) for t in V if t not in (V.STRING, V.ARRAY)],
        [],
    ),
    "a scalar": bare_gguf([], [tensor_entry("w", F32, ())], 4),
    "four dimensions": tensors((1, 2, 3, 4), (5,), (6, 7)),
    "a name of 63 bytes": named(b"w" * 63),
    "a name in any script": named("层.7.权重".encode()),
    "alignment 1": bare_gguf([u32_entry("general.alignment", 1)], [tensor_entry("w", F32, (1,))], 36),
    "alignment 64": bare_gguf([u32_entry("general.alignment", 64)], [tensor_entry("w", F32, (1,))], 128),
    "data after the last tensor": tensors((8,)) + bytes(1000),
}


@pytest.mark.parametrize("what", LEGAL)
def test_accepted(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(LEGAL[what])
    model = read_model_file(path)
    theirs = GGUFReader(path)
    assert [tensor.name for tensor in model.tensors] == [tensor.name for tensor in theirs.tensors]
    assert list(model.fields) == [key for key in theirs.fields if not key.startswith("GGUF.")]
    for tensor, other in zip(model.tensors, theirs.tensors, strict=True):
        assert (model.data_start + tensor.offset, tensor.n_bytes) == (other.data_offset, other.n_bytes)
    for key, field, value in raw_values(model):
        parts = theirs.fields[key]
        found = [parts.parts[index] for index in parts.data]
        if V.STRING in parts.types:
            assert [part.tobytes() for part in found] == (value if field.type is V.ARRAY else [value])
        else:
            assert [part.tolist()[0] for part in found] == (value if field.type is V.ARRAY else [value])


def test_a_real_vocabulary_is_read_in_no_time(tmp_path: Path) -> None:
    words = [f"token{n}" for n in range(300_000)]
    merges = [f"t{n} e{n}" for n in range(450_000)]
    lists = [
        list_entry("tokenizer.ggml.tokens", V.STRING, words),
        list_entry("tokenizer.ggml.merges", V.STRING, merges),
    ]
    names = [f"blk.{n}.ffn_down_exps.weight" for n in range(2000)]
    path = tmp_path / "model.gguf"
    path.write_bytes(bare_gguf(lists, [tensor_entry(name, F32, (8,), 32 * n) for n, name in enumerate(names)], 64000))
    start = time.process_time()
    model = read_model_file(path)
    assert time.process_time() - start < 3
    assert (model.vocabulary_size, len(model.tensors)) == (300_000, 2000)


NOTHING = 2**40


def _strings(count: int, n_keys: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, n_keys) + string("a") + struct.pack("<IIQ", 9, 8, count)


SPARSE = {
    "2^30 empty strings": _strings(2**30),
    "4 million empty strings, twice": _strings(2**22, 2)
    + bytes(8 * 2**22)
    + list_entry("b", V.STRING, [])[:-8]
    + b"\1",
    "2^27 zeros for bools": b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + string("a") + struct.pack("<IIQ", 9, 7, 2**27),
    "2^40 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40),
    "65536 empty keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**16),
    "2^35 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**35, 0),
    "2^38 numbers": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + struct.pack("<IIQ", 9, 10, 2**38),
    "2^38 bools": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + struct.pack("<IIQ", 9, 7, 2**38),
    "a string of 2^38 bytes": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + struct.pack("<IQ", 8, 2**38),
}


@pytest.mark.parametrize("what", SPARSE)
def test_a_terabyte_of_nothing_is_refused_at_once(what: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(SPARSE[what])
        file.truncate(NOTHING)
    start = time.process_time()
    with pytest.raises(TritError, match="damaged"):
        read_model_file(path)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("what", [what for what in SPARSE if "twice" not in what])  # where tracing takes ten seconds
def test_a_terabyte_of_nothing_takes_no_memory(what: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(SPARSE[what])
        file.truncate(NOTHING)
    tracemalloc.start()
    try:
        with pytest.raises(TritError):
            read_model_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def part(index: object, count: object, names: list[str], total: object) -> bytes:
    """A part of a split file."""
    numbers = [("no", V.UINT16, index), ("count", V.UINT16, count), ("tensors.count", V.INT32, total)]
    entries = [entry(f"split.{key}", value_type, value) for key, value_type, value in numbers if value is not None]
    table = [tensor_entry(name, F32, (8,), 32 * n) for n, name in enumerate(names)]
    return bare_gguf(entries, table, 32 * len(names))


def _write_parts(folder: Path, *parts: bytes | None, stem: str = "m") -> list[Path]:
    paths = [folder / f"{stem}-{n:05}-of-{len(parts):05}.gguf" for n in range(1, len(parts) + 1)]
    for path, content in zip(paths, parts, strict=True):
        if content is not None:
            path.write_bytes(content)
    return paths


@pytest.mark.parametrize("given", [0, 1, 2])
def test_all_parts_whichever_is_given(given: int, tmp_path: Path) -> None:
    paths = _write_parts(tmp_path, part(0, 3, [], 3), part(1, 3, ["a"], 3), part(2, 3, ["b", "c"], 3))
    found = parts_of(read_model_file(paths[given]))
    assert [file.path for file in found] == paths
    assert [tensor.name for file in found for tensor in file.tensors] == ["a", "b", "c"]
    assert sum(file.size for file in found) == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize("count", [None, 0, 1])
def test_a_file_that_is_no_part_is_alone(count: int | None, tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00009.gguf"  # a name alone splits nothing
    path.write_bytes(part(0, count, ["a"], 1))
    model = read_model_file(path)
    assert parts_of(model) == (model,)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((part(0, 3, ["a"], 3), None, None), "is part 1 of 3: m-00002-of-00003.gguf and 1 more is not beside it"),
        ((part(0, 2, ["a"], 2), b"no GGUF"), "m-00002-of-00002.gguf: not a GGUF file"),
        ((part(0, 2, ["a"], 2), part(0, 2, ["b"], 2)), "m-00002-of-00002.gguf is not part 2 of 2"),
        ((part(0, 2, ["a"], 2), part(1, 3, ["b"], 2)), "m-00002-of-00002.gguf is not part 2 of 2"),
        ((part(0, 2, ["a"], 2), part(None, None, ["b"], 2)), "m-00002-of-00002.gguf is not part 2 of 2"),
        ((part(0, 2, ["a"], 3), part(1, 2, ["b"], 3)), "the 2 parts hold 2 tensors, not 3"),
        ((part(0, 2, ["a"], 2), part(1, 2, ["a"], 2)), "tensor 'a' is in 2 of the 2 parts"),
        ((part(1, 2, ["a"], 2), None), "is part 2 of 2, but is not named so"),
        ((part(0, 65535, ["a"], 2), None), "is part 1 of 65535, but is not named so"),
        ((part(None, 2, ["a"], 2), None), "is a part of 2, but is not named so"),
    ],
)
def test_parts_that_do_not_go_together(parts: tuple[bytes | None, ...], words: str, tmp_path: Path) -> None:
    paths = _write_parts(tmp_path, *parts)
    with pytest.raises(TritError) as caught:
        parts_of(read_model_file(paths[0]))
    assert words in str(caught.value)
