// Dot products of single rows of the balanced-ternary types on Arm. Four blocks of a row are unpacked together, as the
// matrix product does with a block of four rows.

#define GGML_COMMON_IMPL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "trit.h"

#include <assert.h>

#define UNUSED GGML_UNUSED

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "trit-neon.h"

// activations of four blocks of weights: q[i] has those of weights 4i..4i+3, for each block
struct block_columns {
    int8x16_t   q[16];
    float32x4_t d[2];
};

TRIT_INLINE void transpose(const block_q8_0 * const * y, int half, int g, int8x16_t * q) {
    int32x4_t row[TRIT_LANES];
    TRIT_UNROLL
    for (int r = 0; r < TRIT_LANES; ++r) {
        row[r] = vreinterpretq_s32_s8(vld1q_s8(y[r][half].qs + QG_TRIT*(g%2)));
    }
    const int64x2_t a0 = vreinterpretq_s64_s32(vzip1q_s32(row[0], row[1]));
    const int64x2_t a1 = vreinterpretq_s64_s32(vzip2q_s32(row[0], row[1]));
    const int64x2_t b0 = vreinterpretq_s64_s32(vzip1q_s32(row[2], row[3]));
    const int64x2_t b1 = vreinterpretq_s64_s32(vzip2q_s32(row[2], row[3]));
    q[0] = vreinterpretq_s8_s64(vzip1q_s64(a0, b0));
    q[1] = vreinterpretq_s8_s64(vzip2q_s64(a0, b0));
    q[2] = vreinterpretq_s8_s64(vzip1q_s64(a1, b1));
    q[3] = vreinterpretq_s8_s64(vzip2q_s64(a1, b1));
}

// blocks [0, n) of y, n > 0; where four are too many, the last one stands in with a scale of zero
TRIT_INLINE void load_columns(const block_q8_0 * y, int n, struct block_columns * cols) {
    const block_q8_0 * block[TRIT_LANES];
    float d[2][TRIT_LANES];
    for (int r = 0; r < TRIT_LANES; ++r) {
        block[r] = y + 2*MIN(r, n - 1);
        for (int half = 0; half < 2; ++half) {
            d[half][r] = r < n ? GGML_CPU_FP16_TO_FP32(block[r][half].d) : 0.0f;
        }
    }
    TRIT_UNROLL
    for (int g = 0; g < NG_TRIT; ++g) {
        transpose(block, g/2, g, cols->q + 4*g);
    }
    cols->d[0] = vld1q_f32(d[0]);
    cols->d[1] = vld1q_f32(d[1]);
}

TRIT_INLINE float vec_dot(int depth, int n, const uint16_t * GGML_RESTRICT x, const block_q8_0 * GGML_RESTRICT y) {
    assert(n % QK_TRIT == 0);

    struct scale_tables tables;
    init_scale_tables(depth, &tables);
    const int n_blocks   = n/QK_TRIT;
    const int block_size = TRIT_WORDS(depth)*sizeof(uint16_t);

    float32x4_t acc = vdupq_n_f32(0.0f);
    for (int ib = 0; ib < n_blocks; ib += TRIT_STRIP) {
        // a strip whose rows are blocks of this row
        const int n_rows = MIN(TRIT_STRIP, n_blocks - ib);
        uint16_t strip[TRIT_STRIP*sizeof(block_trit4)/sizeof(uint16_t)];
        ggml_trit_interleave(depth, 1, n_rows, x + ib*TRIT_WORDS(depth), block_size, strip);

        for (int lane0 = 0; lane0 < n_rows; lane0 += TRIT_LANES) {
            struct strip_block block;
            struct block_columns cols;
            unpack_block(depth, &tables, strip, lane0, &block);
            load_columns(y + 2*(ib + lane0), n_rows - lane0, &cols);

            int32x4_t isum[2];
            TRIT_UNROLL
            for (int g = 0; g < NG_TRIT; ++g) {
                const int32x4_t sum = dot_quads(depth, block.code + 4*g, cols.q + 4*g);
                isum[g/2] = g == 0 ? vmulq_n_s32(sum, TRIT_RATIO_ONE) :
                            g == 2 ? vmulq_s32(sum, block.ratio[g]) : vmlaq_s32(isum[g/2], sum, block.ratio[g]);
            }
            TRIT_UNROLL
            for (int half = 0; half < 2; ++half) {
                acc = vfmaq_f32(acc, vcvtq_f32_s32(isum[half]), vmulq_f32(block.anchor, cols.d[half]));
            }
        }
    }
    return vaddvq_f32(acc);
}

#define TRIT_VEC_DOT(depth) \
void ggml_vec_dot_trit##depth##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
    assert(nrc == 1); \
    UNUSED(nrc); \
    UNUSED(bx); \
    UNUSED(by); \
    UNUSED(bs); \
    *s = vec_dot(depth, n, vx, vy); \
}

#else

#define TRIT_VEC_DOT(depth) \
void ggml_vec_dot_trit##depth##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
    ggml_vec_dot_trit##depth##_q8_0_generic(n, s, bs, vx, bx, vy, by, nrc); \
}

#endif

TRIT_VEC_DOT(1)
TRIT_VEC_DOT(2)
TRIT_VEC_DOT(3)
TRIT_VEC_DOT(4)
