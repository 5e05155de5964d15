"""TRIT blocks: from codes and scale indexes to words and back, and to weights.

The twin of ggml-trit.c in the patch; the two agree bit for bit. docs/format.md describes the layout.
"""

from dataclasses import dataclass

import numpy as np

from tritconv.errors import TritError
from tritconv.format import (
    BLOCK_SIZE,
    GROUP_SIZE,
    N_GROUPS,
    RATIO,
    RATIO_ONE,
    WORDS_PER_BLOCK,
    anchor,
)

_N_DIGITS = 5  # base-9 digits in a word
_RESERVED = 4  # value of the digits that hold nothing


@dataclass(frozen=True)
class Blocks:
    """Blocks as integers: weight i of a block is scale(group of i) * codes[i].

    codes: int8 (n, 64), |code| <= (3^depth - 1) / 2.
    scales: uint8 (n, 4), the scale indexes k_0..k_3, 0..26.
    """

    depth: int
    codes: np.ndarray
    scales: np.ndarray

    def group_scales(self) -> np.ndarray:
        """float32 (n, 4): the scale of each group, its anchor times its ratio."""
        k = self.scales.astype(np.int32)
        n = 3 * k[:, 0] + k[:, 1:].sum(axis=1) % 3
        ratio = RATIO[self.scales].astype(np.float32)
        ratio[:, 0] = RATIO_ONE
        return anchor(self.depth, n)[:, None] * ratio

    def decode(self) -> np.ndarray:
        """float32 (n, 64): the weights."""
        codes = self.codes.reshape(-1, N_GROUPS, GROUP_SIZE).astype(np.float32)
        return (self.group_scales()[:, :, None] * codes).reshape(-1, BLOCK_SIZE)


# Digit j of word l is slot 5 * l + j of a block.


def _slot(word: int, digit: int) -> int:
    return _N_DIGITS * word + digit


def _upper_slot(i: int) -> int:
    """TRIT2..TRIT4: the digit with the two upper trits of weight i."""
    if i < 40:
        return _slot(i % 8, i // 8)
    row, col = divmod(i - 40, 8)
    return _slot(8 + col, row) if col < 6 else _slot(8 + 2 * row + col - 6, 3)


def _lower_slot(i: int) -> int:
    """TRIT4: the digit with the two lower trits of weight i."""
    return _slot(14 + i % 8, i // 8) if i < 40 else _slot(22 + (i - 40) % 5, (i - 40) // 5)


def _pair_slot(depth: int, i: int) -> int:
    """TRIT1, TRIT3: the digit that pairs the last trit of weight i < 32 (high) with that of i + 32 (low)."""
    if depth == 1:
        return _slot(i % 8, i // 8)
    return _slot(14 + i % 8, i // 8) if i % 8 < 7 else _slot(14 + i // 8, 4)


_UPPER = np.array([_upper_slot(i) for i in range(64)])
_LOWER = np.array([_lower_slot(i) for i in range(64)])
_PAIR = {depth: np.array([_pair_slot(depth, i) for i in range(32)]) for depth in (1, 3)}
# the scale line: k_0..k_3 div 3, then the low trits of k_0 and k_1, of k_2 and k_3
_SCALE = {depth: np.array([_slot((0 if depth == 1 else 8) + i, 4) for i in range(6)]) for depth in (1, 2, 3, 4)}
# what a code is split by: the weight of the upper trits
_RADIX = {1: 3, 2: 1, 3: 3, 4: 9}


def pack(blocks: Blocks) -> np.ndarray:
    """Words of blocks.

    Returns:
        uint8 (n, bytes per block): little-endian 16-bit words.
    """
    depth, radix = blocks.depth, _RADIX[blocks.depth]
    digits = np.full((len(blocks.codes), WORDS_PER_BLOCK[depth] * _N_DIGITS), _RESERVED, dtype=np.uint8)

    codes = blocks.codes.astype(np.int16)
    upper = (codes + radix // 2) // radix
    lower = codes - radix * upper
    if depth > 1:
        digits[:, _UPPER] = upper + 4
    if depth == 4:
        digits[:, _LOWER] = lower + 4
    if depth in _PAIR:
        digits[:, _PAIR[depth]] = 3 * (lower[:, :32] + 1) + lower[:, 32:] + 1

    high, low = np.divmod(blocks.scales, 3)
    digits[:, _SCALE[depth][:4]] = high
    digits[:, _SCALE[depth][4:]] = 3 * low[:, 0::2] + low[:, 1::2]

    v = np.zeros((len(digits), WORDS_PER_BLOCK[depth]), dtype=np.uint32)
    for j in range(_N_DIGITS):
        v = 9 * v + digits[:, j::_N_DIGITS]
    # a fixed-point fraction of 9^5, rounded up: digit j is then (q * 9^j mod 2^16) * 9 / 2^16
    words = (v * np.uint32(65536) + np.uint32(59048)) // np.uint32(59049)
    return words.astype("<u2").view(np.uint8)


def unpack(depth: int, data: np.ndarray) -> Blocks:
    """Blocks of words, the inverse of `pack`. Words that no `pack` makes give some valid blocks: see `validate`.

    Args:
        data: uint8 (n, bytes per block).
    """
    words = np.ascontiguousarray(data).view("<u2").astype(np.uint32)
    digits = np.empty((len(words), words.shape[1] * _N_DIGITS), dtype=np.int8)
    for j in range(_N_DIGITS):
        words = 9 * words
        digits[:, j::_N_DIGITS] = words >> 16
        words &= 0xFFFF

    codes = np.zeros((len(digits), BLOCK_SIZE), dtype=np.int8)
    if depth > 1:
        codes = digits[:, _UPPER] - 4
    if depth == 4:
        codes = 9 * codes + digits[:, _LOWER] - 4
    if depth in _PAIR:
        high, low = np.divmod(digits[:, _PAIR[depth]], 3)
        codes = 3 * codes + np.concatenate([high, low], axis=1) - 1

    line = digits[:, _SCALE[depth]]
    high, low = np.divmod(line[:, 4:], 3)
    scales = 3 * line[:, :4] + np.stack([high, low], axis=2).reshape(-1, N_GROUPS)
    return Blocks(depth, codes.astype(np.int8), scales.astype(np.uint8))


def validate(depth: int, data: np.ndarray) -> None:
    """Check that words are what `pack` makes.

    Args:
        data: uint8 (n, bytes per block).

    Raises:
        TritError: a word is not an encoding, or a reserved digit is not as the format has it.
    """
    wrong = np.flatnonzero((pack(unpack(depth, data)) != data).any(axis=1))
    if len(wrong):
        raise TritError(f"block {wrong[0]} is not TRIT{depth} data: the file is damaged")
