"""The constants and the worked examples of docs/reference/format.md."""

import re
from decimal import Decimal, getcontext
from pathlib import Path

import ggml
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from tritcore.codec import Blocks, pack, unpack, validate
from tritcore.format import BYTES_PER_BLOCK, DEPTHS, N_ANCHORS, N_SCALES, RATIO, anchor

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
