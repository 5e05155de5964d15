"""Tensors taken apart by rows, encoded by threads, and measured."""

import re

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type
from tensors import blocks_of, finish, tensor_of

from tritconv.encode import Encoded, check_finite, encode, measured, n_bytes
from tritconv.workers import Chunk, Workers
from tritcore import ggml
from tritcore.encoder import quantize
from tritcore.errors import TritError
from tritcore.format import DEPTHS
from tritcore.gguf_types import DEPTH_OF_TYPE, TRIT_TYPE


def _trit(values: np.ndarray, depth: int, threads: int) -> Encoded:
    data = blocks_of(values, depth, threads=threads)
    with Workers(threads) as workers:
        return measured(values, data, TRIT_TYPE[depth], workers)


@pytest.mark.parametrize("shape", [(1, 64), (700, 1536), (3, 500, 1024), (2, 2, 300, 512), (64,), (3, 400_000)])
def test_chunks(shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with Workers(3) as workers:
        chunks: list[Chunk] = workers.map(lambda chunk: chunk, values)
    rows = values.reshape(-1, shape[-1])
    assert np.array_equal(np.concatenate([chunk.rows for chunk in chunks]), rows)
    per_matrix = shape[-2] if len(shape) > 1 else 1
    for chunk in chunks:
        assert np.array_equal(rows[chunk.place], chunk.rows)
        assert chunk.first // per_matrix == (chunk.place.stop - 1) // per_matrix == chunk.matrix


@pytest.mark.build
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("depth", DEPTHS)
def test_trit_blocks_and_their_error(depth: int, threads: int) -> None:
    rng = np.random.default_rng(0)
    values = (0.05 * rng.standard_normal((2, 300, 1024))).astype(np.float16)
    encoded = _trit(values, depth, threads)
    rows = values.reshape(-1, 1024).astype(np.float32)
    assert np.array_equal(encoded.data, quantize(rows, depth).ravel())
    assert len(encoded.data) == n_bytes(values.shape, TRIT_TYPE[depth])
    lost = quants.dequantize(encoded.data.reshape(600, -1), TRIT_TYPE[depth]) - rows
    expected = np.sqrt((lost.astype(np.float64) ** 2).sum() / (rows.astype(np.float64) ** 2).sum())
    assert encoded.relative_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.build
@pytest.mark.parametrize("qtype", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0])
def test_other_types_are_as_gguf_makes_them(qtype: Type) -> None:
    values = np.random.default_rng(0).standard_normal((600, 1024)).astype(np.float32)
    with Workers(2) as workers:
        assert encode(values, qtype, workers).data.tobytes() == quants.quantize(values, qtype).tobytes()


@pytest.mark.build
@pytest.mark.parametrize("qtype", [t for t in Type if t in quants._type_traits and GGML_QUANT_SIZES[t][0] > 1])
def test_ggml_decodes_what_gguf_does(qtype: Type) -> None:
    """Random bytes, as they come from files of others; TRIT blocks are checked before they are decoded."""
    block, size = GGML_QUANT_SIZES[qtype]
    rng = np.random.default_rng(0)
    if qtype in DEPTH_OF_TYPE:
        data = quantize(rng.standard_normal((50, 4 * block)).astype(np.float32), DEPTH_OF_TYPE[qtype])
    else:
        data = rng.integers(0, 256, (50, 4 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(data, qtype)
    assert np.array_equal(ggml.dequantize(data, qtype), expected, equal_nan=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_in_a_later_chunk(value: float) -> None:
    values = np.ones((2, 400, 1024), np.float16)
    values[1, 399, 77] = value
    values[1, 399, 500] = value
    with Workers(2) as workers, pytest.raises(TritError, match=rf"ffn_up\.weight holds {value} at \[1, 399, 77\]: the"):
        check_finite(tensor_of(values), values, workers)
    with pytest.raises(TritError, match=r"\[1, 399, 77\]"):
        finish(values, 2)


@pytest.mark.build
@pytest.mark.parametrize("depth", DEPTHS)
def test_above_the_range_in_a_later_chunk(depth: int) -> None:
    values = np.ones((2, 400, 1024), np.float16)
    values[1, 300, 128:192] = 500
    found, _ = finish(values, depth)
    assert found.blocks is None
    assert re.match(rf"block {700 * 16 + 2}: largest weight 500 is above the range", found.reason or "")


@pytest.mark.build
def test_zeros() -> None:
    assert _trit(np.zeros((10, 64), np.float32), 3, 2).relative_error == 0
