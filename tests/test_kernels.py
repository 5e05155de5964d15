"""The dot products of ggml-cpu: the vector code equals the scalar reference, and both the definition."""

import mmap

import ggml
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks

from tritconv.codec import Blocks, pack
from tritconv.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS, RATIO, RATIO_ONE


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


@settings(deadline=None)
@given(blocks(max_blocks=9), st.integers(0, 2**32 - 1), st.booleans())
def test_dot_product(weights: Blocks, seed: int, extreme: bool) -> None:
    depth, data = weights.depth, pack(weights)
    scales, values = _activations(seed, len(data), extreme)
    y = ggml.q8_0(scales, values)
    got = ggml.vec_dot(depth, data, y)
    assert got == pytest.approx(ggml.vec_dot(depth, data, y, generic=True), rel=1e-6, abs=1e-6)

    exact = weights.decode().astype(np.float64) * (scales[:, None].astype(np.float64) * values).reshape(-1, 64)
    assert got == pytest.approx(exact.sum(), rel=1e-4, abs=1e-5 * np.abs(exact).sum())


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("generic", [False, True])
def test_integer_sums_are_exact(depth: int, generic: bool) -> None:
    """With one half of the activations zero and scales of one, the result is one integer sum, rounded once."""
    rng = np.random.default_rng(depth)
    top = CODE_MAX[depth]
    for trial in range(200):
        codes = rng.integers(-top, top + 1, (1, 64)).astype(np.int8)
        scales = rng.integers(0, 27, (1, 4)).astype(np.uint8)
        if trial % 4 == 0:
            codes = rng.choice(np.array([-top, top], np.int8), (1, 64))
            scales = rng.choice(np.array([0, 26], np.uint8), (1, 4))
        if trial == 0:
            codes, scales = np.full((1, 64), top, np.int8), np.array([[24, 0, 0, 0]], np.uint8)
        # an anchor that is a power of two times 3^(2 - depth): its product rounds as the sum does
        n_mod_6 = -(3 * int(scales[0, 0]) + int(scales[0, 1:].sum()) % 3) % 6
        scales[0, 0] = min(26, scales[0, 0] + n_mod_6 // 3)
        weights = Blocks(depth, codes, scales)
        _, values = _activations(trial, 1, extreme=trial % 4 == 0)
        values[trial % 2] = 0
        sums = _integer_sums(weights, values)
        anchor = weights.group_scales()[0, 0] / np.float32(RATIO_ONE)
        expected = anchor * np.float32(sums.sum())
        got = ggml.vec_dot(depth, pack(weights), ggml.q8_0(np.ones(2, np.float16), values), generic=generic)
        assert np.float32(got) == expected


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_read_past_the_end(depth: int) -> None:
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
    got = ggml.vec_dot(depth, data, y)
    assert got == pytest.approx(ggml.vec_dot(depth, data.copy(), y, generic=True), rel=1e-6)
