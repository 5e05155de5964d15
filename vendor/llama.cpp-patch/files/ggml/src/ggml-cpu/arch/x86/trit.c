#define GGML_COMMON_IMPL_C
#include "ggml-common.h"

#include "ggml-trit.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "trit.h"

#include <assert.h>

#define UNUSED GGML_UNUSED

#if defined(__AVX2__)

// Vectors of 16-bit lanes throughout: lane l of a vector of words is word l, digit j of all lanes is two multiplies.

static inline __m128i load_words_8(const uint16_t * words) {
    return _mm_loadu_si128((const __m128i *) words);
}

// digit j0 of the words in the lower half, digit j1 in the upper half; p0 = 9^j0, p1 = 9^j1
static inline __m256i two_digits(__m128i words, int p0, int p1) {
    const __m256i pow9 = _mm256_set_m128i(_mm_set1_epi16((short) p1), _mm_set1_epi16((short) p0));
    const __m256i frac = _mm256_mullo_epi16(_mm256_broadcastsi128_si256(words), pow9);
    return _mm256_mulhi_epu16(frac, _mm256_set1_epi16(9));
}

static inline __m128i one_digit(__m128i words, int p) {
    return _mm_mulhi_epu16(_mm_mullo_epi16(words, _mm_set1_epi16((short) p)), _mm_set1_epi16(9));
}

// upper (digit div 3) and lower (digit mod 3) trit of digits 0..8, as 0..2
static inline __m256i upper_trit(__m256i digit) {
    return _mm256_mulhi_epu16(digit, _mm256_set1_epi16(21846)); // ceil(2^16 / 3)
}

static inline __m256i lower_trit(__m256i digit) {
    return _mm256_sub_epi16(digit, _mm256_mullo_epi16(upper_trit(digit), _mm256_set1_epi16(3)));
}

// scale indexes from the scale line, the digits 4 of 6 words
static inline void scale_indexes(__m128i line, uint8_t k[NG_TRIT]) {
    uint16_t d[8];
    _mm_storeu_si128((__m128i *) d, line);
    k[0] = 3*d[0] + d[4]/3;
    k[1] = 3*d[1] + d[4]%3;
    k[2] = 3*d[2] + d[5]/3;
    k[3] = 3*d[3] + d[5]%3;
}

// digits 0..3 of 8 words, in the order of the 32 weights they pair: trits of weights 0..31 and 32..63
static inline void unpack_pairs(__m256i digits01, __m256i digits23, __m256i trit[NG_TRIT]) {
    const __m256i one = _mm256_set1_epi16(1);
    trit[0] = _mm256_sub_epi16(upper_trit(digits01), one);
    trit[1] = _mm256_sub_epi16(upper_trit(digits23), one);
    trit[2] = _mm256_sub_epi16(lower_trit(digits01), one);
    trit[3] = _mm256_sub_epi16(lower_trit(digits23), one);
}

static inline void unpack_trit1(const uint16_t * words, __m256i code[NG_TRIT], uint8_t k[NG_TRIT]) {
    const __m128i w = load_words_8(words);
    unpack_pairs(two_digits(w, 1, 9), two_digits(w, 81, 729), code);
    scale_indexes(one_digit(w, 6561), k);
}

static inline void unpack_trit2(const uint16_t * words, __m256i code[NG_TRIT], uint8_t k[NG_TRIT]) {
    const __m256i four = _mm256_set1_epi16(4);

    const __m128i a = load_words_8(words);
    const __m256i a01 = two_digits(a, 1, 9);
    const __m256i a23 = two_digits(a, 81, 729);
    const __m128i a4  = one_digit(a, 6561);

    // the six words of B, loaded from within the block; lanes 6 and 7 get garbage
    const __m128i b = _mm_srli_si128(load_words_8(words + 6), 4);
    const __m256i b01 = two_digits(b, 1, 9);
    const __m256i b23 = two_digits(b, 81, 729);

    // lanes 6, 7 of row j come from digit 3, lanes 2j, 2j + 1
    const __m128i b3 = _mm256_extracti128_si256(b23, 1);
    const __m128i r0 = _mm_blend_epi16(_mm256_castsi256_si128(b01),      _mm_slli_si128(b3, 12),    0xc0);
    const __m128i r1 = _mm_blend_epi16(_mm256_extracti128_si256(b01, 1), _mm_slli_si128(b3,  8),    0xc0);
    const __m128i r2 = _mm_blend_epi16(_mm256_castsi256_si128(b23),      _mm_slli_si128(b3,  4),    0xc0);

    code[0] = _mm256_sub_epi16(a01, four);
    code[1] = _mm256_sub_epi16(a23, four);
    code[2] = _mm256_sub_epi16(_mm256_set_m128i(r0, a4), four);
    code[3] = _mm256_sub_epi16(_mm256_set_m128i(r2, r1), four);

    scale_indexes(one_digit(b, 6561), k);
}

static inline void unpack_trit3(const uint16_t * words, __m256i code[NG_TRIT], uint8_t k[NG_TRIT]) {
    unpack_trit2(words, code, k);

    // the seven words of C, loaded from within the block; lane 7 of row j comes from digit 4, lane j
    const __m128i c  = _mm_srli_si128(load_words_8(words + 13), 2);
    const __m128i c4 = one_digit(c, 6561);
    const __m256i c01 = _mm256_blend_epi16(two_digits(c,  1,   9), _mm256_set_m128i(_mm_slli_si128(c4, 12), _mm_slli_si128(c4, 14)), 0x80);
    const __m256i c23 = _mm256_blend_epi16(two_digits(c, 81, 729), _mm256_set_m128i(_mm_slli_si128(c4,  8), _mm_slli_si128(c4, 10)), 0x80);

    __m256i trit[NG_TRIT];
    unpack_pairs(c01, c23, trit);
    for (int g = 0; g < NG_TRIT; ++g) {
        code[g] = _mm256_add_epi16(_mm256_mullo_epi16(code[g], _mm256_set1_epi16(3)), trit[g]);
    }
}

static inline void unpack_trit4(const uint16_t * words, __m256i code[NG_TRIT], uint8_t k[NG_TRIT]) {
    unpack_trit2(words, code, k);

    const __m128i a = load_words_8(words + 14);
    const __m128i a4 = one_digit(a, 6561);

    // five words hold weights 40..63 in rows of five, the last digit is reserved
    const __m128i b = _mm_srli_si128(load_words_8(words + 19), 6);
    const __m128i row0 = one_digit(b, 1);
    const __m128i row1 = one_digit(b, 9);
    const __m128i row2 = one_digit(b, 81);
    const __m128i row3 = one_digit(b, 729);
    const __m128i row4 = one_digit(b, 6561);

    // rows of five regrouped to rows of eight: 0 0 0 0 0 1 1 1 | 1 1 2 2 2 2 2 3 | 3 3 3 3 4 4 4 4
    const __m128i r0 = _mm_blend_epi16(row0, _mm_slli_si128(row1, 10), 0xe0);
    const __m128i r1 = _mm_blend_epi16(_mm_blend_epi16(_mm_srli_si128(row1, 6), _mm_slli_si128(row2, 4), 0x7c), _mm_slli_si128(row3, 14), 0x80);
    const __m128i r2 = _mm_blend_epi16(_mm_srli_si128(row3, 2), _mm_slli_si128(row4, 8), 0xf0);

    const __m256i lower[NG_TRIT] = { two_digits(a, 1, 9), two_digits(a, 81, 729), _mm256_set_m128i(r0, a4), _mm256_set_m128i(r2, r1) };
    for (int g = 0; g < NG_TRIT; ++g) {
        code[g] = _mm256_add_epi16(_mm256_mullo_epi16(code[g], _mm256_set1_epi16(9)), _mm256_sub_epi16(lower[g], _mm256_set1_epi16(4)));
    }
}

static inline int32_t hsum_i32_8(__m256i a) {
    const __m128i sum4 = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i sum2 = _mm_add_epi32(sum4, _mm_unpackhi_epi64(sum4, sum4));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum2, _mm_shuffle_epi32(sum2, 1)));
}

// dot product of a group, times its ratio
static inline __m256i group_dot(__m256i code, const int8_t * qs, int ratio) {
    const __m256i q = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) qs));
    return _mm256_mullo_epi32(_mm256_madd_epi16(code, q), _mm256_set1_epi32(ratio));
}

#define TRIT_VEC_DOT(depth) \
void ggml_vec_dot_trit##depth##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
    assert(n % QK_TRIT == 0); \
    assert(nrc == 1); \
    UNUSED(nrc); \
    UNUSED(bx); \
    UNUSED(by); \
    UNUSED(bs); \
    \
    const block_trit##depth * GGML_RESTRICT x = vx; \
    const block_q8_0 * GGML_RESTRICT y = vy; \
    \
    float sumf = 0.0f; \
    for (int ib = 0; ib < n/QK_TRIT; ++ib) { \
        __m256i code[NG_TRIT]; \
        uint8_t k[NG_TRIT]; \
        unpack_trit##depth(x[ib].qs, code, k); \
        \
        const block_q8_0 * y0 = y + 2*ib; \
        const block_q8_0 * y1 = y0 + 1; \
        const int32_t sumi0 = hsum_i32_8(_mm256_add_epi32( \
            group_dot(code[0], y0->qs,           TRIT_RATIO_ONE), \
            group_dot(code[1], y0->qs + QG_TRIT, ggml_trit_ratio[k[1]]))); \
        const int32_t sumi1 = hsum_i32_8(_mm256_add_epi32( \
            group_dot(code[2], y1->qs,           ggml_trit_ratio[k[2]]), \
            group_dot(code[3], y1->qs + QG_TRIT, ggml_trit_ratio[k[3]]))); \
        \
        const float d0 = GGML_CPU_FP16_TO_FP32(y0->d); \
        const float d1 = GGML_CPU_FP16_TO_FP32(y1->d); \
        sumf += ggml_trit_anchor(depth, k)*(d0*sumi0 + d1*sumi1); \
    } \
    *s = sumf; \
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
