"""The dot products of ggml-cpu: the vector code equals the scalar reference, and both the definition."""

import mmap

import ggml
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks

from tritcore.codec import Blocks, pack
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS, RATIO, RATIO_ONE

pytestmark = pytest.mark.build

VARIANTS = ggml.runnable()


def _activations(seed: int, n_blocks: int, extreme: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, (2 * n_blocks, 32)).astype(np.int8)
    if extreme:
        values = rng.choice(np.array([-127, 127], np.int8), values.shape)
    return rng.uniform(1e-4, 2, 2 * n_blocks).astype(np.float16), values


def _integer_sums(weights: Blocks, values: np.ndarray) -> np.ndarray:
    """int64 (n, 2): sums of code * ratio * activation over the halves of each block."""
    ratio = RATIO[weights.scales].astype(np.int64)
    ratio[:, 0] = RATIO_ONE
    products = weights.codes.astype(np.int64) * values.reshape(-1, 64) * np.repeat(ratio, 16, axis=1)
    return products.reshape(-1, 2, 32).sum(axis=2)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None)
@given(blocks(max_blocks=9), st.integers(0, 2**32 - 1), st.booleans())
def test_dot_product(variant: str, weights: Blocks, seed: int, extreme: bool) -> None:
    depth, data = weights.depth, pack(weights)
    scales, values = _activations(seed, len(data), extreme)
    y = ggml.q8_0(scales, values)
    got = ggml.vec_dot(depth, data, y, variant=variant)

    exact = weights.decode().astype(np.float64) * (scales[:, None].astype(np.float64) * values).reshape(-1, 64)
    generic = ggml.vec_dot(depth, data, y, generic=True, variant=variant)
    assert got == pytest.approx(generic, rel=1e-6, abs=1e-6 * np.abs(exact).sum())
    assert got == pytest.approx(exact.sum(), rel=1e-4, abs=1e-5 * np.abs(exact).sum())


# ratios that are multiples of 256, for sums that are
COARSE = np.array([k for k, ratio in enumerate(RATIO) if ratio % 256 == 0], np.uint8)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_integer_sums_are_exact(variant: str, generic: bool, depth: int) -> None:
    """Float rounding is less than one in the integer sum would be: few activations, or sums in steps of 256."""
    rng = np.random.default_rng(depth)
    top = CODE_MAX[depth]
    for trial in range(200):
        extreme = trial % 2 == 0
        if extreme:
            step, scales = 256, rng.choice(COARSE, (1, 4))
            codes = np.full((1, 64), top, np.int8) if trial % 4 else rng.choice(np.array([-top, top], np.int8), (1, 64))
            _, values = _activations(trial, 1, extreme=True)
            values[trial // 4 % 2] = 0
        else:
            step, scales = 1, rng.integers(0, 27, (1, 4)).astype(np.uint8)
            codes = rng.integers(-top, top + 1, (1, 64)).astype(np.int8)
            values = np.zeros((2, 32), np.int8)
            values.flat[rng.choice(64, 3, replace=False)] = rng.integers(-3, 4, 3)
        weights = Blocks(depth, codes, scales)
        anchor = float(weights.group_scales()[0, 0]) / RATIO_ONE
        rounding = 2.0**-23 * float(np.abs(weights.decode() * values.reshape(1, 64)).sum())
        assert rounding < 0.5 * step * anchor
        y = ggml.q8_0(np.ones(2, np.float16), values)
        got = ggml.vec_dot(depth, pack(weights), y, generic=generic, variant=variant)
        assert abs(got - anchor * int(_integer_sums(weights, values).sum())) <= rounding


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_read_past_the_end(variant: str, depth: int) -> None:
    """The last block lies at the end of a page that is followed by one that cannot be read."""
    libc = ggml.ctypes.CDLL(None, use_errno=True)
    size = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * size)
    address = ggml.ctypes.addressof(ggml.ctypes.c_char.from_buffer(pages))
    assert libc.mprotect(ggml.ctypes.c_void_p(address + size), ggml.ctypes.c_size_t(size), 0) == 0

    n = 3
    n_bytes = n * BYTES_PER_BLOCK[depth]
    data = np.frombuffer(pages, dtype=np.uint8, count=n_bytes, offset=size - n_bytes).reshape(n, -1)
    rng = np.random.default_rng(0)
    weights = Blocks(depth, rng.integers(-1, 2, (n, 64)).astype(np.int8), np.full((n, 4), 12, np.uint8))
    data[:] = pack(weights)
    scales, values = _activations(0, n, extreme=False)
    y = ggml.q8_0(scales, values)
    got = ggml.vec_dot(depth, data, y, variant=variant)
    assert got == pytest.approx(ggml.vec_dot(depth, data.copy(), y, generic=True, variant=variant), rel=1e-5)
