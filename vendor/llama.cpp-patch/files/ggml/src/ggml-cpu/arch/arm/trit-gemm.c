// Matrix product of the balanced-ternary types on AArch64: plain NEON, dotprod, i8mm.

#define GGML_COMMON_IMPL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "trit.h"

#include <assert.h>
#include <string.h>

#ifdef GGML_TRIT_GEMM

#include "trit-neon.h"

#define TRIT_PARTS    (TRIT_STRIP/TRIT_LANES) // of a strip, each of TRIT_LANES rows
#define TRIT_MAX_COLS 4 // more would not fit into the registers

//
// dot products
//

// of four rows of a group, whose codes are in four registers, and 16 activations
TRIT_INLINE int32x4_t dot_group(int depth, const int8x16_t * code, int8x16_t q) {
#if defined(__ARM_FEATURE_DOTPROD)
    (void) depth;
    int32x4_t sum = vdotq_laneq_s32(vdupq_n_s32(0), code[0], q, 0);
    sum = vdotq_laneq_s32(sum, code[1], q, 1);
    sum = vdotq_laneq_s32(sum, code[2], q, 2);
    return vdotq_laneq_s32(sum, code[3], q, 3);
#else
    const int32x4_t q32 = vreinterpretq_s32_s8(q);
    const int8x16_t q4[4] = {
        vreinterpretq_s8_s32(vdupq_laneq_s32(q32, 0)),
        vreinterpretq_s8_s32(vdupq_laneq_s32(q32, 1)),
        vreinterpretq_s8_s32(vdupq_laneq_s32(q32, 2)),
        vreinterpretq_s8_s32(vdupq_laneq_s32(q32, 3)),
    };
    return dot_quads(depth, code, q4);
#endif
}

// acc[c] += block x times block ib of column c
TRIT_INLINE void dot_block(int depth, const struct strip_block * x, int n_cols, const struct trit_activations * const * y, int64_t ib, float32x4_t * acc) {
    TRIT_UNROLL
    for (int c = 0; c < n_cols; ++c) {
        float32x4_t sumf = vdupq_n_f32(0.0f);
        TRIT_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int g = 2*half;
            const int8_t * qs = y[c][ib].qs + QG_TRIT*g;
            const int32x4_t sum0 = dot_group(depth, x->code + 4*g,     vld1q_s8(qs));
            const int32x4_t sum1 = dot_group(depth, x->code + 4*g + 4, vld1q_s8(qs + QG_TRIT));

            const int32x4_t isum0 = g == 0 ? vmulq_n_s32(sum0, TRIT_RATIO_ONE) : vmulq_s32(sum0, x->ratio[g]);
            const int32x4_t isum  = vmlaq_s32(isum0, sum1, x->ratio[g + 1]);
            const float32x4_t s = vcvtq_f32_s32(isum);
            sumf = half == 0 ? vmulq_n_f32(s, y[c][ib].d[half]) : vfmaq_n_f32(sumf, s, y[c][ib].d[half]);
        }
        acc[c] = vfmaq_f32(acc[c], x->anchor, sumf);
    }
}

TRIT_INLINE float32x4_t first_sums(const float * s, bool accumulate) {
    return accumulate ? vld1q_f32(s) : vdupq_n_f32(0.0f);
}

// The next strip follows in memory, so that one can be fetched across the ends of strips and pages, where the hardware stops.
TRIT_INLINE void prefetch_block(int depth, const uint16_t * words) {
    const char * ahead = (const char *) words + TRIT_PREFETCH;
    TRIT_UNROLL
    for (int i = 0; i < TRIT_STRIP*TRIT_WORDS(depth)*2; i += 64) {
        __builtin_prefetch(ahead + i);
    }
}

// few columns: blocks are unpacked to registers
TRIT_INLINE void stream_columns(int depth, int64_t n_blocks, const uint16_t * words,
        int n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    struct scale_tables tables;
    init_scale_tables(depth, &tables);

    float32x4_t acc[TRIT_PARTS][TRIT_FEW_COLUMNS];
    TRIT_UNROLL
    for (int i = 0; i < TRIT_PARTS; ++i) {
        TRIT_UNROLL
        for (int c = 0; c < n_cols; ++c) {
            acc[i][c] = first_sums(s[c] + row0 + i*TRIT_LANES, accumulate);
        }
    }
    for (int64_t ib = 0; ib < n_blocks; ++ib, words += TRIT_STRIP*TRIT_WORDS(depth)) {
        prefetch_block(depth, words);
        // not unrolled: compilers would mix the parts and run out of registers
        for (int i = 0; i < TRIT_PARTS; ++i) {
            struct strip_block x;
            unpack_block(depth, &tables, words, i*TRIT_LANES, &x);
            dot_block(depth, &x, n_cols, y, y_block0 + ib, acc[i]);
        }
    }
    TRIT_UNROLL
    for (int i = 0; i < TRIT_PARTS; ++i) {
        TRIT_UNROLL
        for (int c = 0; c < n_cols; ++c) {
            vst1q_f32(s[c] + row0 + i*TRIT_LANES, acc[i][c]);
        }
    }
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

#define TRIT_MAX_PAIRS (TRIT_MAX_COLS/2)

// A block of TRIT_LANES rows, for smmla: it multiplies 8 weights of two rows with those of two columns, and adds to
// the sums of (row 0, column 0), (row 0, column 1), (row 1, column 0), (row 1, column 1).
struct row_pairs {
    int8x16_t   code[2][8]; // of weights 8i..8i+7 of two rows
    int32x4_t   ratio[2][NG_TRIT];
    float32x4_t anchor[2];
};

// a block of two columns
struct column_pair {
    int8x16_t   qs[8]; // of weights 8i..8i+7
    float32x4_t d[2];
};

TRIT_INLINE void pair_rows(const struct strip_block * x, struct row_pairs * y) {
    TRIT_UNROLL
    for (int i = 0; i < 8; ++i) {
        const int32x4_t a = vreinterpretq_s32_s8(x->code[2*i]);
        const int32x4_t b = vreinterpretq_s32_s8(x->code[2*i + 1]);
        y->code[0][i] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        y->code[1][i] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
    TRIT_UNROLL
    for (int g = 1; g < NG_TRIT; ++g) {
        y->ratio[0][g] = vzip1q_s32(x->ratio[g], x->ratio[g]);
        y->ratio[1][g] = vzip2q_s32(x->ratio[g], x->ratio[g]);
    }
    y->anchor[0] = vzip1q_f32(x->anchor, x->anchor);
    y->anchor[1] = vzip2q_f32(x->anchor, x->anchor);
}

TRIT_INLINE void pair_columns(const struct trit_activations * x0, const struct trit_activations * x1, struct column_pair * y) {
    TRIT_UNROLL
    for (int g = 0; g < NG_TRIT; ++g) {
        const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(x0->qs + QG_TRIT*g));
        const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(x1->qs + QG_TRIT*g));
        y->qs[2*g + 0] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
        y->qs[2*g + 1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
    }
    const float32x2_t d0 = vld1_f32(x0->d);
    const float32x2_t d1 = vld1_f32(x1->d);
    y->d[0] = vcombine_f32(vzip1_f32(d0, d1), vzip1_f32(d0, d1));
    y->d[1] = vcombine_f32(vzip2_f32(d0, d1), vzip2_f32(d0, d1));
}

// acc[c][i] += row pair i of block x times column pair c, whose blocks follow those of the pair before
TRIT_INLINE void dot_pairs(const struct row_pairs * x, int n_pairs, const struct column_pair * y, float32x4_t acc[][2]) {
    TRIT_UNROLL
    for (int c = 0; c < n_pairs; ++c) {
        TRIT_UNROLL
        for (int i = 0; i < 2; ++i) {
            float32x4_t sumf = vdupq_n_f32(0.0f);
            TRIT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int g = 2*half;
                const int8x16_t * qs = y[c*TRIT_TILE_BLOCKS].qs + 2*g;
                const int8x16_t * code = x->code[i] + 2*g;
                const int32x4_t sum0 = vmmlaq_s32(vmmlaq_s32(vdupq_n_s32(0), code[0], qs[0]), code[1], qs[1]);
                const int32x4_t sum1 = vmmlaq_s32(vmmlaq_s32(vdupq_n_s32(0), code[2], qs[2]), code[3], qs[3]);

                const int32x4_t isum0 = g == 0 ? vmulq_n_s32(sum0, TRIT_RATIO_ONE) : vmulq_s32(sum0, x->ratio[i][g]);
                const int32x4_t isum  = vmlaq_s32(isum0, sum1, x->ratio[i][g + 1]);
                const float32x4_t s = vcvtq_f32_s32(isum);
                const float32x4_t d = y[c*TRIT_TILE_BLOCKS].d[half];
                sumf = half == 0 ? vmulq_f32(s, d) : vfmaq_f32(sumf, s, d);
            }
            acc[c][i] = vfmaq_f32(acc[c][i], x->anchor[i], sumf);
        }
    }
}

// a tile times n_pairs pairs of columns; the last pair may have but one
TRIT_INLINE void tile_columns(int64_t n_blocks, const struct row_pairs * tile,
        int n_pairs, int n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    struct column_pair cols[TRIT_MAX_PAIRS*TRIT_TILE_BLOCKS];
    for (int c = 0; c < n_pairs; ++c) {
        const struct trit_activations * y0 = y[2*c] + y_block0;
        const struct trit_activations * y1 = y[MIN(2*c + 1, n_cols - 1)] + y_block0;
        for (int64_t ib = 0; ib < n_blocks; ++ib) {
            pair_columns(y0 + ib, y1 + ib, cols + c*TRIT_TILE_BLOCKS + ib);
        }
    }
    for (int i = 0; i < TRIT_PARTS; ++i) {
        float32x4_t acc[TRIT_MAX_PAIRS][2];
        TRIT_UNROLL
        for (int c = 0; c < n_pairs; ++c) {
            const float32x4_t s0 = first_sums(s[2*c]                      + row0 + i*TRIT_LANES, accumulate);
            const float32x4_t s1 = first_sums(s[MIN(2*c + 1, n_cols - 1)] + row0 + i*TRIT_LANES, accumulate);
            acc[c][0] = vzip1q_f32(s0, s1);
            acc[c][1] = vzip2q_f32(s0, s1);
        }
        for (int64_t ib = 0; ib < n_blocks; ++ib) {
            dot_pairs(tile + ib*TRIT_PARTS + i, n_pairs, cols + ib, acc);
        }
        for (int c = 0; c < n_cols; ++c) {
            const float32x4_t sums = c%2 == 0 ? vuzp1q_f32(acc[c/2][0], acc[c/2][1]) : vuzp2q_f32(acc[c/2][0], acc[c/2][1]);
            vst1q_f32(s[c] + row0 + i*TRIT_LANES, sums);
        }
    }
}

// many columns: a tile is unpacked to memory
TRIT_INLINE void multiply_tile(int depth, int64_t n_blocks, const uint16_t * words,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    struct scale_tables tables;
    init_scale_tables(depth, &tables);

    struct row_pairs tile[TRIT_TILE_BLOCKS*TRIT_PARTS];
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        for (int i = 0; i < TRIT_PARTS; ++i) {
            struct strip_block x;
            unpack_block(depth, &tables, words + ib*TRIT_STRIP*TRIT_WORDS(depth), i*TRIT_LANES, &x);
            pair_rows(&x, tile + ib*TRIT_PARTS + i);
        }
    }
    int64_t c = 0;
    for (; c + TRIT_MAX_COLS <= n_cols; c += TRIT_MAX_COLS) {
        tile_columns(n_blocks, tile, TRIT_MAX_PAIRS, TRIT_MAX_COLS, y + c, y_block0, s + c, row0, accumulate);
    }
    for (; c < n_cols; c += 2) {
        tile_columns(n_blocks, tile, 1, (int) MIN(2, n_cols - c), y + c, y_block0, s + c, row0, accumulate);
    }
}

#else

TRIT_INLINE void tile_columns(int depth, int64_t n_blocks, const struct strip_block * tile,
        int n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    float32x4_t acc[TRIT_MAX_COLS];
    TRIT_UNROLL
    for (int c = 0; c < n_cols; ++c) {
        acc[c] = first_sums(s[c] + row0, accumulate);
    }
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        dot_block(depth, tile + ib, n_cols, y, y_block0 + ib, acc);
    }
    TRIT_UNROLL
    for (int c = 0; c < n_cols; ++c) {
        vst1q_f32(s[c] + row0, acc[c]);
    }
}

// many columns: blocks are unpacked to memory
TRIT_INLINE void multiply_tile(int depth, int64_t n_blocks, const uint16_t * words,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    struct scale_tables tables;
    init_scale_tables(depth, &tables);

    for (int lane0 = 0; lane0 < TRIT_STRIP; lane0 += TRIT_LANES) {
        struct strip_block tile[TRIT_TILE_BLOCKS];
        for (int64_t ib = 0; ib < n_blocks; ++ib) {
            unpack_block(depth, &tables, words + ib*TRIT_STRIP*TRIT_WORDS(depth), lane0, tile + ib);
        }
        int64_t c = 0;
        for (; c + TRIT_MAX_COLS <= n_cols; c += TRIT_MAX_COLS) {
            tile_columns(depth, n_blocks, tile, TRIT_MAX_COLS, y + c, y_block0, s + c, row0 + lane0, accumulate);
        }
        for (; c < n_cols; ++c) {
            tile_columns(depth, n_blocks, tile, 1, y + c, y_block0, s + c, row0 + lane0, accumulate);
        }
    }
}

#endif

TRIT_INLINE void gemm_strip(int depth, int64_t n_blocks, const uint16_t * words,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    switch (n_cols) {
        case 1: stream_columns(depth, n_blocks, words, 1, y, y_block0, s, row0, accumulate); return;
        case 2: stream_columns(depth, n_blocks, words, 2, y, y_block0, s, row0, accumulate); return;
        case 3: stream_columns(depth, n_blocks, words, 3, y, y_block0, s, row0, accumulate); return;
        case 4: stream_columns(depth, n_blocks, words, 4, y, y_block0, s, row0, accumulate); return;
    }
    assert(n_blocks <= TRIT_TILE_BLOCKS);
    multiply_tile(depth, n_blocks, words, n_cols, y, y_block0, s, row0, accumulate);
}

// codes are signed: there is no offset to undo
void ggml_trit_prepare_activations(int depth, int64_t n_blocks, const block_q8_0 * GGML_RESTRICT x, struct trit_activations * GGML_RESTRICT y) {
    (void) depth;
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        for (int half = 0; half < 2; ++half) {
            const block_q8_0 * b = x + 2*ib + half;
            y[ib].d[half] = GGML_CPU_FP16_TO_FP32(b->d);
            memcpy(y[ib].qs + QK8_0*half, b->qs, QK8_0);
        }
        memset(y[ib].bias, 0, sizeof(y[ib].bias));
    }
}

void ggml_trit_gemm_strip(int depth, int64_t n_blocks, const void * GGML_RESTRICT strip,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    switch (depth) {
        case 1: gemm_strip(1, n_blocks, strip, n_cols, y, y_block0, s, row0, accumulate); break;
        case 2: gemm_strip(2, n_blocks, strip, n_cols, y, y_block0, s, row0, accumulate); break;
        case 3: gemm_strip(3, n_blocks, strip, n_cols, y, y_block0, s, row0, accumulate); break;
        case 4: gemm_strip(4, n_blocks, strip, n_cols, y, y_block0, s, row0, accumulate); break;
    }
}

void ggml_trit_interleave(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size, void * GGML_RESTRICT strip) {
    ggml_trit_interleave_generic(depth, n_blocks, n_rows, x, row_size, strip);
}

void ggml_trit_gemm_rows(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    ggml_trit_gemm_rows_generic(depth, n_blocks, n_rows, x, row_size, n_cols, y, y_block0, s, row0, accumulate);
}

#endif
