"""Hypothesis strategies for TRIT blocks and for weights."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tritcore.codec import Blocks
from tritcore.format import BLOCK_SIZE, CODE_MAX, DEPTHS, N_GROUPS, N_SCALES

depths = st.sampled_from(DEPTHS)


@st.composite
def blocks(draw: st.DrawFn, max_blocks: int = 8) -> Blocks:
    """Any blocks; the extremes of codes and scale indexes come up often."""
    depth = draw(depths)
    n = draw(st.integers(1, max_blocks))
    top = CODE_MAX[depth]
    code = st.integers(-top, top) | st.sampled_from([-top, top])
    scale = st.integers(0, N_SCALES - 1) | st.sampled_from([0, N_SCALES - 1])
    codes = draw(hnp.arrays(np.int8, (n, BLOCK_SIZE), elements=code))
    scales = draw(hnp.arrays(np.uint8, (n, N_GROUPS), elements=scale))
    return Blocks(depth, codes, scales)


def some_weights(kind: str, seed: int, n: int, size: float) -> np.ndarray:
    """float32 (n, 64), of one of `KINDS`: weights that every TRIT type can hold."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((n, BLOCK_SIZE)) * size).astype(np.float32)
    if kind == "heavy tails":
        w *= np.exp(rng.standard_normal(w.shape)).astype(np.float32)
    elif kind == "sparse":
        w *= rng.random(w.shape) < 0.1
    elif kind == "constant":
        w[:] = w[:, :1]
    elif kind == "single outlier":
        w *= np.float32(1e-3)
        w[np.arange(n), rng.integers(0, BLOCK_SIZE, n)] = size
    elif kind == "groups of all sizes":
        spread = np.exp2(rng.uniform(-12, 0, (n, N_GROUPS))).astype(np.float32)
        w *= np.repeat(spread, BLOCK_SIZE // N_GROUPS, axis=1)
    elif kind == "blocks of all sizes":
        w = np.ldexp(w, rng.integers(-150, 1, (n, 1))).astype(np.float32)
    elif kind == "some groups zero":
        w *= np.repeat(rng.random((n, N_GROUPS)) < 0.5, BLOCK_SIZE // N_GROUPS, axis=1)
    return np.clip(w, -24, 24).astype(np.float32)


KINDS = (
    "normal",
    "heavy tails",
    "sparse",
    "constant",
    "single outlier",
    "groups of all sizes",
    "blocks of all sizes",
    "some groups zero",
)


@st.composite
def weights(draw: st.DrawFn, max_blocks: int = 40) -> np.ndarray:
    """float32 (n, 64): weights that every TRIT type can hold."""
    return some_weights(
        draw(st.sampled_from(KINDS)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, max_blocks)),
        draw(st.sampled_from([0.02, 0.3, 5.0])),
    )
