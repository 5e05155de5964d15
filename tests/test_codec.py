"""Blocks to words and back; the Python codec and the reference in C are the same, bit for bit."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import ggml
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import blocks

from tritcore.codec import Blocks, invalid_blocks, pack, unpack, validate
from tritcore.errors import TritError
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS, WORDS_PER_BLOCK

pytestmark = pytest.mark.build


@given(blocks())
def test_round_trip(original: Blocks) -> None:
    data = pack(original)
    assert data.shape == (len(original.codes), BYTES_PER_BLOCK[original.depth])
    validate(original.depth, data)
    got = unpack(original.depth, data)
    assert np.array_equal(got.codes, original.codes)
    assert np.array_equal(got.scales, original.scales)


@given(blocks())
def test_weights_equal_those_of_c(original: Blocks) -> None:
    data = pack(original)
    assert ggml.validate(original.depth, data)
    assert ggml.dequantize(original.depth, data).tobytes() == original.decode().tobytes()


@given(st.sampled_from(DEPTHS), st.randoms(use_true_random=False), st.integers(1, 4))
def test_any_words_are_judged_and_read_as_in_c(depth: int, random: Random, n: int) -> None:
    data = np.frombuffer(random.randbytes(n * BYTES_PER_BLOCK[depth]), dtype=np.uint8).reshape(n, -1)
    valid = True
    try:
        validate(depth, data)
    except TritError:
        valid = False
    assert ggml.validate(depth, data) == valid
    assert ggml.dequantize(depth, data).tobytes() == unpack(depth, data).decode().tobytes()


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_word_is_read_as_in_c_and_stays_within_bounds(depth: int) -> None:
    """In each place of a block, valid or not."""
    words = np.arange(65536)[:, None] + 1009 * np.arange(WORDS_PER_BLOCK[depth])
    data = words.astype("<u2").view(np.uint8)
    got = unpack(depth, data)
    assert got.scales.max() <= 26
    assert (got.codes.min(), got.codes.max()) == (-CODE_MAX[depth], CODE_MAX[depth])
    assert ggml.dequantize(depth, data).tobytes() == got.decode().tobytes()


def test_every_word_value() -> None:
    words = np.arange(65536, dtype="<u2")
    # all ten trits of TRIT1's first word matter: eight codes and the upper trits of a scale index
    data = np.repeat(words[:, None], 8, axis=1).view(np.uint8)
    back = pack(unpack(1, data)).view("<u2")
    encodings = {(v * 65536 + 59048) // 59049 for v in range(59049)}
    assert [int(w) in encodings for w in words] == (back[:, 0] == words).tolist()


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Leave out what C says of each invalid block."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.mark.parametrize(
    ("depth", "place"), [(1, 0), (1, 4), (1, 7), (2, 0), (2, 13), (3, 0), (3, 16), (3, 19), (3, 20), (4, 0), (4, 26)]
)
def test_c_takes_the_blocks_that_survive_a_round_trip(depth: int, place: int) -> None:
    """Every word in the place of each kind: with reserved trits and without."""
    block = pack(Blocks(depth, np.zeros((1, 64), np.int8), np.full((1, 4), 13, np.uint8))).view("<u2")
    words = np.repeat(block, 65536, axis=0)
    words[:, place] = np.arange(65536)
    data = words.view(np.uint8)
    survives = (pack(unpack(depth, data)) == data).all(axis=1)
    assert ggml.validate(depth, data[survives])
    with _no_stderr():
        assert not any(ggml.validate(depth, one) for one in data[~survives])


@pytest.mark.parametrize("wrong", [0, 63, 64, 130, 199])
@pytest.mark.parametrize("depth", DEPTHS)
def test_c_names_the_block(depth: int, wrong: int, capfd: pytest.CaptureFixture[str]) -> None:
    data = pack(Blocks(depth, np.zeros((200, 64), np.int8), np.full((200, 4), 13, np.uint8)))
    assert ggml.validate(depth, data)
    data.view("<u2")[wrong:, -1] = 1
    assert not ggml.validate(depth, data)
    assert f"block {wrong} is not TRIT{depth} data" in capfd.readouterr().err


# (word, trit) of each depth
RESERVED = {
    1: [(4, 9), (5, 9), (6, 9), (7, 9)],
    2: [],
    3: [(16, 9), (17, 9), (18, 9), (19, 9), (20, 8), (20, 9)],
    4: [(26, 8), (26, 9)],
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_validation_is_the_round_trip(depth: int) -> None:
    """All 65536 values of a word, in a block that is valid otherwise."""
    rng = np.random.default_rng(depth)
    valid = pack(unpack(depth, rng.integers(0, 256, (1, BYTES_PER_BLOCK[depth]), dtype=np.uint8))).view("<u2")
    blocks = np.repeat(valid, 65536, axis=0)
    n_words = WORDS_PER_BLOCK[depth]
    for word in {0, n_words // 2, n_words - 1, *(word for word, _ in RESERVED[depth])}:
        blocks[:, word] = np.arange(65536)
        data = blocks.view(np.uint8)
        survives = (pack(unpack(depth, data)) == data).all(axis=1)
        assert np.array_equal(invalid_blocks(depth, data), np.flatnonzero(~survives))
        assert 0 < survives.sum() < 65536
        blocks[:, word] = valid[0, word]


@pytest.mark.parametrize("depth", DEPTHS)
def test_reserved_trits(depth: int) -> None:
    """A trit that holds nothing must be 1; any other may change."""
    data = pack(Blocks(depth, np.zeros((1, 64), np.int8), np.full((1, 4), 13, np.uint8)))
    assert ggml.validate(depth, data)
    for word, trit in itertools.product(range(WORDS_PER_BLOCK[depth]), range(10)):
        words = data.view("<u2").copy()
        v = 3**10 // 2 + 3 ** (9 - trit)  # ten trits of 1, as all of this block is, but for one that is now 2
        words[0, word] = (v * 65536 + 59048) // 59049
        changed = words.view(np.uint8)
        if (word, trit) in RESERVED[depth]:
            assert not ggml.validate(depth, changed)
            with pytest.raises(TritError, match="block 0 is not"):
                validate(depth, changed)
        else:
            assert ggml.validate(depth, changed)
            validate(depth, changed)
