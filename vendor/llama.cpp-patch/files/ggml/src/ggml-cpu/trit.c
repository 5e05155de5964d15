#define GGML_COMMON_IMPL_C
#include "ggml-common.h"

#include "ggml-trit.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "trit.h"

#include <assert.h>
#include <string.h>

#define UNUSED GGML_UNUSED

static void vec_dot_generic(int depth, int n, float * GGML_RESTRICT s, const uint16_t * GGML_RESTRICT words, const block_q8_0 * GGML_RESTRICT y) {
    assert(n % QK_TRIT == 0);

    float sumf = 0.0f;

    for (int ib = 0; ib < n/QK_TRIT; ++ib, words += ggml_trit_n_words(depth)) {
        struct ggml_trit_block block;
        ggml_trit_unpack(depth, words, &block);

        // a block spans two blocks of activations, each of them two groups
        int32_t sumi[2] = { 0, 0 };
        for (int g = 0; g < NG_TRIT; ++g) {
            const int8_t * code = block.code + QG_TRIT*g;
            const int8_t * qs   = y[2*ib + g/2].qs + QG_TRIT*(g%2);

            int32_t sumg = 0;
            for (int i = 0; i < QG_TRIT; ++i) {
                sumg += code[i]*qs[i];
            }
            sumi[g/2] += sumg*(g == 0 ? TRIT_RATIO_ONE : ggml_trit_ratio[block.k[g]]);
        }

        const float d0 = GGML_CPU_FP16_TO_FP32(y[2*ib + 0].d);
        const float d1 = GGML_CPU_FP16_TO_FP32(y[2*ib + 1].d);
        sumf += ggml_trit_anchor(depth, block.k)*(d0*sumi[0] + d1*sumi[1]);
    }

    *s = sumf;
}

#define TRIT_TYPE(depth) \
void quantize_row_trit##depth(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) { \
    quantize_row_trit##depth##_ref(x, y, k); \
} \
void ggml_vec_dot_trit##depth##_q8_0_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
    assert(nrc == 1); \
    UNUSED(nrc); \
    UNUSED(bx); \
    UNUSED(by); \
    UNUSED(bs); \
    vec_dot_generic(depth, n, s, vx, vy); \
}

TRIT_TYPE(1)
TRIT_TYPE(2)
TRIT_TYPE(3)
TRIT_TYPE(4)

static inline void interleave(int depth, int64_t n_blocks, int n_rows, const char * GGML_RESTRICT x, size_t row_size, char * GGML_RESTRICT strip) {
    // rows in the order of their place in a quad
    static const int order[TRIT_STRIP] = { 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15 };

    const size_t block_size = TRIT_WORDS(depth)*sizeof(uint16_t);
    const size_t quads_size = block_size/8*8;
    const size_t pair_size  = (block_size - quads_size)/4*4;
    const size_t rest_size  = block_size - quads_size - pair_size;

    for (int64_t ib = 0; ib < n_blocks; ++ib, x += block_size, strip += TRIT_STRIP*block_size) {
        for (int i = 0; i < TRIT_STRIP; ++i) {
            const char * src = x + MIN(order[i], n_rows - 1)*row_size;
            for (size_t offset = 0; offset < quads_size; offset += 8) {
                memcpy(strip + TRIT_STRIP*offset + 8*i, src + offset, 8);
            }
            src = x + MIN(i, n_rows - 1)*row_size + quads_size;
            memcpy(strip + TRIT_STRIP*quads_size + pair_size*i, src, pair_size);
            memcpy(strip + TRIT_STRIP*(quads_size + pair_size) + rest_size*i, src + pair_size, rest_size);
        }
    }
}

void ggml_trit_interleave_generic(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size, void * GGML_RESTRICT strip) {
    switch (depth) {
        case 1: interleave(1, n_blocks, n_rows, x, row_size, strip); break;
        case 2: interleave(2, n_blocks, n_rows, x, row_size, strip); break;
        case 3: interleave(3, n_blocks, n_rows, x, row_size, strip); break;
        case 4: interleave(4, n_blocks, n_rows, x, row_size, strip); break;
    }
}

#ifdef GGML_TRIT_GEMM

void ggml_trit_gemm_rows_generic(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    const size_t block_size = TRIT_WORDS(depth)*sizeof(uint16_t);

    // some blocks at a time, which stay in the first cache
    uint16_t strip[TRIT_TILE_BLOCKS*TRIT_STRIP*TRIT_WORDS(4)];
    for (int64_t ib = 0; ib < n_blocks; ib += TRIT_TILE_BLOCKS) {
        const int64_t n = MIN(TRIT_TILE_BLOCKS, n_blocks - ib);
        ggml_trit_interleave(depth, n, n_rows, (const char *) x + ib*block_size, row_size, strip);
        ggml_trit_gemm_strip(depth, n, strip, n_cols, y, y_block0 + ib, s, row0, accumulate || ib > 0);
    }
}

#endif

// other architectures have no vector code
#if !defined(__x86_64__) && !defined(__i386__) && !defined(_M_IX86) && !defined(_M_X64) && \
    !defined(__aarch64__) && !defined(__arm__) && !defined(_M_ARM) && !defined(_M_ARM64)
#define TRIT_VEC_DOT(depth) \
void ggml_vec_dot_trit##depth##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
    ggml_vec_dot_trit##depth##_q8_0_generic(n, s, bs, vx, bx, vy, by, nrc); \
}

TRIT_VEC_DOT(1)
TRIT_VEC_DOT(2)
TRIT_VEC_DOT(3)
TRIT_VEC_DOT(4)
#endif
