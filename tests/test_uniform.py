"""The codec of the 2026 paper, and its scales among those of the TRIT types."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from checkpoints import logits, make_checkpoint, to_f16_gguf
from command_line import tritconv
from gguf import GGUFReader
from hypothesis import given, settings
from strategies import depths, weights

from tritconv.methods.scales import nearest_scales
from tritconv.methods.uniform import Uniform, encode
from tritconv.sources.source import Kind, SourceTensor
from tritconv.workers import Workers
from tritcore.codec import Blocks, pack, unpack, validate
from tritcore.errors import RangeError
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS, RATIO, anchor
from tritcore.gguf_header import read_model_file


def _as_published(w: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The codec step by step: codes (rows, n) and scales (rows, n / 16)."""
    top = CODE_MAX[depth]
    groups = w.reshape(-1, 16).astype(np.float64)
    best = []
    for group in groups:
        ordered = sorted(abs(group))
        candidates = [ordered[i] / top for i in (10, 12, 14, 15) if ordered[i] > 0]
        errors = [sum((x - s * min(max(round(x / s), -top), top)) ** 2 for x in group) for s in candidates]
        best.append(candidates[errors.index(min(errors))] if candidates else 0.0)
    used = [s for s in best if s]
    low, high = np.log(min(used)), np.log(max(used))
    book = [low + (high - low) * i / 26 for i in range(27)]
    scales = [np.exp(min(book, key=lambda entry: abs(entry - np.log(s)))) if s else 0.0 for s in best]
    codes = [[min(max(round(x / s), -top), top) if s else 0 for x in g] for g, s in zip(groups, scales, strict=True)]
    return np.array(codes).reshape(w.shape), np.array(scales).reshape(len(w), -1)


@pytest.mark.parametrize("depth", DEPTHS)
def test_as_published(depth: int) -> None:
    rng = np.random.default_rng(depth)
    w = (0.05 * rng.standard_normal((24, 128)) * np.exp(rng.standard_normal((24, 1)))).astype(np.float32)
    w[3, 16:32] = 0  # a group of zeros
    w[5, :16] = 0
    w[5, 7] = 0.3  # the lower order statistics are 0
    w[9] *= 0.001
    codes, scales = encode(w, depth)
    wanted_codes, wanted_scales = _as_published(w, depth)
    assert codes.dtype == np.int8
    assert scales.dtype == np.float32
    assert np.allclose(scales, wanted_scales, rtol=1e-5)
    assert np.array_equal(codes, wanted_codes)
    assert len(np.unique(scales[scales > 0])) <= 27


@settings(deadline=None)
@given(weights(), depths)
def test_any_weights(w: np.ndarray, depth: int) -> None:
    codes, scales = encode(w, depth)
    assert np.abs(codes).max() <= CODE_MAX[depth]
    assert not codes[np.repeat(scales, 16, axis=1) == 0].any()
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_zeros_and_denormals(depth: int) -> None:
    for value in (0.0, -0.0, 1e-45, 2.0**-26):
        codes, scales = encode(np.full((3, 64), value, np.float32), depth)
        assert not codes.any()
        assert not scales.any()
        blocks = nearest_scales(depth, codes, scales)
        assert (blocks.scales == 13).all()
    w = np.full((1, 64), 1e-42, np.float32)
    w[0, ::2] = 0.5
    assert np.allclose(encode(w, depth)[0][0, ::2], CODE_MAX[depth])


def _least_error(depth: int, energy: np.ndarray, scales: np.ndarray) -> float:
    """Least squared error of one block over all anchors and scale indexes: energy and scales float64 (4,)."""
    best = np.inf
    for n in range(81):
        a = float(anchor(depth, np.array(n)))
        first = energy[0] * (a * 1024 - scales[0]) ** 2
        errors = energy[1:, None] * (a * RATIO.astype(np.float64) - scales[1:, None]) ** 2
        for r1, r2 in itertools.product(range(3), repeat=2):
            r = (r1, r2, (n - r1 - r2) % 3)
            best = min(best, first + sum(errors[g, r[g] :: 3].min() for g in range(3)))
    return best


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0])
def test_the_nearest_scales_of_all(depth: int, spread: float) -> None:
    rng = np.random.default_rng(7)
    top = CODE_MAX[depth]
    codes = rng.integers(-top, top + 1, (40, 64)).astype(np.int8)
    codes[::5, :16] = 0
    codes[::7, 32:] = 0
    scales = (0.1 / top * np.exp(np.clip(spread * rng.standard_normal((40, 4)), -3, 5))).astype(np.float32)
    blocks = nearest_scales(depth, codes, scales)
    assert np.array_equal(blocks.codes, codes)
    validate(depth, pack(blocks))
    for i in range(len(codes)):
        energy = (codes[i].reshape(4, 16).astype(np.float64) ** 2).sum(axis=1)
        wanted = scales[i].astype(np.float64)
        error = float((energy * (blocks.group_scales()[i].astype(np.float64) - wanted) ** 2).sum())
        # the ratios are rounded to integers, by up to a part in 400
        assert error <= _least_error(depth, energy, wanted) + 3e-4 * (energy * wanted**2).sum()


@pytest.mark.parametrize("depth", DEPTHS)
def test_representable_scales_stay(depth: int) -> None:
    rng = np.random.default_rng(0)
    top = CODE_MAX[depth]
    codes = rng.integers(1, top + 1, (500, 64)).astype(np.int8)
    indexes = rng.integers(0, 27, (500, 4)).astype(np.uint8)
    original = Blocks(depth, codes, indexes)
    assert np.array_equal(nearest_scales(depth, codes, original.group_scales()).decode(), original.decode())


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("group", "factor"), [(0, 8.5), (2, 38.1)])
def test_scales_above_the_range(depth: int, group: int, factor: float) -> None:
    unit = 3.0 ** (2 - depth)
    codes = np.ones((4, 64), np.int8)
    scales = np.full((4, 4), unit, np.float32)
    scales[2, group] = factor * unit
    with pytest.raises(RangeError, match="above") as caught:
        nearest_scales(depth, codes, scales)
    assert caught.value.block == 2


@pytest.mark.build
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("factor", [7.2e-4, 2e-4, 1e-5, 1e-30])
def test_a_block_below_the_range_loses_no_more_than_zeros(depth: int, factor: float) -> None:
    rng = np.random.default_rng(0)
    top = CODE_MAX[depth]
    codes = rng.integers(-top, top + 1, (8, 64)).astype(np.int8)
    scales = np.full((8, 4), 3.0 ** (2 - depth), np.float32)
    scales[2] *= np.float32(factor)
    blocks = nearest_scales(depth, codes, scales)
    validate(depth, pack(blocks))
    assert np.array_equal(np.delete(blocks.codes, 2, axis=0), np.delete(codes, 2, axis=0))
    wanted = (codes[2] * scales[2, 0]).astype(np.float64)
    error = float(((blocks.decode()[2] - wanted) ** 2).sum())
    assert error <= float((wanted**2).sum())
    assert factor < 5e-4 or error <= 0.2 * float((wanted**2).sum())


def test_each_matrix_has_its_codebook_and_threads_change_nothing() -> None:
    rng = np.random.default_rng(0)
    values = (0.05 * rng.standard_normal((3, 1500, 512)) * [[[1]], [[20]], [[0.5]]]).astype(np.float16)

    def quantize(values: np.ndarray, threads: int) -> np.ndarray:
        tensor = SourceTensor("blk.0.ffn_up_exps.weight", values.shape, Kind.MATRIX, lambda: values)
        with Workers(threads) as workers:
            return Uniform().quantize(tensor, values, 2, workers)

    together = quantize(values, 3)
    assert np.array_equal(together, np.concatenate([quantize(matrix, 1) for matrix in values]))
    codes = unpack(2, together.reshape(-1, BYTES_PER_BLOCK[2])).codes.reshape(values.shape)
    for matrix, found in zip(values, codes, strict=True):
        assert np.array_equal(encode(matrix.astype(np.float32), 2)[0], found)


@pytest.mark.build
def test_files(tmp_path: Path) -> None:
    base = to_f16_gguf(make_checkpoint(tmp_path / "tiny", "Mixtral"), tmp_path / "f16.gguf")
    prompt = "The capital of France is"
    wanted = logits(base, prompt)
    for depth in (2, 4):
        path = tmp_path / f"{depth}.gguf"
        done = tritconv("gguf-to-gguf", base, "--depth", depth, "--method", "uniform", "-o", path)
        assert done.returncode == 0, done.stderr
        model = read_model_file(path)
        assert model.metadata["trit.method"] == "uniform"
        assert all(t.type.name == f"TRIT{depth}" for t in model.tensors if "_exps" in t.name)
        assert np.corrcoef(wanted, logits(path, prompt))[0, 1] > {2: 0.75, 4: 0.95}[depth]
    source = {t.name: t.data for t in GGUFReader(base).tensors}["blk.0.attn_v.weight"].astype(np.float32)
    stored = {t.name: t.data for t in GGUFReader(path).tensors}["blk.0.attn_v.weight"]
    codes = unpack(4, np.asarray(stored).reshape(-1, BYTES_PER_BLOCK[4])).codes.reshape(source.shape)
    assert np.array_equal(codes, encode(source, 4)[0])
