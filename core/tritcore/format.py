"""The constants of the TRIT tensor types. docs/reference/format.md is the normative text; names follow it."""

import numpy as np

FORMAT_VERSION = 1

DEPTHS = (1, 2, 3, 4)
BLOCK_SIZE = 64  # weights
GROUP_SIZE = 16  # weights that share a scale
N_GROUPS = BLOCK_SIZE // GROUP_SIZE
N_SCALES = 27  # entries of the scale codebook, relative to the block's anchor
N_ANCHORS = 81  # sixth-octave steps

ZERO = 2.0**-25  # weights below that, which float16 rounds to zero, count as zero

WORDS_PER_BLOCK = {1: 8, 2: 14, 3: 21, 4: 27}  # 16-bit words
BYTES_PER_BLOCK = {depth: 2 * words for depth, words in WORDS_PER_BLOCK.items()}
CODE_MAX = {depth: (3**depth - 1) // 2 for depth in DEPTHS}

TRITS_PER_WORD = 10
RESERVED = 1  # value of the trits that hold nothing
QUADS = {1: 2, 2: 3, 3: 5, 4: 6}  # quads of words whose words begin with whole codes; other weights fill the gaps
CODES_PER_WORD = {1: 8, 2: 5, 3: 3, 4: 2}  # these codes in each word

# round(1024 * 2^((13 - k) / 6)); group 0 uses RATIO_ONE whatever its index
RATIO_ONE = 1024
# fmt: off
RATIO = np.array([
    4598, 4096, 3649, 3251, 2896, 2580, 2299, 2048, 1825, 1625, 1448, 1290, 1149, 1024,
    912, 813, 724, 645, 575, 512, 456, 406, 362, 323, 287, 256, 228,
], dtype=np.int16)
# fmt: on

# The float32 nearest to 3^(2 - depth) * 2^(3 - i/6) / 1024, i = 0..5: the first octave of anchors.
_ANCHOR_OCTAVE = {
    1: ("0x1.8p-6", "0x1.561ae8p-6", "0x1.30c7fp-6", "0x1.0f876cp-6", "0x1.e3cf48p-7", "0x1.af0682p-7"),
    2: ("0x1.0p-7", "0x1.c823ep-8", "0x1.965feap-8", "0x1.6a09e6p-8", "0x1.428a3p-8", "0x1.1f59acp-8"),
    3: ("0x1.555556p-9", "0x1.3017eap-9", "0x1.0eea9cp-9", "0x1.e2b7dep-10", "0x1.ae0d94p-10", "0x1.7f223ap-10"),
    4: ("0x1.c71c72p-11", "0x1.95753ap-11", "0x1.6938dp-11", "0x1.41cfeap-11", "0x1.1eb3b8p-11", "0x1.fed84ep-12"),
}


def anchor(depth: int, n: np.ndarray) -> np.ndarray:
    """Anchors, divided by 1024.

    Args:
        depth: trits per weight, 1..4.
        n: anchor numbers, any integer shape; 0..80 in a file.

    Returns:
        float32 of the shape of `n`: the values nearest to 3^(2 - depth) * 2^(3 - n/6) / 1024.
    """
    octave = np.array([float.fromhex(text) for text in _ANCHOR_OCTAVE[depth]], dtype=np.float32)
    return np.ldexp(octave[n % 6], -(n // 6)).astype(np.float32)
