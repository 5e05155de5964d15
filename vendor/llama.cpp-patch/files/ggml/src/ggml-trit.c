// Reference of the balanced-ternary types TRIT1..TRIT4: block layout, dequantization, scale search.
// This file is compiled without floating-point contraction, so that every platform picks the same blocks.

#include "ggml-trit.h"
#include "ggml-impl.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

const int16_t ggml_trit_ratio[TRIT_N_SCALES] = {
    4598, 4096, 3649, 3251, 2896, 2580, 2299, 2048, 1825,
    1625, 1448, 1290, 1149, 1024,  912,  813,  724,  645,
     575,  512,  456,  406,  362,  323,  287,  256,  228,
};

// floats nearest to 3^(2 - depth) * 2^(3 - i/6) / 1024: the sixths of the first octave of anchors
static const float anchor_octave[4][6] = {
    { 0x1.8p-6f,       0x1.561ae8p-6f,  0x1.30c7fp-6f,   0x1.0f876cp-6f,  0x1.e3cf48p-7f,  0x1.af0682p-7f  },
    { 0x1.0p-7f,       0x1.c823ep-8f,   0x1.965feap-8f,  0x1.6a09e6p-8f,  0x1.428a3p-8f,   0x1.1f59acp-8f  },
    { 0x1.555556p-9f,  0x1.3017eap-9f,  0x1.0eea9cp-9f,  0x1.e2b7dep-10f, 0x1.ae0d94p-10f, 0x1.7f223ap-10f },
    { 0x1.c71c72p-11f, 0x1.95753ap-11f, 0x1.6938dp-11f,  0x1.41cfeap-11f, 0x1.1eb3b8p-11f, 0x1.fed84ep-12f },
};

//
// block layout
//

#define TRIT_MAX_WORDS 27
#define TRIT_N_DIGITS  5 // base-9 digits in a word, the first is the most significant
#define TRIT_RESERVED  4 // value of digits that hold nothing

typedef uint8_t digit_plane[TRIT_MAX_WORDS][TRIT_N_DIGITS];

static const int n_words[5] = { 0, 8, 14, 21, 27 };

int ggml_trit_n_words(int depth) {
    assert(depth >= 1 && depth <= 4);
    return n_words[depth];
}

// TRIT2..TRIT4: the digit that holds the two upper trits of weight i
static uint8_t * upper_digit(digit_plane d, int i) {
    if (i < 40) {
        return &d[i % 8][i / 8];
    }
    const int row = (i - 40) / 8;
    const int col = (i - 40) % 8;
    return col < 6 ? &d[8 + col][row] : &d[8 + 2*row + col - 6][3];
}

// TRIT4: the digit that holds the two lower trits of weight i
static uint8_t * lower_digit(digit_plane d, int i) {
    return i < 40 ? &d[14 + i % 8][i / 8] : &d[22 + (i - 40) % 5][(i - 40) / 5];
}

// TRIT1, TRIT3: the digit that pairs the last trit of weight i < 32 (high) with that of weight i + 32 (low)
static uint8_t * pair_digit(int depth, digit_plane d, int i) {
    if (depth == 1) {
        return &d[i % 8][i / 8];
    }
    return i % 8 < 7 ? &d[14 + i % 8][i / 8] : &d[14 + i / 8][4];
}

// the 6 digits of the scale line: k0..k3 div 3, then k0, k1 mod 3, then k2, k3 mod 3
static uint8_t * scale_digit(int depth, digit_plane d, int i) {
    return &d[depth == 1 ? i : 8 + i][4];
}

static uint16_t word_from_digits(const uint8_t digit[TRIT_N_DIGITS]) {
    uint32_t v = 0;
    for (int j = 0; j < TRIT_N_DIGITS; ++j) {
        v = 9*v + digit[j];
    }
    // a fixed-point fraction of 9^5, rounded up: digit j is then (q * 9^j mod 2^16) * 9 / 2^16
    return (v*65536u + 59048u) / 59049u;
}

static void digits_from_word(uint16_t q, uint8_t digit[TRIT_N_DIGITS]) {
    uint16_t frac = q;
    for (int j = 0; j < TRIT_N_DIGITS; ++j) {
        digit[j] = (frac*9u) >> 16;
        frac     = frac*9u;
    }
}

void ggml_trit_unpack(int depth, const uint16_t * words, struct ggml_trit_block * block) {
    digit_plane d;
    for (int l = 0; l < n_words[depth]; ++l) {
        digits_from_word(words[l], d[l]);
    }

    for (int i = 0; i < QK_TRIT; ++i) {
        block->code[i] = depth > 1 ? *upper_digit(d, i) - 4 : 0;
    }
    if (depth == 4) {
        for (int i = 0; i < QK_TRIT; ++i) {
            block->code[i] = 9*block->code[i] + *lower_digit(d, i) - 4;
        }
    } else if (depth != 2) {
        for (int i = 0; i < QK_TRIT/2; ++i) {
            const int pair = *pair_digit(depth, d, i);
            block->code[i]             = 3*block->code[i]             + pair/3 - 1;
            block->code[i + QK_TRIT/2] = 3*block->code[i + QK_TRIT/2] + pair%3 - 1;
        }
    }

    for (int g = 0; g < NG_TRIT; ++g) {
        const int low = *scale_digit(depth, d, 4 + g/2);
        block->k[g] = 3 * *scale_digit(depth, d, g) + (g % 2 ? low%3 : low/3);
    }
}

void ggml_trit_pack(int depth, const struct ggml_trit_block * block, uint16_t * words) {
    digit_plane d;
    memset(d, TRIT_RESERVED, sizeof(d));

    // split code = radix*upper + lower, with lower in the balanced range of the radix
    const int radix = depth == 4 ? 9 : depth == 2 ? 1 : 3;
    int8_t lower[QK_TRIT];
    for (int i = 0; i < QK_TRIT; ++i) {
        const int bias  = radix/2 + 40*radix; // keeps the operands of / and % positive
        const int upper = (block->code[i] + bias)/radix - 40;
        lower[i] = (block->code[i] + bias)%radix - radix/2;
        if (depth > 1) {
            *upper_digit(d, i) = upper + 4;
        }
        if (depth == 4) {
            *lower_digit(d, i) = lower[i] + 4;
        }
    }
    if (depth == 1 || depth == 3) {
        for (int i = 0; i < QK_TRIT/2; ++i) {
            *pair_digit(depth, d, i) = 3*(lower[i] + 1) + lower[i + QK_TRIT/2] + 1;
        }
    }

    for (int g = 0; g < NG_TRIT; ++g) {
        *scale_digit(depth, d, g) = block->k[g] / 3;
    }
    *scale_digit(depth, d, 4) = 3*(block->k[0] % 3) + block->k[1] % 3;
    *scale_digit(depth, d, 5) = 3*(block->k[2] % 3) + block->k[3] % 3;

    for (int l = 0; l < n_words[depth]; ++l) {
        words[l] = word_from_digits(d[l]);
    }
}

bool ggml_trit_validate_row(int depth, const void * data, size_t n_blocks) {
    const uint16_t * words = (const uint16_t *) data;
    for (size_t i = 0; i < n_blocks; ++i, words += n_words[depth]) {
        // packing only makes valid blocks, so a block is valid if it survives the round trip
        struct ggml_trit_block block;
        uint16_t repacked[TRIT_MAX_WORDS];
        ggml_trit_unpack(depth, words, &block);
        ggml_trit_pack(depth, &block, repacked);
        if (memcmp(words, repacked, n_words[depth]*sizeof(uint16_t)) != 0) {
            fprintf(stderr, "ggml_validate_row_data: block %zu is not TRIT%d data (file damaged, or weights that the type cannot hold)\n", i, depth);
            return false;
        }
    }
    return true;
}

//
// dequantization
//

static int anchor_index(const uint8_t k[NG_TRIT]) {
    return 3*k[0] + (k[1] + k[2] + k[3]) % 3;
}

static float anchor_value(int depth, int n) {
    return ldexpf(anchor_octave[depth - 1][n % 6], -(n / 6)); // a power of two: exact
}

float ggml_trit_anchor(int depth, const uint8_t k[NG_TRIT]) {
    return anchor_value(depth, anchor_index(k));
}

static int group_ratio(const uint8_t k[NG_TRIT], int g) {
    return g == 0 ? TRIT_RATIO_ONE : ggml_trit_ratio[k[g]];
}

static void dequantize_row(int depth, const uint16_t * GGML_RESTRICT words, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TRIT == 0);

    for (int64_t ib = 0; ib < k/QK_TRIT; ++ib) {
        struct ggml_trit_block block;
        ggml_trit_unpack(depth, words + ib*n_words[depth], &block);

        const float anchor = ggml_trit_anchor(depth, block.k);
        for (int i = 0; i < QK_TRIT; ++i) {
            y[ib*QK_TRIT + i] = (anchor * group_ratio(block.k, i/QG_TRIT)) * block.code[i];
        }
    }
}

//
// quantization: search of the anchor, the scale indexes and the codes of least (weighted) squared error
//
// All scales of a depth lie, up to the rounding of the ratios, on one lattice of sixth-octave steps:
// position p stands for the scale 3^(2 - depth) * 2^(3 - (p - 13)/6), a larger p for a smaller scale.
// An anchor n puts group 0 at p = n + 13 and lets group g > 0 take p = n + k_g.
//

#define N_POS      (TRIT_N_ANCHORS + TRIT_N_SCALES - 1)
#define POS_ANCHOR 13                                   // position of the anchor n = 0
#define POS_LAST   (POS_ANCHOR + TRIT_N_ANCHORS - 1)    // position of the last anchor

// a group whose weights all lie below half of F16's least subnormal is a group of zeros
#define TRIT_ZERO 0x1p-25f

// how many positions below its clipping point a group's scale is searched, per depth:
// few levels gain from clipping the largest weights, many levels do not
static const int search_depth[5] = { 0, 10, 6, 5, 4 };

struct scale_lattice {
    float scale[N_POS];
    float inv  [N_POS];
    float code_max;
    int   search_depth;
};

static void init_lattice(struct scale_lattice * lat, int depth) {
    static const float code_max[5] = { 0, 1, 4, 13, 40 };
    lat->code_max     = code_max[depth];
    lat->search_depth = search_depth[depth];
    for (int p = 0; p < N_POS; ++p) {
        // three octaves up and down again, to keep the index positive
        lat->scale[p] = ldexpf(anchor_value(depth, p - POS_ANCHOR + 18), 3) * TRIT_RATIO_ONE;
        lat->inv[p]   = 1.0f/lat->scale[p];
    }
}

static float round_to_code(float x, float code_max) {
    x = x < -code_max ? -code_max : x;
    x = x >  code_max ?  code_max : x;
    return (x + 0x1.8p23f) - 0x1.8p23f; // to the nearest integer, ties to even
}

// squared error of a group at position p; the sum is a tree, so that vector code can do it in the same order
static float group_error(const struct scale_lattice * lat, int p, const float * x, const float * weight) {
    float e[QG_TRIT];
    for (int i = 0; i < QG_TRIT; ++i) {
        const float diff = x[i] - round_to_code(x[i]*lat->inv[p], lat->code_max)*lat->scale[p];
        e[i] = weight ? diff*diff*weight[i] : diff*diff;
    }
    for (int n = QG_TRIT/2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) {
            e[i] += e[i + n];
        }
    }
    return e[0];
}

// the smallest scale that holds x_max without clipping; -1 if there is none
static int clipping_position(const struct scale_lattice * lat, float x_max) {
    int p = N_POS - 1;
    while (p >= 0 && lat->scale[p]*lat->code_max < x_max) {
        --p;
    }
    return p;
}

// scale indexes of the block; false if the type cannot hold it
static bool search_scales(const struct scale_lattice * lat, const float * x, const float * weight, uint8_t k[NG_TRIT]) {
    int top[NG_TRIT];
    int top_min = N_POS;
    int top_max = -1;
    for (int g = 0; g < NG_TRIT; ++g) {
        float x_max = 0.0f;
        for (int i = 0; i < QG_TRIT; ++i) {
            if (!isfinite(x[QG_TRIT*g + i])) {
                return false;
            }
            x_max = MAX(x_max, fabsf(x[QG_TRIT*g + i]));
        }
        top[g] = x_max < TRIT_ZERO ? N_POS : clipping_position(lat, x_max);
        if (top[g] < (g == 0 ? POS_ANCHOR : 0)) {
            return false; // above the range
        }
        if (top[g] < N_POS) {
            top_min = MIN(top_min, top[g]);
            top_max = MAX(top_max, top[g]);
        }
    }
    if (top_min == N_POS) {
        memset(k, TRIT_N_SCALES/2, NG_TRIT); // zeros
        return true;
    }
    if (top_min > POS_LAST) {
        return false; // below the range
    }

    // Candidates: from one position above the clipping point of the largest group to some below that of the
    // smallest group; they include every compromise between groups that do not reach each other's scales.
    const int first = MAX(top_min - 1, 0);
    const int last  = MAX(MIN(top_max + lat->search_depth, N_POS - 1), POS_ANCHOR);
    float error[NG_TRIT][N_POS];
    for (int g = 0; g < NG_TRIT; ++g) {
        for (int p = first; p <= last; ++p) {
            error[g][p] = group_error(lat, p, x + QG_TRIT*g, weight ? weight + QG_TRIT*g : NULL);
        }
    }

    float best = INFINITY;
    for (int p0 = MAX(first, POS_ANCHOR); p0 <= MIN(last, POS_LAST); ++p0) {
        const int n = p0 - POS_ANCHOR;

        // best index of each group in each class modulo 3, since the sum of the classes is tied to n
        float class_error[NG_TRIT][3];
        int   class_k    [NG_TRIT][3];
        for (int g = 1; g < NG_TRIT; ++g) {
            for (int r = 0; r < 3; ++r) {
                class_error[g][r] = INFINITY;
                class_k    [g][r] = 0;
            }
            for (int p = MAX(first, n); p <= MIN(last, n + TRIT_N_SCALES - 1); ++p) {
                const int r = (p - n) % 3;
                if (error[g][p] < class_error[g][r]) {
                    class_error[g][r] = error[g][p];
                    class_k    [g][r] = p - n;
                }
            }
        }
        for (int r1 = 0; r1 < 3; ++r1) {
            for (int r2 = 0; r2 < 3; ++r2) {
                const int r3 = (n + 6 - r1 - r2) % 3;
                const float e = error[0][p0] + class_error[1][r1] + class_error[2][r2] + class_error[3][r3];
                if (e < best) {
                    best = e;
                    k[0] = n/3;
                    k[1] = class_k[1][r1];
                    k[2] = class_k[2][r2];
                    k[3] = class_k[3][r3];
                }
            }
        }
    }
    return best < INFINITY;
}

static void quantize_row(int depth, const float * GGML_RESTRICT x, uint16_t * GGML_RESTRICT words, int64_t k, const float * GGML_RESTRICT weight) {
    assert(k % QK_TRIT == 0);

    struct scale_lattice lat;
    init_lattice(&lat, depth);

    for (int64_t ib = 0; ib < k/QK_TRIT; ++ib, x += QK_TRIT, words += n_words[depth]) {
        struct ggml_trit_block block;
        if (!search_scales(&lat, x, weight ? weight + ib*QK_TRIT : NULL, block.k)) {
            for (int l = 0; l < n_words[depth]; ++l) {
                words[l] = 1; // not the encoding of any digits
            }
            continue;
        }
        const float anchor = ggml_trit_anchor(depth, block.k);
        for (int i = 0; i < QK_TRIT; ++i) {
            block.code[i] = (int8_t) round_to_code(x[i] / (anchor * group_ratio(block.k, i/QG_TRIT)), lat.code_max);
        }
        ggml_trit_pack(depth, &block, words);
    }
}

static size_t quantize(enum ggml_type type, int depth, const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    const size_t row_size = ggml_row_size(type, n_per_row);
    for (int64_t row = 0; row < nrows; ++row) {
        quantize_row(depth, src + row*n_per_row, (uint16_t *) ((char *) dst + row*row_size), n_per_row, imatrix);
    }
    return nrows * row_size;
}

#define TRIT_TYPE(depth) \
void quantize_row_trit##depth##_ref(const float * GGML_RESTRICT x, block_trit##depth * GGML_RESTRICT y, int64_t k) { \
    quantize_row(depth, x, (uint16_t *) y, k, NULL); \
} \
void dequantize_row_trit##depth(const block_trit##depth * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) { \
    dequantize_row(depth, (const uint16_t *) x, y, k); \
} \
size_t quantize_trit##depth(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) { \
    return quantize(GGML_TYPE_TRIT##depth, depth, src, dst, nrows, n_per_row, imatrix); \
}

TRIT_TYPE(1)
TRIT_TYPE(2)
TRIT_TYPE(3)
TRIT_TYPE(4)
