"""The constants and the worked examples of docs/reference/format.md."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable
from decimal import Decimal, getcontext
from pathlib import Path

import ggml
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from tritcore.codec import Blocks, pack, unpack, validate
from tritcore.format import (
    BLOCK_SIZE,
    BYTES_PER_BLOCK,
    CODE_MAX,
    CODES_PER_WORD,
    DEPTHS,
    GROUP_SIZE,
    N_ANCHORS,
    N_GROUPS,
    N_SCALES,
    QUADS,
    RATIO,
    RATIO_ONE,
    RESERVED,
    TRITS_PER_WORD,
    WORDS_PER_BLOCK,
    anchor,
)

SOURCES = Path(__file__).parent.parent / "vendor/llama.cpp-patch/files/ggml/src"
COMMON = SOURCES / "ggml-trit-common.h"
FORMAT = (Path(__file__).parent.parent / "docs" / "reference" / "format.md").read_text(encoding="utf-8")


def _exact_anchor(depth: int, n: int) -> Decimal:
    getcontext().prec = 50
    return Decimal(3) ** (2 - depth) * Decimal(2) ** (3 - Decimal(n) / 6) / 1024


def test_ratios() -> None:
    exact = 1024 * np.exp2((13 - np.arange(N_SCALES)) / 6)
    assert RATIO.tolist() == np.rint(exact).astype(int).tolist()


@pytest.mark.parametrize("depth", DEPTHS)
def test_anchors_are_the_nearest_floats(depth: int) -> None:
    got = anchor(depth, np.arange(N_ANCHORS))
    for n, value in enumerate(got):
        exact = _exact_anchor(depth, n)
        error = abs(Decimal(float(value)) - exact)
        for neighbour in (np.nextafter(value, np.float32(0)), np.nextafter(value, np.float32(1e9))):
            assert error <= abs(Decimal(float(neighbour)) - exact)


def test_constants_in_the_text() -> None:
    table = re.search(r"    4598 [\d\s]+228\n", FORMAT)
    assert table is not None
    assert [int(text) for text in table.group().split()] == RATIO.tolist()
    for depth in DEPTHS:
        row = re.search(rf"^\| {depth} \| (0x.*) \|$", FORMAT, re.MULTILINE)
        assert row is not None
        octave = [float.fromhex(text) for text in row.group(1).split(" | ")]
        assert octave == anchor(depth, np.arange(6)).tolist()


def _preprocessed(texts: Iterable[str]) -> list[str]:
    """What the C preprocessor makes of texts after ggml-trit-common.h, a line for each."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = f'#include "{COMMON}"\n#define QK_TRIT {BLOCK_SIZE}\n' + "".join(f"LINE {text}\n" for text in texts)
    command = [compiler, "-E", "-P", "-x", "c", "-"]
    made = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^LINE (.*)$", made, re.MULTILINE)


def _calculated(expression: str) -> int:
    """The value of an integer expression of C with the operators / and ?:."""
    condition, question, rest = expression.partition("?")
    if question:
        left, equals, right = condition.strip(" ()").partition("==")
        assert equals
        yes, _, no = rest.partition(":")
        return _calculated(yes) if left.strip(" ()") == right.strip(" ()") else _calculated(no)
    numbers = [int(number) for number in re.findall(r"\d+", expression)]
    return numbers[0] if len(numbers) == 1 else numbers[0] // numbers[1]


def test_constants_of_the_header() -> None:
    """C, CUDA and Metal take their constants from one header; it has those of Python."""
    scalars = {
        "QG_TRIT": GROUP_SIZE,
        "NG_TRIT": N_GROUPS,
        "TRIT_N_SCALES": N_SCALES,
        "TRIT_N_ANCHORS": N_ANCHORS,
        "TRIT_RATIO_ONE": RATIO_ONE,
        "TRIT_PER_WORD": TRITS_PER_WORD,
        "TRIT_RESERVED": RESERVED,
    }
    assert dict(zip(scalars, map(_calculated, _preprocessed(scalars)), strict=True)) == scalars
    ratios, octaves, powers = _preprocessed(["TRIT_RATIOS", "TRIT_ANCHOR_OCTAVES", "TRIT_POWERS"])
    assert [int(number) for number in ratios.split(",")] == RATIO.tolist()
    assert [int(number) for number in powers.split(",")] == [3**n for n in range(TRITS_PER_WORD)]
    found = [[np.float32(text) for text in re.findall(r"[\d.e-]+(?=f)", row)] for row in octaves.split("}, {")]
    assert found == [anchor(depth, np.arange(6)).tolist() for depth in DEPTHS]


def test_constants_of_the_depths() -> None:
    names = ("TRIT_LEVELS", "TRIT_QUADS", "TRIT_CODES_PER_WORD")
    for depth in DEPTHS:
        values = [_calculated(text) for text in _preprocessed(f"{name}({depth})" for name in names)]
        assert values == [2 * CODE_MAX[depth] + 1, QUADS[depth], CODES_PER_WORD[depth]]


@pytest.mark.build
def test_constants_of_the_library() -> None:
    """The compiled tables, the words of a block and the offset of a code."""
    library = ggml.base()
    assert list((ctypes.c_int16 * N_SCALES).in_dll(library, "ggml_trit_ratio")) == RATIO.tolist()
    octaves = (ctypes.c_float * 8 * 4).in_dll(library, "ggml_trit_anchor_octave")
    for depth in DEPTHS:
        assert list(octaves[depth - 1])[:6] == anchor(depth, np.arange(6)).tolist()
        assert library.ggml_trit_n_words(depth) == WORDS_PER_BLOCK[depth]
        zero = pack(Blocks(depth, np.zeros((1, BLOCK_SIZE), np.int8), np.zeros((1, N_GROUPS), np.uint8)))
        assert not ggml.dequantize(depth, zero).any()


# what a second copy of a constant would have in it: a ratio, an octave, the words of a block or the offset of a code
COPIES = {
    "ratios": r"\b(4598|3649)\b",
    "octaves": r"2\.0880438|1\.561ae8|0\.0208804",
    "words": r"\b8\b\D{1,24}\b14\b\D{1,24}\b21\b\D{1,24}\b27\b",
    "offsets": r"\b1\b\D{1,24}\b4\b\D{1,24}\b13\b\D{1,24}\b40\b",
    "levels": r"\b3\b\D{1,24}\b9\b\D{1,24}\b27\b\D{1,24}\b81\b",
}


@pytest.mark.parametrize("constant", COPIES)
def test_no_source_has_a_second_copy(constant: str) -> None:
    pattern = re.compile(COPIES[constant])
    sources = [path for path in SOURCES.rglob("*") if path.is_file()]
    code = {path: re.sub(r"//.*", "", path.read_text(encoding="utf-8")) for path in sources}
    assert {path.name for path, text in code.items() if pattern.search(text)} <= {COMMON.name}
    assert len(sources) > 10


def test_patched_gguf_knows_the_types() -> None:
    for depth in DEPTHS:
        qtype = GGMLQuantizationType[f"TRIT{depth}"]
        assert qtype == 84 + depth
        assert GGML_QUANT_SIZES[qtype] == (64, BYTES_PER_BLOCK[depth])
        assert LlamaFileType[f"MOSTLY_TRIT{depth}"] == 84 + depth
        assert f"| TRIT{depth} | {84 + depth} |" in FORMAT


def _example(depth: int) -> dict[str, list[str]]:
    text = re.search(rf"```\n(type:   TRIT{depth}\n.*?)```", FORMAT, re.DOTALL)
    assert text is not None
    fields: dict[str, list[str]] = {}
    for line in text.group(1).splitlines():
        name, _, value = line.partition(":") if ":" in line else ("codes", "", line)
        fields.setdefault(name, []).extend(value.split())
    return fields


@pytest.mark.build
@pytest.mark.parametrize("depth", DEPTHS)
def test_worked_example(depth: int) -> None:
    example = _example(depth)
    data = np.frombuffer(bytes.fromhex("".join(example["block"])), dtype=np.uint8).reshape(1, -1)
    codes = np.array([example["codes"]], dtype=np.int8)
    k = np.array([example["k"]], dtype=np.uint8)

    validate(depth, data)
    assert ggml.validate(depth, data)
    got = unpack(depth, data)
    assert got.codes.tolist() == codes.tolist()
    assert got.scales.tolist() == k.tolist()
    assert pack(Blocks(depth, codes, k)).tobytes() == data.tobytes()

    scales = [float.fromhex(text) for text in example["scales"]]
    assert got.group_scales()[0].tolist() == scales
    weights = np.repeat(np.array(scales, dtype=np.float32), 16) * codes[0].astype(np.float32)
    assert ggml.dequantize(depth, data)[0].tobytes() == weights.tobytes()
