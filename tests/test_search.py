"""The search method: it finds the best scales and codes, and refuses what cannot be held."""

import hashlib
import itertools

import ggml
import numpy as np
import pytest
from checkpoints import SMOLLM2_GGUF
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import depths, weights

from tritconv.methods.search import quantize
from tritcore.codec import Blocks, unpack, validate
from tritcore.errors import NotFiniteError, RangeError
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS
from tritcore.gguf_header import read_model_file

pytestmark = pytest.mark.build

WEIGHTED_DEPTHS = (1, 2)  # few levels: without importances, large weights count for more


def search(w: np.ndarray, depth: int, importance: np.ndarray | None = None) -> Blocks:
    """Blocks of weights float32 (n, 64), each a row of its own."""
    data = quantize(w, depth, importance)
    validate(depth, data)
    return unpack(depth, data)


@settings(deadline=None)
@given(weights(), depths)
def test_rows_do_not_matter(w: np.ndarray, depth: int) -> None:
    """Where importances are given, or are all alike."""
    alike = np.ones(w.size, np.float32)
    as_rows, as_one_row = quantize(w, depth, alike[:64]), quantize(w.reshape(1, -1), depth, alike)
    assert np.array_equal(as_rows, as_one_row.reshape(-1, BYTES_PER_BLOCK[depth]))


@settings(deadline=None)
@given(weights(), st.sampled_from([d for d in DEPTHS if d not in WEIGHTED_DEPTHS]))
def test_equal_importances_are_none(w: np.ndarray, depth: int) -> None:
    assert np.array_equal(quantize(w, depth, np.ones(64, np.float32)), quantize(w, depth))


@settings(deadline=None)
@given(weights(), depths, st.integers(0, 2**32 - 1), st.sampled_from(["none", "equal", "unequal", "wild"]))
def test_all_kernels_find_what_the_search_of_single_blocks_finds(
    w: np.ndarray, depth: int, seed: int, weighted: str
) -> None:
    """Also where blocks are refused, errors are equal, and importances say nothing."""
    rng = np.random.default_rng(seed)
    w *= rng.choice(np.array([1, 1, 8], np.float32), (len(w), 1))  # above the range, some
    if seed % 3 == 0:
        w = w.round(2)  # equal errors
    if seed % 5 == 0:
        w[rng.random(w.shape) < 0.01] = rng.choice([np.nan, np.inf, -np.inf])
    q = np.exp(rng.standard_normal(w.shape)).astype(np.float32)
    if weighted == "wild":
        for value in (np.nan, np.inf, -np.inf, 3e38, 0):
            q[rng.random(w.shape) < 0.02] = value
    importance = {"none": None, "equal": np.ones_like(w)}.get(weighted, q)
    indexes, found = ggml.search(depth, w, importance, reference=True)
    for kernels in ggml.kernels():
        ggml.use_kernels(kernels)
        got, got_found = ggml.search(depth, w, importance)
        ggml.use_kernels(None)
        assert np.array_equal(got_found, found)
        assert np.array_equal(got[found], indexes[found])


@settings(deadline=None)
@given(weights(), depths)
def test_codes_are_the_nearest(w: np.ndarray, depth: int) -> None:
    got = search(w, depth)
    scale = np.repeat(got.group_scales(), 16, axis=1)
    at_most = scale * CODE_MAX[depth]
    assert (np.abs(got.decode() - np.clip(w, -at_most, at_most)) <= scale * 0.50001).all()


@settings(deadline=None)
@given(weights(), depths)
def test_no_weight_is_clipped_far(w: np.ndarray, depth: int) -> None:
    """Clipping is a choice of the search, worth it only for a few levels, not a limit of the codebook."""
    got = search(w, depth)
    reach = np.repeat(got.group_scales(), 16, axis=1) * CODE_MAX[depth]
    overshoot = np.abs(w) / reach
    assert overshoot.max() < {1: 4.0, 2: 2.2, 3: 1.8, 4: 1.6}[depth]


def _best_by_force(w: np.ndarray, depth: int, importance: np.ndarray) -> float:
    """Least squared error of one block over all anchors and scale indexes."""
    top = CODE_MAX[depth]
    errors = np.full((81, 4, 27), np.inf)
    for n in range(81):
        # a block with k_g in group g and the parity trit chosen to give anchor n
        for g, kg in itertools.product(range(4), range(27)):
            if g == 0 and kg:
                continue
            k = np.zeros((1, 4), dtype=np.uint8)
            k[0, 0] = n // 3
            k[0, max(g, 1)] = kg
            k[0, 1 + max(g, 1) % 3] = (n - kg) % 3
            scale = Blocks(depth, np.zeros((1, 64), np.int8), k).group_scales()[0, g]
            part = slice(16 * g, 16 * g + 16)
            codes = np.clip(np.rint(w[0, part] / scale), -top, top)
            errors[n, g, kg] = (((w[0, part] - codes * scale).astype(np.float64) ** 2) * importance[part]).sum()
    best = np.inf
    for n in range(81):
        for residues in itertools.product(range(3), repeat=2):
            r = (*residues, (n - sum(residues)) % 3)
            best = min(best, errors[n, 0, 0] + sum(errors[n, g, r[g - 1] :: 3].min() for g in (1, 2, 3)))
    return best


@pytest.mark.parametrize("depth", WEIGHTED_DEPTHS)
def test_large_weights_count_for_more(depth: int) -> None:
    """Without importances, at few levels: 2 + x^2 / sigma^2, sigma that of the row."""
    w = (np.random.default_rng(depth).standard_t(4, (20, 64)) * 0.1).astype(np.float32)
    for row in w[:, None]:
        own = 2 + row[0] ** 2 / np.float32((row.astype(np.float64) ** 2).mean())
        assert np.array_equal(quantize(row, depth), quantize(row, depth, own))
    alike = np.ones(64, np.float32)
    assert not np.array_equal(quantize(w, depth), quantize(w, depth, alike))
    # the deviation is the row's: small blocks beside large ones are not weighted as alone
    long = np.concatenate([w * np.float32(0.05), w], axis=1)
    sigma2 = np.float32((long[0].astype(np.float64) ** 2).mean())
    assert np.array_equal(quantize(long[:1], depth), quantize(long[:1], depth, 2 + long[0] ** 2 / sigma2))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
def test_near_the_best_of_all_scales(depth: int, weighted: bool) -> None:
    rng = np.random.default_rng(depth)
    found = forced = 0.0
    for _ in range(6):
        w = (rng.standard_normal((1, 64)) * 0.1 * np.exp(rng.standard_normal((1, 64)))).astype(np.float32)
        q = np.exp(rng.standard_normal(64)).astype(np.float32) if weighted else np.ones(64, np.float32)
        got = search(w, depth, q if weighted or depth in WEIGHTED_DEPTHS else None)
        error = float((((got.decode() - w).astype(np.float64) ** 2) * q).sum())
        best = _best_by_force(w, depth, q)
        assert error >= best * (1 - 1e-6)
        found, forced = found + error, forced + best
    assert found <= forced * 1.02


@pytest.mark.parametrize("depth", DEPTHS)
def test_importance_moves_the_error(depth: int) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((200, 64)).astype(np.float32)
    q = np.where(np.arange(64) % 2 == 0, 100, 1).astype(np.float32)
    plain = (search(w, depth).decode() - w) ** 2
    weighted = (search(w, depth, q).decode() - w) ** 2
    assert weighted[:, 0::2].sum() < plain[:, 0::2].sum()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 2.0**-26])
def test_zeros_and_denormals_are_zero(depth: int, value: float) -> None:
    w = np.full((3, 64), value, dtype=np.float32)
    got = search(w, depth)
    assert not got.decode().any()
    assert (got.scales == 13).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_greatest_weights(depth: int) -> None:
    greatest = 3.0 ** (2 - depth) * 8 * CODE_MAX[depth]
    w = np.full((1, 64), greatest, dtype=np.float32)
    assert np.allclose(search(w, depth).decode(), w)
    w[0, 16:] *= 4.48
    assert np.allclose(search(w, depth).decode(), w, rtol=0.05)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(depth: int, value: float) -> None:
    w = np.ones((5, 64), dtype=np.float32)
    w[3, 7] = value
    with pytest.raises(NotFiniteError) as caught:
        quantize(w, depth)
    assert caught.value.index == 3 * 64 + 7
    assert not ggml.validate(depth, ggml.quantize(depth, w))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("column", "value"), [(0, 40.0), (20, 200.0)])
def test_above_the_range(depth: int, column: int, value: float) -> None:
    w = np.ones((5, 64), dtype=np.float32)
    w[2, column] = value
    with pytest.raises(RangeError, match="above") as caught:
        quantize(w, depth)
    assert caught.value.block == 2
    assert not ggml.validate(depth, ggml.quantize(depth, w))


@pytest.mark.parametrize("depth", DEPTHS)
def test_nothing_but_a_refused_block_begins_with_a_word_of_one(depth: int) -> None:
    """That word is how `quantize` sees what the encoder refused: it is no encoding of trits."""
    encodings = {(v * 65536 + 59048) // 59049 for v in range(59049)}
    assert 1 not in encodings
    w = np.ones((2, 64), dtype=np.float32)
    w[1] = np.nan
    assert (ggml.quantize(depth, w).view("<u2")[:, 0] == 1).tolist() == [False, True]


# of the blocks of random weights and of a matrix of SmolLM2: the same bits on every platform, in every version
DIGESTS = {
    1: ("f9bdc8a6122d302b08eccad022c9ed5c", "64792090462d475fa229d2280e4d1d6d"),
    2: ("57bb7a6ef56baec61e68c3def49ef4c4", "ab90338fa73cd5c4a9ec0de5a8557d23"),
    3: ("6c4eafc714265773843f029b256dc882", "e6a2fc326dfc6650a8c940fde639b7c4"),
    4: ("817890ad85649cea07f9f71e9de965c6", "72add585e70c9f63d3a5992cf7eb954e"),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_blocks_within_the_range_stay_as_they_are(depth: int) -> None:
    rng = np.random.RandomState(0)  # whose numbers never change
    w = (rng.standard_normal((60, 512)) * 0.05).astype(np.float32)
    w[20:40] *= np.repeat(np.ldexp(1, rng.randint(-5, 8, (20, 32))), 16, axis=1).astype(np.float32)
    w[40:50] *= rng.random_sample((10, 512)) < 0.1
    w[50:, :64] = 0
    importance = np.ldexp(1, rng.randint(-6, 7, 512)).astype(np.float32)
    blocks = quantize(w, depth).tobytes() + quantize(w, depth, importance).tobytes()
    assert hashlib.sha256(blocks).hexdigest().startswith(DIGESTS[depth][0])


@pytest.mark.parametrize("depth", DEPTHS)
def test_blocks_of_a_real_matrix_stay_as_they_are(depth: int) -> None:
    model = read_model_file(SMOLLM2_GGUF)
    tensor = next(t for t in model.tensors if t.name == "blk.7.ffn_up.weight")
    data = np.fromfile(SMOLLM2_GGUF, np.uint8, tensor.n_bytes, offset=model.data_start + tensor.offset)
    rows = data.reshape(1536, -1)[:200]
    blocks = quantize(quants.dequantize(rows, tensor.type), depth).tobytes()
    assert hashlib.sha256(blocks).hexdigest().startswith(DIGESTS[depth][1])


@settings(deadline=None)
@given(weights(), depths)
def test_as_gguf_registers_it(w: np.ndarray, depth: int) -> None:
    from tritcore.gguf_types import TRIT_TYPE

    data = quants.quantize(w, TRIT_TYPE[depth])
    assert np.array_equal(data, quantize(w, depth))
    assert np.array_equal(quants.dequantize(data, TRIT_TYPE[depth]), search(w, depth).decode())
