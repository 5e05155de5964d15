#define GGML_COMMON_IMPL_C
#include "ggml-common.h"

#include "ggml-trit.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "trit.h"

#include <assert.h>

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

#if !defined(__x86_64__) && !defined(__i386__) && !defined(_M_IX86) && !defined(_M_X64)
#define TRIT_VEC_DOT(depth) \
void ggml_vec_dot_trit##depth##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
    ggml_vec_dot_trit##depth##_q8_0_generic(n, s, bs, vx, bx, vy, by, nrc); \
}

TRIT_VEC_DOT(1)
TRIT_VEC_DOT(2)
TRIT_VEC_DOT(3)
TRIT_VEC_DOT(4)
#endif
