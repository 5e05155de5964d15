#ifndef GGML_TRIT_COMMON
#define GGML_TRIT_COMMON

// The constants of TRIT1..TRIT4, for C, CUDA, Metal and GLSL; docs/reference/format.md defines them. They are macros because each
// language keeps tables in an address space of its own. ggml-common.h, where there is one, has to be included first: it has the blocks.

#define QG_TRIT 16                  // weights in a group, they share a scale
#define NG_TRIT (QK_TRIT / QG_TRIT) // groups in a block
#define TRIT_N_SCALES 27            // entries of the scale codebook
#define TRIT_N_ANCHORS 81           // anchors, in steps of a sixth of an octave
#define TRIT_RATIO_ONE 1024         // ratio of group 0, whose scale is the anchor itself
#define TRIT_PER_WORD 10            // trits in a word, the first is the most significant
#define TRIT_RESERVED 1             // value of trits that hold nothing

// round(1024 * 2^((13 - k) / 6)), k = 0..26
#define TRIT_RATIOS \
    4598, 4096, 3649, 3251, 2896, 2580, 2299, 2048, 1825, \
    1625, 1448, 1290, 1149, 1024,  912,  813,  724,  645, \
     575,  512,  456,  406,  362,  323,  287,  256,  228

// [depth - 1][i]: 3^(2 - depth) * 2^(3 - i/6) / 1024, i < 6: the first octave of anchors, divided by 1024. Nine digits tell
// a float from all others; Metal has no hexadecimal ones.
#define TRIT_ANCHOR_OCTAVES \
    { 2.34375000e-02f, 2.08804384e-02f, 1.86023563e-02f, 1.65728144e-02f, 1.47647001e-02f, 1.31538520e-02f }, \
    { 7.81250000e-03f, 6.96014613e-03f, 6.20078528e-03f, 5.52427163e-03f, 4.92156669e-03f, 4.38461732e-03f }, \
    { 2.60416674e-03f, 2.32004863e-03f, 2.06692843e-03f, 1.84142392e-03f, 1.64052215e-03f, 1.46153907e-03f }, \
    { 8.68055562e-04f, 7.73349602e-04f, 6.88976143e-04f, 6.13807992e-04f, 5.46840718e-04f, 4.87179699e-04f }

// 3^n, n < TRIT_PER_WORD
#define TRIT_POWERS 1, 3, 9, 27, 81, 243, 729, 2187, 6561, 19683

// What follows depends on the depth, 1..4, and is a constant where the depth is one.

// 16-bit words in a block
#define TRIT_WORDS(depth) ((int) (((depth) == 1 ? sizeof(block_trit1) : (depth) == 2 ? sizeof(block_trit2) : \
                                   (depth) == 3 ? sizeof(block_trit3) : sizeof(block_trit4)) / sizeof(uint16_t)))

// values of a code, 3^depth; a field holds the code plus the offset
#define TRIT_LEVELS(depth) ((depth) == 1 ? 3 : (depth) == 2 ? 9 : (depth) == 3 ? 27 : 81)
#define TRIT_OFFSET(depth) (TRIT_LEVELS(depth) / 2)

// quads of words whose words begin with whole codes, and the number of these codes in each word
#define TRIT_QUADS(depth)          ((depth) == 1 ? 2 : (depth) == 2 ? 3 : (depth) == 3 ? 5 : 6)
#define TRIT_CODES_PER_WORD(depth) ((depth) == 1 ? 8 : (depth) == 2 ? 5 : (depth) == 3 ? 3 : 2)

#endif // GGML_TRIT_COMMON
