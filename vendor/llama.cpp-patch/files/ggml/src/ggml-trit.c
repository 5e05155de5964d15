// Reference of the balanced-ternary types TRIT1..TRIT4: block layout, dequantization, scale search.
// This file is compiled without floating-point contraction, so that every platform picks the same blocks.

#include "ggml-trit.h"
#include "ggml-trit-tile.h"
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

static const int n_words[5] = { 0, TRIT_WORDS(1), TRIT_WORDS(2), TRIT_WORDS(3), TRIT_WORDS(4) };

int ggml_trit_n_words(int depth) {
    assert(depth >= 1 && depth <= 4);
    return n_words[depth];
}

enum {
    LEVELS_1   = 3, // values of a field of one trit, of two ..
    LEVELS_2   = 9,
    LEVELS_3   = 27,
    LEVELS_4   = 81,
    RESERVED_2 = TRIT_RESERVED*LEVELS_1 + TRIT_RESERVED,
};

// a field of a word: factor is 3^j for one that begins with trit j, levels 3^n for n trits
static inline uint16_t field(uint16_t word, uint16_t factor, uint16_t levels) {
    return (uint32_t) (uint16_t) (word*factor)*levels >> 16;
}

// a number of ten trits as a fixed-point fraction of 3^10, rounded up
static inline uint16_t word_from_number(uint32_t v) {
    return (v*65536u + 59048u)/59049u;
}

static inline void unpack(int depth, const uint16_t * words, struct ggml_trit_block * block) {
    int8_t  * code = block->code;
    uint8_t * k    = block->k;

    // codes that the words of quads begin with, those of a quad side by side
    const int n_codes = TRIT_CODES_PER_WORD(depth);
    for (int p = 0; p < TRIT_QUADS(depth); ++p) {
        uint16_t rest[4];
        memcpy(rest, words + 4*p, sizeof(rest));
        for (int j = 0; j < n_codes; ++j) {
            for (int lane = 0; lane < 4; ++lane) {
                const uint32_t product = (uint32_t) rest[lane]*TRIT_LEVELS(depth);
                code[4*(n_codes*p + j) + lane] = (int) (product >> 16) - TRIT_OFFSET(depth);
                rest[lane] = product;
            }
        }
    }

    // all else, as docs/reference/format.md lists it
    const uint16_t * last = words + 4*TRIT_QUADS(depth);
    switch (depth) {
        case 1:
            for (int g = 0; g < NG_TRIT; ++g) {
                k[g] = 3*field(words[g], 6561, LEVELS_2) + field(words[4 + g], 6561, LEVELS_1);
            }
            break;
        case 2:
            for (int i = 0; i < 2; ++i) {
                code[60 + 2*i] = field(last[i], 1, LEVELS_2) - TRIT_OFFSET(2);
                code[61 + 2*i] = field(last[i], 9, LEVELS_2) - TRIT_OFFSET(2);
                k[2*i + 0] = field(last[i],   81, LEVELS_3);
                k[2*i + 1] = field(last[i], 2187, LEVELS_3);
            }
            break;
        case 3:
            for (int i = 0; i < 4; ++i) {
                static const uint32_t factor[4] = { 1, 9, 81, 729 };
                code[60 + i] = 3*field(last[0], factor[i], LEVELS_2) + field(words[12 + i], 19683, LEVELS_1) - TRIT_OFFSET(3);
                k[i] = 9*field(words[i], 19683, LEVELS_1) + 3*field(words[4 + i], 19683, LEVELS_1) + field(words[8 + i], 19683, LEVELS_1);
            }
            break;
        case 4:
            for (int i = 0; i < 12; ++i) {
                const uint16_t * pair = words + i/4*8 + i%4;
                code[48 + i] = 9*field(pair[0], 6561, LEVELS_2) + field(pair[4], 6561, LEVELS_2) - TRIT_OFFSET(4);
            }
            for (int i = 0; i < 2; ++i) {
                code[60 + 2*i] = field(last[i], 1, LEVELS_4) - TRIT_OFFSET(4);
                code[61 + 2*i] = field(last[2], i == 0 ? 1 : 81, LEVELS_4) - TRIT_OFFSET(4);
                k[2*i + 0] = field(last[i],   81, LEVELS_3);
                k[2*i + 1] = field(last[i], 2187, LEVELS_3);
            }
            break;
    }
}

void ggml_trit_unpack(int depth, const uint16_t * words, struct ggml_trit_block * block) {
    switch (depth) { // so that the depth is a constant
        case 1:  unpack(1, words, block); break;
        case 2:  unpack(2, words, block); break;
        case 3:  unpack(3, words, block); break;
        default: unpack(4, words, block); break;
    }
}

// what follows the codes of word l of the quads, as a number
static inline uint32_t rest_of_word(int depth, const struct ggml_trit_block * block, int l) {
    const int lane = l%4;
    switch (depth) {
        case 1:
            return l < 4 ? block->k[l]/LEVELS_1 : block->k[lane]%LEVELS_1*LEVELS_1 + TRIT_RESERVED;
        case 3:
            switch (l/4) {
                case 0:  return block->k[lane]/LEVELS_2;
                case 1:  return block->k[lane]/LEVELS_1%LEVELS_1;
                case 2:  return block->k[lane]%LEVELS_1;
                case 3:  return (block->code[60 + lane] + TRIT_OFFSET(3))%LEVELS_1;
                default: return TRIT_RESERVED;
            }
        case 4: {
            const int code = block->code[48 + l/8*4 + lane] + TRIT_OFFSET(4);
            return l%8 < 4 ? code/LEVELS_2 : code%LEVELS_2;
        }
        default:
            return 0;
    }
}

static inline void pack(int depth, const struct ggml_trit_block * block, uint16_t * words) {
    static const int rest_levels[5] = { 0, LEVELS_2, 1, LEVELS_1, LEVELS_2 };

    const int8_t  * code = block->code;
    const uint8_t * k    = block->k;

    const int n_codes = TRIT_CODES_PER_WORD(depth);
    for (int l = 0; l < 4*TRIT_QUADS(depth); ++l) {
        uint32_t v = 0;
        for (int j = 0; j < n_codes; ++j) {
            v = v*TRIT_LEVELS(depth) + (code[l/4*4*n_codes + 4*j + l%4] + TRIT_OFFSET(depth));
        }
        words[l] = word_from_number(v*rest_levels[depth] + rest_of_word(depth, block, l));
    }

    const int  o    = TRIT_OFFSET(depth);
    uint16_t * last = words + 4*TRIT_QUADS(depth);
    switch (depth) {
        case 2:
            for (int i = 0; i < 2; ++i) {
                const uint32_t codes = (code[60 + 2*i] + o)*LEVELS_2 + (code[61 + 2*i] + o);
                last[i] = word_from_number((codes*LEVELS_3 + k[2*i])*LEVELS_3 + k[2*i + 1]);
            }
            break;
        case 3: {
            uint32_t v = 0;
            for (int i = 60; i < 64; ++i) {
                v = v*LEVELS_2 + (code[i] + o)/LEVELS_1;
            }
            last[0] = word_from_number(v*LEVELS_2 + RESERVED_2);
            break;
        }
        case 4:
            for (int i = 0; i < 2; ++i) {
                last[i] = word_from_number(((code[60 + 2*i] + o)*LEVELS_3 + k[2*i])*LEVELS_3 + k[2*i + 1]);
            }
            last[2] = word_from_number(((code[61] + o)*LEVELS_4 + (code[63] + o))*LEVELS_2 + RESERVED_2);
            break;
    }
}

void ggml_trit_pack(int depth, const struct ggml_trit_block * block, uint16_t * words) {
    switch (depth) { // so that the depth is a constant
        case 1:  pack(1, block, words); break;
        case 2:  pack(2, block, words); break;
        case 3:  pack(3, block, words); break;
        default: pack(4, block, words); break;
    }
}

//
// validation
//

// How wrong blocks are: 0 where they are as the format has them. Loops that do not stop at the first become vector code.
static inline uint16_t wrong_bits(int depth, const uint16_t * words, size_t n_blocks) {
    const size_t n_words = TRIT_WORDS(depth);

    // words are fractions of 3^10, rounded up: q = (v*2^16 + r)/3^10, 0 <= r < 3^10, so r is q*3^10 modulo 2^16
    uint16_t wrong = 0;
    for (size_t i = 0; i < n_blocks*n_words; ++i) {
        wrong |= (uint16_t) (words[i]*59049u) >= 59049u;
    }

    // reserved trits: the last of each word of a quad, and the last two of the last word
    if (depth == 1 || depth == 3) {
        const uint16_t * quads = words + (depth == 1 ? 4 : 16);
        uint16_t lanes[4] = { 0, 0, 0, 0 };
        for (size_t i = 0; i < n_blocks; ++i) {
            for (int lane = 0; lane < 4; ++lane) {
                lanes[lane] |= field(quads[i*n_words + lane], 19683, LEVELS_1) ^ TRIT_RESERVED;
            }
        }
        wrong |= lanes[0] | lanes[1] | lanes[2] | lanes[3];
    }
    if (depth >= 3) {
        for (size_t i = 0; i < n_blocks; ++i) {
            wrong |= field(words[i*n_words + n_words - 1], 6561, LEVELS_2) ^ RESERVED_2;
        }
    }
    return wrong;
}

static bool are_valid(int depth, const uint16_t * words, size_t n_blocks) {
    switch (depth) { // so that the depth is a constant
        case 1:  return wrong_bits(1, words, n_blocks) == 0;
        case 2:  return wrong_bits(2, words, n_blocks) == 0;
        case 3:  return wrong_bits(3, words, n_blocks) == 0;
        default: return wrong_bits(4, words, n_blocks) == 0;
    }
}

bool ggml_trit_validate_row(int depth, const void * data, size_t n_blocks) {
    enum { AT_A_TIME = 64 }; // blocks: enough for vector code, and still in the first cache for the reserved trits

    const uint16_t * words = (const uint16_t *) data;
    for (size_t first = 0; first < n_blocks; first += AT_A_TIME) {
        if (are_valid(depth, words + first*n_words[depth], MIN(n_blocks - first, (size_t) AT_A_TIME))) {
            continue;
        }
        size_t i = first;
        while (are_valid(depth, words + i*n_words[depth], 1)) {
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
// ggml-trit-tile.h has the lattice that the scales lie on. Blocks are searched 16 at a time by the kernels there. What stands
// here, block by block, is their reference: they do the same operations in the same order.
//

static float round_to_code(float x, float code_max) {
    x = x < -code_max ? -code_max : x;
    x = x >  code_max ?  code_max : x;
    return (x + 0x1.8p23f) - 0x1.8p23f; // to the nearest integer, ties to even
}

// squared error of a group at position p; the sum is a tree, so that vector code can do it in the same order
static float group_error(const struct trit_lattice * lat, int p, const float * x, const float * weight) {
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
static int clipping_position(const struct trit_lattice * lat, float x_max) {
    int p = TRIT_N_POS - 1;
    while (p >= 0 && lat->reach[p] < x_max) {
        --p;
    }
    return p;
}

// scale indexes of the block; false if it is not finite, or above the range
static bool search_scales(const struct trit_lattice * lat, const float * x, const float * weight, uint8_t k[NG_TRIT]) {
    int top[NG_TRIT];
    int top_min = TRIT_N_POS;
    int top_max = -1;
    for (int g = 0; g < NG_TRIT; ++g) {
        float x_max = 0.0f;
        for (int i = 0; i < QG_TRIT; ++i) {
            if (!isfinite(x[QG_TRIT*g + i])) {
                return false;
            }
            x_max = MAX(x_max, fabsf(x[QG_TRIT*g + i]));
        }
        top[g] = x_max < TRIT_ZERO ? TRIT_N_POS : clipping_position(lat, x_max);
        if (top[g] < (g == 0 ? TRIT_POS_ANCHOR : 0)) {
            return false; // above the range
        }
        if (top[g] < TRIT_N_POS) {
            top_min = MIN(top_min, top[g]);
            top_max = MAX(top_max, top[g]);
        }
    }
    if (top_min == TRIT_N_POS) {
        memset(k, TRIT_N_SCALES/2, NG_TRIT); // zeros
        return true;
    }

    // Candidates: from one position above the clipping point of the largest group to some below that of the
    // smallest group; they include every compromise between groups that do not reach each other's scales.
    // The last anchor, which is that of a block below the range, ties the classes: each is there twice without clipping.
    const int first = MIN(MAX(top_min - 1, 0), TRIT_POS_LAST - 5);
    const int last  = MAX(MIN(top_max + lat->search_depth, TRIT_N_POS - 1), TRIT_POS_ANCHOR);
    float error[NG_TRIT][TRIT_N_POS];
    for (int g = 0; g < NG_TRIT; ++g) {
        for (int p = first; p <= last; ++p) {
            error[g][p] = group_error(lat, p, x + QG_TRIT*g, weight ? weight + QG_TRIT*g : NULL);
        }
    }

    float best = INFINITY;
    for (int p0 = MAX(first, TRIT_POS_ANCHOR); p0 <= MIN(last, TRIT_POS_LAST); ++p0) {
        const int n = p0 - TRIT_POS_ANCHOR;

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

static void nearest_codes(const struct trit_lattice * lat, int depth, const float * x, struct ggml_trit_block * block) {
    const float anchor = ggml_trit_anchor(depth, block->k);
    for (int g = 0; g < NG_TRIT; ++g) {
        const float scale = anchor * group_ratio(block->k, g);
        for (int i = QG_TRIT*g; i < QG_TRIT*(g + 1); ++i) {
            block->code[i] = (int8_t) (int) round_to_code(x[i]/scale, lat->code_max);
        }
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

// A tile of blocks: lane r has block r, lanes without a block are zero.
static void to_tile(float * GGML_RESTRICT tile, const float * GGML_RESTRICT x, int n_blocks) {
    if (n_blocks < TRIT_TILE) {
        memset(tile, 0, QK_TRIT*TRIT_TILE*sizeof(float));
    }
    for (int r = 0; r < n_blocks; ++r) {
        for (int i = 0; i < QK_TRIT; ++i) {
            tile[i*TRIT_TILE + r] = x[r*QK_TRIT + i];
        }
    }
}

// Scale indexes of up to 16 blocks, by the kernels. weight: of each entry of x, may be NULL.
static void search_tile(const struct trit_lattice * lat, const float * x, const float * weight, int n_blocks, uint8_t k[TRIT_TILE][NG_TRIT], bool found[TRIT_TILE]) {
    TRIT_ALIGNED float x_tile     [QK_TRIT*TRIT_TILE];
    TRIT_ALIGNED float weight_tile[QK_TRIT*TRIT_TILE];
    to_tile(x_tile, x, n_blocks);
    if (weight) {
        to_tile(weight_tile, weight, n_blocks);
    }
    trit_kernels()->search(lat, x_tile, weight ? weight_tile : NULL, k, found);
}

void ggml_trit_search(int depth, int64_t n_blocks, const float * x, const float * weight, uint8_t * k, bool * found) {
    struct trit_lattice lat;
    trit_init_lattice(&lat, depth);
    for (int64_t ib = 0; ib < n_blocks; ib += TRIT_TILE) {
        const int n = (int) MIN(n_blocks - ib, TRIT_TILE);
        uint8_t k_tile[TRIT_TILE][NG_TRIT];
        bool found_tile[TRIT_TILE];
        search_tile(&lat, x + ib*QK_TRIT, weight ? weight + ib*QK_TRIT : NULL, n, k_tile, found_tile);
        memcpy(k + ib*NG_TRIT, k_tile, n*NG_TRIT);
        memcpy(found + ib, found_tile, n*sizeof(bool));
    }
}

void ggml_trit_search_ref(int depth, int64_t n_blocks, const float * x, const float * weight, uint8_t * k, bool * found) {
    struct trit_lattice lat;
    trit_init_lattice(&lat, depth);
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        found[ib] = search_scales(&lat, x + ib*QK_TRIT, weight ? weight + ib*QK_TRIT : NULL, k + ib*NG_TRIT);
    }
}

static void quantize_rows(int depth, const float * GGML_RESTRICT x, uint16_t * GGML_RESTRICT words, int64_t n_rows, int64_t n_per_row, const float * GGML_RESTRICT imatrix) {
    assert(n_per_row % QK_TRIT == 0);

    struct trit_lattice lat;
    trit_init_lattice(&lat, depth);

    const bool    own_weights = !imatrix && depth <= TRIT_WEIGHTED_DEPTH;
    const int64_t n_per_row_blocks = n_per_row/QK_TRIT;
    const int64_t n_blocks = n_rows*n_per_row_blocks;
    float sigma2 = 0.0f;
    for (int64_t first = 0; first < n_blocks; first += TRIT_TILE, x += TRIT_TILE*QK_TRIT) {
        const int n = (int) MIN(n_blocks - first, TRIT_TILE);

        float weight[TRIT_TILE*QK_TRIT];
        for (int r = 0; r < n; ++r) {
            const int64_t column = (first + r) % n_per_row_blocks * QK_TRIT;
            const float * xr = x + r*QK_TRIT;
            float * w = weight + r*QK_TRIT;
            if (imatrix) {
                memcpy(w, imatrix + column, QK_TRIT*sizeof(float));
            } else if (own_weights) {
                sigma2 = column == 0 ? mean_square(xr, n_per_row) : sigma2;
                const bool weighted = sigma2 > 0.0f && isfinite(sigma2); // a row that is not finite will be refused
                for (int i = 0; i < QK_TRIT; ++i) {
                    w[i] = weighted ? 2.0f + xr[i]*xr[i]/sigma2 : 1.0f;
                }
            }
        }

        uint8_t k[TRIT_TILE][NG_TRIT];
        bool found[TRIT_TILE];
        search_tile(&lat, x, imatrix || own_weights ? weight : NULL, n, k, found);
        for (int r = 0; r < n; ++r, words += n_words[depth]) {
            if (!found[r]) {
                for (int l = 0; l < n_words[depth]; ++l) {
                    words[l] = 1; // not the encoding of any trits
                }
                continue;
            }
            struct ggml_trit_block block;
            memcpy(block.k, k[r], NG_TRIT);
            nearest_codes(&lat, depth, x + r*QK_TRIT, &block);
            ggml_trit_pack(depth, &block, words);
        }
    }
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
    struct trit_lattice lat;
    trit_init_lattice(&lat, depth);
    const float least = lat.scale[TRIT_POS_LAST]*lat.code_max;

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
    quantize_rows(depth, x, (uint16_t *) y, 1, k, NULL); \
} \
void dequantize_row_trit##depth(const block_trit##depth * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) { \
    dequantize_row(depth, (const uint16_t *) x, y, k); \
} \
size_t quantize_trit##depth(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) { \
    quantize_rows(depth, src, (uint16_t *) dst, nrows, n_per_row, imatrix); \
    return nrows * ggml_row_size(GGML_TYPE_TRIT##depth, n_per_row); \
}

TRIT_TYPE(1)
TRIT_TYPE(2)
TRIT_TYPE(3)
TRIT_TYPE(4)
