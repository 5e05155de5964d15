// Reference of the balanced-ternary types TRIT1..TRIT4: block layout, dequantization, scale search.
// This file is compiled without floating-point contraction, so that every platform picks the same blocks.

#include "ggml-trit.h"
#include "ggml-impl.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

const int16_t ggml_trit_ratio[TRIT_N_SCALES] = { TRIT_RATIOS };
const float   ggml_trit_anchor_octave[4][8]  = { TRIT_ANCHOR_OCTAVES };

//
// block layout
//

typedef uint8_t trit_plane[TRIT_WORDS(4)][TRIT_PER_WORD];

static const int n_words [5] = { 0, TRIT_WORDS(1),  TRIT_WORDS(2),  TRIT_WORDS(3),  TRIT_WORDS(4)  };
static const int code_max[5] = { 0, TRIT_OFFSET(1), TRIT_OFFSET(2), TRIT_OFFSET(3), TRIT_OFFSET(4) };

int ggml_trit_n_words(int depth) {
    assert(depth >= 1 && depth <= 4);
    return n_words[depth];
}

// Place of trit s of weight i. Words stand in quads; a quad holds four weights at a time, one in each of its words.
static uint8_t * weight_trit(int depth, trit_plane t, int i, int s) {
    const int lane = i % 4;
    switch (depth) {
        case 1:
            return &t[4*(i/32) + lane][(i%32)/4];
        case 2:
            return i < 60 ? &t[4*(i/20) + lane][2*((i%20)/4) + s] : &t[12 + lane/2][2*(lane%2) + s];
        case 3:
            if (i < 60) {
                return &t[4*(i/12) + lane][3*((i%12)/4) + s];
            }
            return s < 2 ? &t[20][2*lane + s] : &t[12 + lane][9];
        default:
            if (i < 48) {
                return &t[4*(i/8) + lane][4*((i%8)/4) + s];
            }
            if (i < 60) {
                const int quad = 2*((i - 48)/4) + s/2;
                return &t[4*quad + lane][8 + s%2];
            }
            return lane%2 == 0 ? &t[24 + lane/2][s] : &t[26][4*(lane/2) + s];
    }
}

// place of trit s of the scale index of group g
static uint8_t * scale_trit(int depth, trit_plane t, int g, int s) {
    switch (depth) {
        case 1:  return s < 2 ? &t[g][8 + s] : &t[4 + g][8];
        case 3:  return &t[4*s + g][9];
        default: return &t[(depth == 2 ? 12 : 24) + g/2][4 + 3*(g%2) + s];
    }
}

static uint16_t word_from_trits(const uint8_t trit[TRIT_PER_WORD]) {
    uint32_t v = 0;
    for (int j = 0; j < TRIT_PER_WORD; ++j) {
        v = 3*v + trit[j];
    }
    // a fixed-point fraction of 3^10, rounded up: the n trits from trit j on are (q * 3^j mod 2^16) * 3^n / 2^16
    return (v*65536u + 59048u) / 59049u;
}

static void trits_from_word(uint16_t q, uint8_t trit[TRIT_PER_WORD]) {
    uint16_t frac = q;
    for (int j = 0; j < TRIT_PER_WORD; ++j) {
        trit[j] = (frac*3u) >> 16;
        frac    = frac*3u;
    }
}

void ggml_trit_unpack(int depth, const uint16_t * words, struct ggml_trit_block * block) {
    trit_plane t;
    for (int l = 0; l < n_words[depth]; ++l) {
        trits_from_word(words[l], t[l]);
    }

    for (int i = 0; i < QK_TRIT; ++i) {
        int code = 0;
        for (int s = 0; s < depth; ++s) {
            code = 3*code + *weight_trit(depth, t, i, s) - 1;
        }
        block->code[i] = code;
    }
    for (int g = 0; g < NG_TRIT; ++g) {
        block->k[g] = 9 * *scale_trit(depth, t, g, 0) + 3 * *scale_trit(depth, t, g, 1) + *scale_trit(depth, t, g, 2);
    }
}

void ggml_trit_pack(int depth, const struct ggml_trit_block * block, uint16_t * words) {
    trit_plane t;
    memset(t, TRIT_RESERVED, sizeof(t));

    for (int i = 0; i < QK_TRIT; ++i) {
        int rest = block->code[i] + code_max[depth];
        for (int s = depth - 1; s >= 0; --s) {
            *weight_trit(depth, t, i, s) = rest % 3;
            rest /= 3;
        }
    }
    for (int g = 0; g < NG_TRIT; ++g) {
        int rest = block->k[g];
        for (int s = 2; s >= 0; --s) {
            *scale_trit(depth, t, g, s) = rest % 3;
            rest /= 3;
        }
    }

    for (int l = 0; l < n_words[depth]; ++l) {
        words[l] = word_from_trits(t[l]);
    }
}

//
// validation
//

// Whether all words are fractions of 3^10, rounded up: q = (v*2^16 + r)/3^10, 0 <= r < 3^10, so r is q*3^10 modulo 2^16.
static bool are_encodings(const uint16_t * words, size_t n) {
    uint16_t wrong = 0;
    for (size_t i = 0; i < n; ++i) {
        wrong |= (uint16_t) (words[i]*59049u) >= 59049u;
    }
    return !wrong;
}

// whether the trits of a word from trit j on have their reserved value; factor is 3^j
static bool last_is_reserved(uint16_t q, uint32_t factor) {
    return (q*factor & 0xffff)*3 >> 16 == TRIT_RESERVED;
}

static bool last_two_are_reserved(uint16_t q) {
    return (q*6561u & 0xffff)*9 >> 16 == 4*TRIT_RESERVED;
}

static bool reserved_trits_are_valid(int depth, const uint16_t * words) {
    bool valid = true;
    switch (depth) {
        case 1:
            for (int l = 4; l < 8; ++l) {
                valid &= last_is_reserved(words[l], 19683u);
            }
            return valid;
        case 3:
            for (int l = 16; l < 20; ++l) {
                valid &= last_is_reserved(words[l], 19683u);
            }
            return valid & last_two_are_reserved(words[20]);
        case 4:
            return last_two_are_reserved(words[26]);
        default:
            return true;
    }
}

bool ggml_trit_validate_row(int depth, const void * data, size_t n_blocks) {
    enum { AT_A_TIME = 64 }; // blocks: enough for vector code, and still in the first cache for the reserved trits

    const uint16_t * words = (const uint16_t *) data;
    for (size_t first = 0; first < n_blocks; first += AT_A_TIME) {
        const size_t n = MIN(n_blocks - first, (size_t) AT_A_TIME);
        bool valid = are_encodings(words + first*n_words[depth], n*n_words[depth]);
        for (size_t i = first; i < first + n; ++i) {
            valid &= reserved_trits_are_valid(depth, words + i*n_words[depth]);
        }
        if (valid) {
            continue;
        }
        size_t i = first;
        while (are_encodings(words + i*n_words[depth], n_words[depth]) && reserved_trits_are_valid(depth, words + i*n_words[depth])) {
            ++i;
        }
        fprintf(stderr, "ggml_validate_row_data: block %zu is not TRIT%d data (file damaged, or weights that the type cannot hold)\n", i, depth);
        return false;
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
    return ldexpf(ggml_trit_anchor_octave[depth - 1][n % 6], -(n / 6)); // a power of two: exact
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

// scale indexes of the block; false if it is not finite, or above the range
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

    // Candidates: from one position above the clipping point of the largest group to some below that of the
    // smallest group; they include every compromise between groups that do not reach each other's scales.
    // A block below the range has the last anchor.
    const int first = MIN(MAX(top_min - 1, 0), POS_LAST);
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
    // weights that are not finite, or so great that the sums are not, say nothing
    return best < INFINITY || (weight && search_scales(lat, x, NULL, k));
}

static void nearest_codes(const struct scale_lattice * lat, int depth, const float * x, struct ggml_trit_block * block) {
    const float anchor = ggml_trit_anchor(depth, block->k);
    for (int i = 0; i < QK_TRIT; ++i) {
        block->code[i] = (int8_t) round_to_code(x[i] / (anchor * group_ratio(block->k, i/QG_TRIT)), lat->code_max);
    }
}

// Where there are few levels, the error of a large weight counts for more: 2 + x^2/sigma^2, sigma that of the row.
// It is for want of an imatrix, as in the K-quants. More levels do better without.
#define TRIT_WEIGHTED_DEPTH 2

static float mean_square(const float * GGML_RESTRICT x, int64_t k) {
    double sum = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        sum += (double) x[i]*x[i];
    }
    return (float) (sum/k);
}

static void quantize_row(int depth, const float * GGML_RESTRICT x, uint16_t * GGML_RESTRICT words, int64_t k, const float * GGML_RESTRICT imatrix) {
    assert(k % QK_TRIT == 0);

    struct scale_lattice lat;
    init_lattice(&lat, depth);

    const float sigma2   = imatrix || depth > TRIT_WEIGHTED_DEPTH ? 0.0f : mean_square(x, k);
    const bool  weighted = sigma2 > 0.0f && isfinite(sigma2); // a row that is not finite will be refused

    for (int64_t ib = 0; ib < k/QK_TRIT; ++ib, x += QK_TRIT, words += n_words[depth]) {
        float own_weight[QK_TRIT];
        for (int i = 0; weighted && i < QK_TRIT; ++i) {
            own_weight[i] = 2.0f + x[i]*x[i]/sigma2;
        }
        const float * weight = imatrix ? imatrix + ib*QK_TRIT : weighted ? own_weight : NULL;

        struct ggml_trit_block block;
        if (!search_scales(&lat, x, weight, block.k)) {
            for (int l = 0; l < n_words[depth]; ++l) {
                words[l] = 1; // not the encoding of any trits
            }
            continue;
        }
        nearest_codes(&lat, depth, x, &block);
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

//
// the lower end of the range
//

// the share that a type loses of the energy of normally distributed weights, by plain squared error
static const double usual_loss[5] = { 0.0, 0.166, 0.0195, 0.0022, 0.00025 };

// how much more than the usual loss of a tensor its blocks below the range may cost, as a share of it
#define TRIT_MOST_EXCESS 0.01

static double sum_of_squares(const double * x) {
    double sums[8] = { 0.0 }; // side by side, for vector code
    for (int i = 0; i < QK_TRIT; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sums[j] += x[i + j]*x[i + j];
        }
    }
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

void ggml_trit_measure_reach(int depth, const float * x, int64_t n_blocks, struct ggml_trit_reach * reach) {
    struct scale_lattice lat;
    init_lattice(&lat, depth);
    const float least = lat.scale[POS_LAST]*lat.code_max;

    for (int64_t ib = 0; ib < n_blocks; ++ib, x += QK_TRIT) {
        double weight[QK_TRIT];
        float largest = 0.0f;
        for (int i = 0; i < QK_TRIT; ++i) {
            weight[i] = x[i];
            largest   = MAX(largest, fabsf(x[i]));
        }
        const double energy = sum_of_squares(weight);
        reach->energy += energy;
        if (largest < TRIT_ZERO || largest >= least) {
            continue;
        }

        struct ggml_trit_block block;
        if (!search_scales(&lat, x, NULL, block.k)) {
            continue; // not finite
        }
        nearest_codes(&lat, depth, x, &block);
        const float anchor = ggml_trit_anchor(depth, block.k);
        for (int i = 0; i < QK_TRIT; ++i) {
            weight[i] -= (anchor * group_ratio(block.k, i/QG_TRIT)) * block.code[i];
        }
        const double excess = sum_of_squares(weight) - usual_loss[depth]*energy;
        if (excess > 0.0) {
            reach->excess += excess;
        }
    }
}

bool ggml_trit_reaches(int depth, const struct ggml_trit_reach * reach) {
    return reach->excess <= TRIT_MOST_EXCESS*usual_loss[depth]*reach->energy;
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
