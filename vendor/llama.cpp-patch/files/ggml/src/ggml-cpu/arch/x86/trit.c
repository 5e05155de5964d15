// Dot products of the balanced-ternary types on x86: AVX2.
//
// A word is a fixed-point fraction; multiplying it by 3^j drops its first j trits, multiplying the rest by 3^n gives
// the next n trits in the upper half of the product. So a lane can take any digit of any word in two multiplications.
// Codes are unsigned here, their offset is undone after multiplying by the activations.

#include "ggml-trit.h"
#include "ggml-cpu-impl.h"
#include "trit.h"

#include <assert.h>
#include <string.h>

#define UNUSED GGML_UNUSED

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define TRIT_BATCH 8 // blocks whose scales are unpacked at a time, one in each lane of 32 bits

TRIT_INLINE int32_t load_pair(const uint16_t * words) {
    int32_t pair;
    memcpy(&pair, words, sizeof(pair));
    return pair;
}

TRIT_INLINE int64_t load_quad(const uint16_t * words) {
    int64_t quad;
    memcpy(&quad, words, sizeof(quad));
    return quad;
}

// values of 16-bit lanes: all the same, or one for each quad of lanes
#define ALL(x)            _mm256_set1_epi16(x)
#define QUAD(a, b, c, d)  ((int64_t) (a) | (int64_t) (b) << 16 | (int64_t) (c) << 32 | (int64_t) (d) << 48)
#define SAME(x)           QUAD(x, x, x, x)
#define QUADS(a, b, c, d) _mm256_setr_epi64x(SAME(a), SAME(b), SAME(c), SAME(d))

// the digits of a radix, a power of three, that follow the trits that a factor drops
TRIT_INLINE __m256i digits(__m256i words, __m256i factor, __m256i radix) {
    return _mm256_mulhi_epu16(_mm256_mullo_epi16(words, factor), radix);
}

TRIT_INLINE __m256i mul3_add(__m256i a, __m256i b) {
    return _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(a, a));
}

//
// scales
//

struct scales {
    uint8_t k[TRIT_BATCH][NG_TRIT];
    float   d[2][TRIT_BATCH]; // anchors times the scales of both blocks of activations
};

// block b of a batch; the last block stands in for those that are missing
#define BLOCK(b)          MIN(b, n_blocks - 1)
#define FOUR_BLOCKS(f, b) f(b), f(b + 1), f(b + 2), f(b + 3)

TRIT_INLINE __m256i gather_pairs(int depth, const uint16_t * words, int n_blocks) {
#define LOAD(b) load_pair(words + TRIT_WORDS(depth)*BLOCK(b))
    return _mm256_setr_epi32(FOUR_BLOCKS(LOAD, 0), FOUR_BLOCKS(LOAD, 4));
#undef LOAD
}

// of four blocks from b on
TRIT_INLINE __m256i gather_quads(int depth, const uint16_t * words, int n_blocks, int b) {
#define LOAD(b) load_quad(words + TRIT_WORDS(depth)*BLOCK(b))
    return _mm256_setr_epi64x(FOUR_BLOCKS(LOAD, b));
#undef LOAD
}

TRIT_INLINE __m256 gather_d(const block_q8_0 * y, int n_blocks) {
#define LOAD(b) (short) y[2*BLOCK(b)].d
    return _mm256_cvtph_ps(_mm_setr_epi16(FOUR_BLOCKS(LOAD, 0), FOUR_BLOCKS(LOAD, 4)));
#undef LOAD
}

// bytes k0..k3 of each block
TRIT_INLINE __m256i unpack_indexes(int depth, const uint16_t * words, int n_blocks) {
    if (depth == 2 || depth == 4) {
        // two indexes in each of two words
        const __m256i pairs = gather_pairs(depth, words + (depth == 2 ? 12 : 24), n_blocks);
        return _mm256_or_si256(digits(pairs, ALL(81), ALL(27)), _mm256_slli_epi16(digits(pairs, ALL(2187), ALL(27)), 8));
    }
    // the last trits of two or three quads
    __m256i k[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i q0 = gather_quads(depth, words + 0, n_blocks, 4*i);
        const __m256i q1 = gather_quads(depth, words + 4, n_blocks, 4*i);
        if (depth == 1) {
            k[i] = mul3_add(digits(q0, ALL(6561), ALL(9)), digits(q1, ALL(6561), ALL(3)));
        } else {
            const __m256i q2 = gather_quads(depth, words + 8, n_blocks, 4*i);
            k[i] = mul3_add(mul3_add(digits(q0, ALL(19683), ALL(3)), digits(q1, ALL(19683), ALL(3))), digits(q2, ALL(19683), ALL(3)));
        }
    }
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(k[0], k[1]), _MM_SHUFFLE(3, 1, 2, 0));
}

TRIT_INLINE __m256 unpack_anchors(int depth, __m256i k) {
    // n = 3*k0 + (k1 + k2 + k3) mod 3; to divide by 3 or 6 is to multiply by 2^16/3 or 2^16/6, the rest is a fraction
    const __m256i sum    = _mm256_madd_epi16(_mm256_maddubs_epi16(k, _mm256_set1_epi32(0x01010100)), ALL(1));
    const __m256i n      = _mm256_add_epi16(_mm256_maddubs_epi16(k, _mm256_set1_epi32(3)), digits(sum, ALL(21846), ALL(3)));
    const __m256i octave = _mm256_mulhi_epu16(n, ALL(10923));
    const __m256i sixth  = digits(n, ALL(10923), ALL(6));

    // a power of two less: the exponent of the float
    const __m256i top = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *) ggml_trit_anchor_octave[depth - 1]), sixth);
    return _mm256_castsi256_ps(_mm256_sub_epi32(top, _mm256_slli_epi32(octave, 23)));
}

TRIT_INLINE void unpack_scales(int depth, const uint16_t * words, const block_q8_0 * y, int n_blocks, struct scales * scales) {
    const __m256i k      = unpack_indexes(depth, words, n_blocks);
    const __m256  anchor = unpack_anchors(depth, k);
    _mm256_storeu_si256((__m256i *) scales->k, k);
    _mm256_storeu_ps(scales->d[0], _mm256_mul_ps(anchor, gather_d(y + 0, n_blocks)));
    _mm256_storeu_ps(scales->d[1], _mm256_mul_ps(anchor, gather_d(y + 1, n_blocks)));
}

//
// codes
//

TRIT_INLINE __m256i join(__m256i a, __m256i b, __m256i c, __m256i d) {
    return _mm256_blend_epi32(_mm256_blend_epi32(a, b, 0x0c), _mm256_blend_epi32(c, d, 0xc0), 0xf0);
}

// Codes of weights 0..31 and 32..63, a byte each. They are packed from two vectors of four quads of codes: to come out
// in order, the first has those from weights 0, 4, 16 and 20 on, the second those from weights 8, 12, 24 and 28 on.
TRIT_INLINE void unpack_codes(int depth, const uint16_t * words, __m256i code[2]) {
    __m256i q[6];
    for (int i = 0; i < TRIT_WORDS(depth)/4; ++i) {
        q[i] = _mm256_set1_epi64x(load_quad(words + 4*i));
    }
    const __m256i end = _mm256_set1_epi64x(load_quad(words + TRIT_WORDS(depth) - 4));

    if (depth == 1) {
        for (int i = 0; i < 2; ++i) {
            code[i] = _mm256_packus_epi16(
                digits(q[i], QUADS(1,  3,  81,  243), ALL(3)),
                digits(q[i], QUADS(9, 27, 729, 2187), ALL(3)));
        }
    } else if (depth == 2) {
        const __m256i last = _mm256_shufflehi_epi16(end, _MM_SHUFFLE(3, 3, 2, 2));
        code[0] = _mm256_packus_epi16(
            digits(join(q[0], q[0], q[0], q[1]), QUADS( 1,   9, 6561,  1), ALL(9)),
            digits(join(q[0], q[0], q[1], q[1]), QUADS(81, 729,    9, 81), ALL(9)));
        code[1] = _mm256_packus_epi16(
            digits(join(q[1], q[1], q[2], q[2]), QUADS(729, 6561, 81, 729), ALL(9)),
            digits(join(q[2], q[2], q[2], last), _mm256_setr_epi64x(SAME(1), SAME(9), SAME(6561), QUAD(1, 9, 1, 9)), ALL(9)));
    } else if (depth == 3) {
        const __m256i last = _mm256_shufflehi_epi16(end, _MM_SHUFFLE(3, 3, 3, 3));
        code[0] = _mm256_packus_epi16(
            digits(join(q[0], q[0], q[1], q[1]), QUADS(  1, 27, 27, 729), ALL(27)),
            digits(join(q[0], q[1], q[2], q[2]), QUADS(729,  1,  1,  27), ALL(27)));
        // the last four codes are two trits of the last word and one of the fourth quad
        const __m256i upper = digits(join(q[3], q[3], q[4], last), _mm256_setr_epi64x(SAME(27), SAME(729), SAME(729), QUAD(1, 9, 81, 729)), QUADS(27, 27, 27, 9));
        const __m256i lower = digits(q[3], QUADS(0, 0, 0, 19683), ALL(3));
        code[1] = _mm256_packus_epi16(
            digits(join(q[2], q[3], q[4], q[4]), QUADS(729, 1, 1, 27), ALL(27)),
            _mm256_add_epi16(_mm256_mullo_epi16(upper, QUADS(1, 1, 1, 3)), lower));
    } else {
        const __m256i last   = _mm256_shufflehi_epi16(end, _MM_SHUFFLE(3, 2, 3, 1));
        const __m256i factor = QUADS(1, 81, 1, 81);
        code[0] = _mm256_packus_epi16(
            digits(join(q[0], q[0], q[2], q[2]), factor, ALL(81)),
            digits(join(q[1], q[1], q[3], q[3]), factor, ALL(81)));
        // codes 48..59 are two trits of a quad and two of the next; quads of codes 32, 36, 40, 44 and 48, 52, 56, 60
        const __m256i upper = digits(join(q[0], q[2], q[4], last), _mm256_setr_epi64x(SAME(6561), SAME(6561), SAME(6561), QUAD(1, 1, 1, 81)), QUADS(9, 9, 9, 81));
        const __m256i lower = digits(join(q[1], q[3], q[5], q[5]), QUADS(6561, 6561, 6561, 0), ALL(9));
        code[1] = _mm256_permute4x64_epi64(_mm256_packus_epi16(
            digits(join(q[4], q[4], q[5], q[5]), factor, ALL(81)),
            _mm256_add_epi16(_mm256_mullo_epi16(upper, QUADS(9, 9, 9, 1)), lower)), _MM_SHUFFLE(3, 1, 2, 0));
    }
}

//
// dot products
//

// sums over four weights each, times the ratios of the two groups
TRIT_INLINE __m256i dot_32(__m256i code, __m256i offset, const int8_t * qs, int32_t ratio0, int32_t ratio1) {
    const __m256i q   = _mm256_loadu_si256((const __m256i *) qs);
    const __m256i sum = _mm256_sub_epi16(_mm256_maddubs_epi16(code, q), _mm256_maddubs_epi16(offset, q));
    return _mm256_madd_epi16(sum, _mm256_blend_epi32(_mm256_set1_epi32(ratio0), _mm256_set1_epi32(ratio1), 0xf0));
}

TRIT_INLINE void dot_batch(int depth, const uint16_t * words, const block_q8_0 * y, int n_blocks, const int32_t * ratio, __m256 acc[2]) {
    const __m256i offset = _mm256_set1_epi8(TRIT_OFFSET(depth));

    struct scales scales;
    unpack_scales(depth, words, y, n_blocks, &scales);

    for (int b = 0; b < n_blocks; ++b, words += TRIT_WORDS(depth), y += 2) {
        const uint8_t * k = scales.k[b];
        __m256i code[2];
        unpack_codes(depth, words, code);
        const __m256i sum0 = dot_32(code[0], offset, y[0].qs, 0x10001*TRIT_RATIO_ONE, ratio[k[1]]);
        const __m256i sum1 = dot_32(code[1], offset, y[1].qs, ratio[k[2]], ratio[k[3]]);
        acc[0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum0), _mm256_set1_ps(scales.d[0][b]), acc[0]);
        acc[1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum1), _mm256_set1_ps(scales.d[1][b]), acc[1]);
    }
}

static inline float hsum_f32_8(__m256 a) {
    const __m128 sum4 = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 sum2 = _mm_add_ps(sum4, _mm_movehl_ps(sum4, sum4));
    return _mm_cvtss_f32(_mm_add_ss(sum2, _mm_movehdup_ps(sum2)));
}

TRIT_INLINE float vec_dot(int depth, int n_blocks, const uint16_t * words, const block_q8_0 * y) {
    // twice in a lane, for two sums of 16 bits
    int32_t ratio[TRIT_N_SCALES];
    for (int k = 0; k < TRIT_N_SCALES; ++k) {
        ratio[k] = 0x10001*ggml_trit_ratio[k];
    }

    __m256 acc[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    for (; n_blocks >= TRIT_BATCH; n_blocks -= TRIT_BATCH) {
        dot_batch(depth, words, y, TRIT_BATCH, ratio, acc);
        words += TRIT_BATCH*TRIT_WORDS(depth);
        y     += TRIT_BATCH*2;
    }
    if (n_blocks > 0) {
        dot_batch(depth, words, y, n_blocks, ratio, acc);
    }
    return hsum_f32_8(_mm256_add_ps(acc[0], acc[1]));
}

#define TRIT_VEC_DOT(depth) \
void ggml_vec_dot_trit##depth##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
    assert(n % QK_TRIT == 0); \
    assert(nrc == 1); \
    UNUSED(nrc); \
    UNUSED(bx); \
    UNUSED(by); \
    UNUSED(bs); \
    *s = vec_dot(depth, n/QK_TRIT, vx, vy); \
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
