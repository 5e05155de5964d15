"""TRIT blocks: codes and scale indexes to words and back, and to weights.

ggml-trit.c in the patch has the same functions in C; the results are equal bit for bit. docs/reference/format.md
describes the layout.
"""

from dataclasses import dataclass

import numpy as np

from tritcore.errors import TritError
from tritcore.format import (
    BLOCK_SIZE,
    CODE_MAX,
    CODES_PER_WORD,
    DEPTHS,
    GROUP_SIZE,
    N_GROUPS,
    QUADS,
    RATIO,
    RATIO_ONE,
    RESERVED,
    TRITS_PER_WORD,
    WORDS_PER_BLOCK,
    anchor,
)

_V_RANGE = 3**TRITS_PER_WORD  # values of a word
_AT_ONCE = 2048  # blocks that are validated together: they and what is computed of them fit into a core's cache


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


# Trit j of word l, the first the most significant, is slot 10 * l + j of a block.


def _slot(word: int, trit: int) -> int:
    return TRITS_PER_WORD * word + trit


def _weight_slot(depth: int, i: int, s: int) -> int:
    """The slot of trit s of weight i. Words stand in quads; a quad holds four weights at a time, one in each lane."""
    quad, rest = divmod(i, 4 * CODES_PER_WORD[depth])
    lane = i % 4
    if quad < QUADS[depth]:
        return _slot(4 * quad + lane, depth * (rest // 4) + s)
    if depth == 2:
        return _slot(12 + lane // 2, 2 * (lane % 2) + s)
    if depth == 3:
        return _slot(20, 2 * lane + s) if s < 2 else _slot(12 + lane, 9)
    if i < 60:
        return _slot(8 * ((i - 48) // 4) + 4 * (s // 2) + lane, 8 + s % 2)
    return _slot(24 + lane // 2, s) if lane % 2 == 0 else _slot(26, 4 * (lane // 2) + s)


def _scale_slot(depth: int, g: int, s: int) -> int:
    """The slot of trit s of the scale index of group g."""
    if depth == 1:
        return _slot(g, 8 + s) if s < 2 else _slot(4 + g, 8)
    if depth == 3:
        return _slot(4 * s + g, 9)
    return _slot((12 if depth == 2 else 24) + g // 2, 4 + 3 * (g % 2) + s)


# slots of trit s, most significant first: (depth, 64) and (3, 4)
_WEIGHT_SLOTS = {d: np.array([[_weight_slot(d, i, s) for i in range(BLOCK_SIZE)] for s in range(d)]) for d in DEPTHS}
_SCALE_SLOTS = {d: np.array([[_scale_slot(d, g, s) for g in range(N_GROUPS)] for s in range(3)]) for d in DEPTHS}


def _reserved_fields(depth: int) -> np.ndarray:
    """Constants to check that reserved trits are 1: q * factor - low, modulo 2^16, has to be less than width.

    The n reserved trits of a word are its last ones, a field with the value (3^n - 1) / 2.

    Returns:
        uint16 (3, words of `_AT_ONCE` blocks): factor, low and width for each word.
    """
    used = {*_WEIGHT_SLOTS[depth].flat, *_SCALE_SLOTS[depth].flat}
    fields = []
    for word in range(WORDS_PER_BLOCK[depth]):
        n = sum(_slot(word, trit) not in used for trit in range(TRITS_PER_WORD))
        value = RESERVED * (3**n - 1) // 2
        low, end = (-(-(v << 16) // 3**n) for v in (value, value + 1))
        fields.append((3 ** (TRITS_PER_WORD - n), low, end - low) if n else (0, 0, 1))
    return np.tile(np.array(fields, np.uint16).T, _AT_ONCE)


_RESERVED_FIELDS = {depth: _reserved_fields(depth) for depth in DEPTHS}
_WITH_RESERVED = [depth for depth in DEPTHS if _RESERVED_FIELDS[depth][0].any()]


def _put(trits: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
    """Write values uint8 (m, n) to the slots (trits per value, m) of trits uint8 (slots per block, n)."""
    for row in slots[::-1]:
        rest = values // 3
        trits[row] = values - 3 * rest
        values = rest


def _get(trits: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Read the values of slots; the inverse of `_put`."""
    values = trits[slots[0]]
    for row in slots[1:]:
        values = 3 * values + trits[row]
    return values


def pack(blocks: Blocks) -> np.ndarray:
    """Pack blocks into words.

    Returns:
        uint8 (n, bytes per block): little-endian 16-bit words.
    """
    depth, n_words = blocks.depth, WORDS_PER_BLOCK[blocks.depth]
    # a row for each slot, so that picking slots moves whole rows
    trits = np.full((n_words * TRITS_PER_WORD, len(blocks.codes)), RESERVED, dtype=np.uint8)
    _put(trits, _WEIGHT_SLOTS[depth], (blocks.codes.T + np.int8(CODE_MAX[depth])).view(np.uint8))
    _put(trits, _SCALE_SLOTS[depth], blocks.scales.T)

    v = np.zeros((n_words, trits.shape[1]), dtype=np.uint32)
    for j in range(TRITS_PER_WORD):
        v = 3 * v + trits[j::TRITS_PER_WORD]
    # a fixed-point fraction of 3^10, rounded up: the n trits from trit j on are (q * 3^j mod 2^16) * 3^n / 2^16
    words = (v * np.uint32(65536) + np.uint32(59048)) // np.uint32(59049)
    return np.ascontiguousarray(words.T, dtype="<u2").view(np.uint8)


def unpack(depth: int, data: np.ndarray) -> Blocks:
    """Unpack words into blocks; the inverse of `pack`. Invalid words give some valid block: see `validate`.

    Args:
        data: uint8 (n, bytes per block).
    """
    words = np.ascontiguousarray(np.ascontiguousarray(data).view("<u2").T, dtype=np.uint32)
    trits = np.empty((len(words) * TRITS_PER_WORD, words.shape[1]), dtype=np.uint8)
    for j in range(TRITS_PER_WORD):
        words = 3 * words
        trits[j::TRITS_PER_WORD] = words >> 16
        words &= 0xFFFF

    codes = _get(trits, _WEIGHT_SLOTS[depth]).view(np.int8) - np.int8(CODE_MAX[depth])
    scales = _get(trits, _SCALE_SLOTS[depth])
    return Blocks(depth, np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T))


def validate(depth: int, data: np.ndarray) -> None:
    """Check that `pack` can have made these words.

    Args:
        data: uint8 (n, bytes per block).

    Raises:
        TritError: a word is no encoding, or a reserved trit has another value than the format prescribes.
    """
    wrong = invalid_blocks(depth, data)
    if len(wrong):
        raise TritError(f"block {wrong[0]} is not TRIT{depth} data: the file is damaged")


def invalid_blocks(depth: int, data: np.ndarray) -> np.ndarray:
    """Find invalid blocks: a word is no encoding, or a reserved trit has another value than the format prescribes.

    Args:
        data: uint8 (n, bytes per block).

    Returns:
        int64 (m,): their indexes, in order.
    """
    n_words = WORDS_PER_BLOCK[depth]
    words = np.ascontiguousarray(data).view("<u2").reshape(-1)
    factor, low, width = _RESERVED_FIELDS[depth]
    wrong = []
    for first in range(0, len(data), _AT_ONCE):
        q = words[first * n_words : (first + _AT_ONCE) * n_words]
        # v encodes as q with q * 59049 = v * 65536 + r, 0 <= r < 59049; any other word leaves a greater r
        valid = q * np.uint16(_V_RANGE) < np.uint16(_V_RANGE)
        if depth in _WITH_RESERVED:
            valid &= q * factor[: len(q)] - low[: len(q)] < width[: len(q)]
        if not valid.all():
            wrong.append(first + np.flatnonzero(~valid.reshape(-1, n_words).all(axis=1)))
    return np.concatenate([np.empty(0, np.int64), *wrong])
