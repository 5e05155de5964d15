"""Blocks to words and back; the Python codec and the reference in C are the same, bit for bit."""

from random import Random

import ggml
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import blocks

from tritconv.codec import Blocks, pack, unpack, validate
from tritconv.errors import TritError
from tritconv.format import BYTES_PER_BLOCK, DEPTHS


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


def test_every_word_value() -> None:
    words = np.arange(65536, dtype="<u2")
    # all five digits of a word of TRIT1 matter, the scale line and the reserved lanes included
    data = np.repeat(words[:, None], 8, axis=1).view(np.uint8)
    back = pack(unpack(1, data)).view("<u2")
    encodings = {(v * 65536 + 59048) // 59049 for v in range(59049)}
    assert [int(w) in encodings for w in words] == (back[:, 0] == words).tolist()


@pytest.mark.parametrize(("depth", "word", "digit"), [(1, 6, 4), (1, 7, 4), (3, 18, 4), (3, 20, 4), (4, 26, 4)])
def test_reserved_digits(depth: int, word: int, digit: int) -> None:
    data = pack(Blocks(depth, np.zeros((1, 64), np.int8), np.full((1, 4), 13, np.uint8)))
    assert ggml.validate(depth, data)
    words = data.view("<u2").copy()
    v = int(words[0, word]) * 59049 // 65536 + 9 ** (4 - digit)  # the digit is one larger
    words[0, word] = (v * 65536 + 59048) // 59049
    assert not ggml.validate(depth, words.view(np.uint8))
    with pytest.raises(TritError, match="block 0 is not"):
        validate(depth, words.view(np.uint8))
