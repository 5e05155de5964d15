"""Blocks below the codebook's range get the least anchor; only a tensor that is small as a whole is refused."""

import itertools
import re

import ggml as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import depths
from tensors import blocks_of, finish

from tritconv.methods import Quantizer, search
from tritconv.methods.uniform import Uniform
from tritcore import encoder, ggml
from tritcore.codec import Blocks, unpack, validate
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS, ZERO, anchor

pytestmark = pytest.mark.build

USUAL_LOSS = {1: 0.166, 2: 0.0195, 3: 0.0022, 4: 0.00025}  # as docs/reference/format.md has it
ALIKE = np.ones(64, np.float32)


def least(depth: int) -> float:
    """What the largest weight of a block must reach, or the block is below the range."""
    return float(3.0 ** (2 - depth) * 2 ** (3 - 80 / 6) * CODE_MAX[depth])


def stored(w: np.ndarray, depth: int, importance: np.ndarray | None = ALIKE) -> Blocks:
    """Blocks of weights float32 (n, 64), by the search, each a row of its own."""
    data = encoder.quantize(w, depth, importance)
    validate(depth, data)
    assert reference.validate(depth, data)
    return unpack(depth, data)


def normal(seed: int, shape: tuple[int, ...], size: float) -> np.ndarray:
    """float32: weights of a normal distribution."""
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def _best_at_the_least_anchor(w: np.ndarray, depth: int) -> float:
    """The least squared error of a block, float64 (64,), over all indexes and codes with the anchor 80."""
    top = CODE_MAX[depth]
    ratios = np.rint(1024 * np.exp2((13 - np.arange(27)) / 6))
    scales = float(anchor(depth, np.array(80))) * np.concatenate([[1024], ratios])
    codes = np.clip(np.rint(w.reshape(4, 1, 16) / scales[:, None]), -top, top)
    error = ((w.reshape(4, 1, 16) - codes * scales[:, None]) ** 2).sum(axis=2)
    classes = [[error[g, 1 + r :: 3].min() for r in range(3)] for g in range(4)]
    residues = (r for r in itertools.product(range(3), repeat=3) if sum(r) % 3 == 80 % 3)
    return float(error[0, 0] + min(sum(classes[g + 1][r] for g, r in enumerate(some)) for some in residues))


@settings(deadline=None)
@given(depths, st.integers(0, 2**32 - 1), st.floats(-149, -1), st.booleans())
def test_as_well_as_the_least_anchor_can(depth: int, seed: int, exponent: float, groups_alike: bool) -> None:
    w = normal(seed, (1, 64), 1)
    if not groups_alike:
        w *= np.repeat(np.exp2(np.random.default_rng(seed).uniform(-6, 0, (1, 4))), 16, axis=1).astype(np.float32)
    w = (w / np.abs(w).max() * 0.88 * least(depth) * np.exp2(exponent + 1)).astype(np.float32)
    got = stored(w, depth)
    exact = w[0].astype(np.float64)
    error = float(((got.decode()[0] - exact) ** 2).sum())
    as_zeros = np.where((np.abs(exact.reshape(4, 16)).max(axis=1) < ZERO).repeat(16), 0, exact)
    lost = float(((exact - as_zeros) ** 2).sum())
    assert error <= _best_at_the_least_anchor(as_zeros, depth) * 1.02 + lost + 1e-20
    assert error <= float((exact**2).sum()) * (1 + 1e-6)


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_magnitude_is_refused(depth: int) -> None:
    """From the least subnormal to the greatest weight, of either sign, zeros of either sign in between."""
    w = np.ldexp(np.float32(1), np.arange(-149, 5)).astype(np.float32)[:, None] * np.ones(64, np.float32)
    w[:, 1::3] *= -1
    w[:, 2::7] = -0.0
    got = stored(w, depth, None)
    lost = np.abs(got.decode() - w).max(axis=1)
    assert (lost <= np.maximum(0.13 * w[:, 0], np.minimum(w[:, 0], least(depth)))).all()
    assert not got.decode()[w[:, 0] < 1e-6].any()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("size", [0.05, 1e-3, 1e-5, 1e-20])
@pytest.mark.parametrize("importance", [0.0, 1e-45, 1e-30, 1e38, np.inf, np.nan])
def test_no_importance_makes_a_block_refused(importance: float, size: float, depth: int) -> None:
    w = normal(0, (4, 64), size)
    decoded = stored(w, depth, np.full(64, importance, np.float32)).decode()
    assert ((decoded - w) ** 2).sum() <= 1.1 * (w**2).sum()
    if not np.isfinite(importance):
        assert np.array_equal(decoded, stored(w, depth, ALIKE).decode())


def _excess(w: np.ndarray, depth: int) -> float:
    """The rule of docs/reference/format.md: excess over u_d * S, of float32 (blocks, 64)."""
    exact = w.astype(np.float64)
    energy = (exact**2).sum(axis=1)
    largest = np.abs(w).max(axis=1)
    below = (largest >= ZERO) & (largest < np.float32(least(depth)))
    error = ((stored(w, depth).decode() - exact) ** 2).sum(axis=1)
    loss = USUAL_LOSS[depth]
    return float(np.maximum(error - loss * energy, 0)[below].sum() / (loss * energy.sum()))


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_rule(depth: int) -> None:
    seen = set()
    for step, share in itertools.product(range(14), (0.002, 0.03, 0.3, 1.0)):
        size = 0.02 * 0.6**step
        w = normal(step, (1000, 64), 0.02)
        w[: round(1000 * share)] = normal(step, (round(1000 * share), 64), size)
        expected = _excess(w, depth)
        part = ggml.measure_reach(w, depth)
        assert part.excess / (USUAL_LOSS[depth] * part.energy) == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert encoder.reaches(w.reshape(10, -1), depth) == (expected <= 0.01)
        seen.add((share, expected <= 0.01))
    assert {(1.0, True), (1.0, False), (0.3, True)} <= seen
    assert (0.002, False) not in seen


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_usual_loss_is_that_of_normally_distributed_weights(depth: int) -> None:
    w = normal(1, (4000, 64), 0.02)
    error = ((stored(w, depth).decode() - w).astype(np.float64) ** 2).sum()
    assert error / (w.astype(np.float64) ** 2).sum() == pytest.approx(USUAL_LOSS[depth], rel=0.03)


@pytest.mark.parametrize("values", [np.zeros((4, 64)), np.full((4, 64), -0.0), np.full((4, 64), 1e-30)])
def test_zeros_are_not_too_small(values: np.ndarray) -> None:
    assert all(encoder.reaches(values.astype(np.float32), depth) for depth in DEPTHS)


def planted(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Weights (.., rows, n) with small and zero blocks and rows in them: a third of all rows have some."""
    rng = np.random.default_rng(seed)
    rows = values.reshape(-1, values.shape[-1]).copy()
    for row in rng.permutation(len(rows))[: len(rows) // 3]:
        factor = rng.choice([0, 2.0**-5, 2.0**-9, 2.0**-14, 2.0**-20])
        block = 64 * rng.integers(values.shape[-1] // 64)
        part = slice(None) if rng.random() < 0.2 else slice(block, block + 64)
        rows[row, part] = rows[row, part].astype(np.float32) * factor
    return rows.reshape(values.shape)


@pytest.mark.parametrize("quantizer", [search.Search(), Uniform()], ids=lambda quantizer: quantizer.name)
@pytest.mark.parametrize("depth", DEPTHS)
def test_planted_blocks_are_stored(depth: int, quantizer: Quantizer) -> None:
    values = planted(normal(0, (600, 1024), 0.02))
    data = blocks_of(values, depth, quantizer, 1)
    blocks = data.reshape(-1, BYTES_PER_BLOCK[depth])
    validate(depth, blocks)
    assert np.array_equal(data, blocks_of(values, depth, quantizer, 3))
    decoded = unpack(depth, blocks).decode().reshape(values.shape)
    # small blocks cost next to nothing: the error is that of the others
    exact = values.reshape(-1, 64)
    small = np.abs(exact).max(axis=1) < least(depth)
    assert 0.05 < small.mean() < 0.4
    error = ((decoded.reshape(-1, 64) - exact).astype(np.float64) ** 2).sum(axis=1)
    assert error[small].sum() <= 0.01 * error.sum()


@pytest.mark.parametrize("quantizer", [search.Search(), Uniform()], ids=lambda quantizer: quantizer.name)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_tensor_that_is_small_as_a_whole_is_refused(dtype: type, depth: int, quantizer: Quantizer) -> None:
    values: np.ndarray = normal(0, (600, 1024), 1e-4).astype(dtype)
    values[:300, :128] = 0
    found, _ = finish(values, depth, quantizer)
    assert found.blocks is None
    assert re.match(r"block 2: largest weight .* is below the range .* too much of the tensor", found.reason or "")


def test_small_blocks_of_a_lattice_are_searched() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-4, 5, (64 * 4, 64))
    small = rng.random(64 * 4) < 0.1
    blocks = (codes * np.where(small, 2.0**-14, 2.0**-7)[:, None]).astype(np.float32)
    found, remarks = finish(blocks.reshape(64, 256), 2)
    assert found.imported
    assert found.blocks is not None
    assert "100.0% of the groups, 0.0% off at worst" in remarks[0]
    decoded = unpack(2, found.blocks.reshape(-1, BYTES_PER_BLOCK[2])).decode()
    assert np.array_equal(decoded[~small], blocks[~small])
    assert np.array_equal(decoded[small], stored(blocks[small], 2).decode())


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_expert_that_hardly_does_anything_is_stored_with_the_others(depth: int) -> None:
    values = normal(0, (8, 128, 256), 0.02)
    values[3] *= np.float32(1e-3)
    validate(depth, blocks_of(values, depth).reshape(-1, BYTES_PER_BLOCK[depth]))
    assert not encoder.reaches(values[3], depth)
