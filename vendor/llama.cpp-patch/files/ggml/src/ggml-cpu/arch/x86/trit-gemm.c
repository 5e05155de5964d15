// Matrix product of the balanced-ternary types on x86: SSE4.1, AVX, AVX2, AVX-VNNI, AVX-512, AVX-512 VNNI.
//
// A lane of 32 bits stands for a row of the strip. A word is a fixed-point fraction; multiplying it by 3^depth gives
// the next code in the upper half of the product and the rest of the fraction in the lower half. Codes are unsigned
// here, their offset is undone by the bias of the activations.

#define GGML_COMMON_IMPL_C
#include "ggml-common.h"

#include "ggml-trit.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "trit.h"

#include <assert.h>
#include <string.h>

#ifdef GGML_TRIT_GEMM

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define TRIT_LANES    16
#define TRIT_VECTOR_REGISTER "v"
#define TRIT_MAX_COLS 8
#define V(name)       _mm512_##name
typedef __m512i vint;
typedef __m512  vfloat;

TRIT_INLINE vint   v_load(const void * p)        { return _mm512_loadu_si512(p); }
TRIT_INLINE vint   v_or(vint a, vint b)          { return _mm512_or_si512(a, b); }
TRIT_INLINE vint   v_and(vint a, vint b)         { return _mm512_and_si512(a, b); }
TRIT_INLINE vint   v_upper_half(vint a, vint b)  { return _mm512_mask_blend_epi16(0xaaaaaaaa, a, b); } // of each lane from b
TRIT_INLINE vfloat v_as_float(vint a)            { return _mm512_castsi512_ps(a); }
TRIT_INLINE vint   v_table(__m128i t)            { return _mm512_broadcast_i32x4(t); }
TRIT_INLINE vint   v_lookup_8(const float * table, vint i) {
    return _mm512_permutexvar_epi32(i, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) table)));
}
TRIT_INLINE vint   v_load_twice(const void * p) { // each word
    return _mm512_permutexvar_epi16(
        _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0),
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) p)));
}
#elif defined(__AVX2__)
#define TRIT_LANES    8
#define TRIT_VECTOR_REGISTER "x"
#define TRIT_MAX_COLS 4
#define V(name)       _mm256_##name
typedef __m256i vint;
typedef __m256  vfloat;

TRIT_INLINE vint   v_load(const void * p)        { return _mm256_loadu_si256((const __m256i *) p); }
TRIT_INLINE vint   v_or(vint a, vint b)          { return _mm256_or_si256(a, b); }
TRIT_INLINE vint   v_and(vint a, vint b)         { return _mm256_and_si256(a, b); }
TRIT_INLINE vint   v_upper_half(vint a, vint b)  { return _mm256_blend_epi16(a, b, 0xaa); } // of each lane from b
TRIT_INLINE vfloat v_as_float(vint a)            { return _mm256_castsi256_ps(a); }
TRIT_INLINE vint   v_table(__m128i t)            { return _mm256_broadcastsi128_si256(t); }
TRIT_INLINE vint   v_lookup_8(const float * table, vint i) { return _mm256_permutevar8x32_epi32(v_load(table), i); }
TRIT_INLINE vint   v_load_twice(const void * p) { // each word
    return _mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)),
        _mm256_setr_epi8(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9, 10, 11, 10, 11, 12, 13, 12, 13, 14, 15, 14, 15));
}
#else
#define TRIT_LANES    4
#define TRIT_VECTOR_REGISTER "x"
#define TRIT_MAX_COLS 4
#define V(name)       _mm_##name
typedef __m128i vint;
typedef __m128  vfloat;

TRIT_INLINE vint   v_load(const void * p)        { return _mm_loadu_si128((const __m128i *) p); }
TRIT_INLINE vint   v_or(vint a, vint b)          { return _mm_or_si128(a, b); }
TRIT_INLINE vint   v_and(vint a, vint b)         { return _mm_and_si128(a, b); }
TRIT_INLINE vfloat v_as_float(vint a)            { return _mm_castsi128_ps(a); }
TRIT_INLINE vint   v_table(__m128i t)            { return t; }
TRIT_INLINE vint   v_lookup_8(const float * table, vint i) {
    return _mm_castps_si128(_mm_setr_ps(
        table[_mm_extract_epi16(i, 0)], table[_mm_extract_epi16(i, 2)], table[_mm_extract_epi16(i, 4)], table[_mm_extract_epi16(i, 6)]));
}
TRIT_INLINE vint   v_load_twice(const void * p) { // each word
    const __m128i words = _mm_loadl_epi64((const __m128i *) p);
    return _mm_unpacklo_epi16(words, words);
}
#endif

TRIT_INLINE vfloat v_multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__FMA__)
    return V(fmadd_ps)(a, b, c);
#else
    return V(add_ps)(V(mul_ps)(a, b), c);
#endif
}

#if (TRIT_LANES == 16 && defined(__AVX512VNNI__)) || (TRIT_LANES == 8 && defined(__AVXVNNI__))
#define TRIT_VNNI 1
#if TRIT_LANES == 16
#define v_dpbusd _mm512_dpbusd_epi32
#define v_dpwssd _mm512_dpwssd_epi32
#else
#define v_dpbusd _mm256_dpbusd_avx_epi32
#define v_dpwssd _mm256_dpwssd_avx_epi32
#endif
#else
#define TRIT_VNNI 0
#endif

// scales of a block of TRIT_LANES rows
struct strip_scales {
    vint   ratio[NG_TRIT]; // as scaled_sum needs them
    vfloat anchor;
};

struct strip_block {
    vint                code[16]; // of weights 4i..4i+3: a byte each, plus the offset
    struct strip_scales scales;
};

//
// products of codes
//

TRIT_INLINE vint broadcast_4(const int8_t * qs) {
    int32_t q;
    memcpy(&q, qs, sizeof(q));
    return V(set1_epi32)(q);
}

// VNNI: one sum of 32 bits a lane. Otherwise two of 16 bits, which hold a group, or half a group at depth 4.
TRIT_INLINE vint dot_4(vint sum, vint code, vint q) {
#if TRIT_VNNI
    return v_dpbusd(sum, code, q);
#else
    return V(add_epi16)(sum, V(maddubs_epi16)(code, q));
#endif
}

static inline int sums_per_group(int depth) {
    return depth == 4 && !TRIT_VNNI ? 2 : 1;
}

// What becomes of the codes of a block: they are kept, for many columns, or multiplied by few columns at once, so that
// they need no registers. The number of columns is no member but a parameter, 0 if codes are kept, for the compiler to know it.
struct sink {
    vint * code; // [16]
    const struct trit_activations * y[TRIT_FEW_COLUMNS];
    vint   sum[TRIT_FEW_COLUMNS][NG_TRIT*2]; // of groups, or of their halves
};

// codes first..first + n - 1
TRIT_INLINE void take_codes(int depth, int n_cols, struct sink * sink, int first, int n, const vint * code) {
    TRIT_UNROLL
    for (int i = 0; i < n; ++i) {
        if (n_cols == 0) {
            sink->code[first + i] = code[i];
            continue;
        }
        const int s = (first + i)*sums_per_group(depth)/4;
        TRIT_UNROLL
        for (int c = 0; c < n_cols; ++c) {
            sink->sum[c][s] = dot_4(sink->sum[c][s], code[i], broadcast_4(sink->y[c]->qs + 4*(first + i)));
        }
    }
}

//
// unpacking
//

// a factor whose value the compiler must not see: GCC would multiply by shifting and adding, which takes longer here
TRIT_INLINE vint factor(int x) {
    vint f = V(set1_epi16)(x);
#if defined(__GNUC__)
    __asm__("" : "+" TRIT_VECTOR_REGISTER (f));
#endif
    return f;
}

TRIT_INLINE vint field(vint q, int radix) { return V(mulhi_epu16)(q, factor(radix)); }
TRIT_INLINE vint rest (vint q, int radix) { return V(mullo_epi16)(q, factor(radix)); }

TRIT_INLINE vint mul3_add(vint a, vint b) { return V(add_epi16)(V(add_epi16)(a, b), V(add_epi16)(a, a)); }
TRIT_INLINE vint mul9_add(vint a, vint b) { return V(add_epi16)(V(add_epi16)(a, b), V(slli_epi16)(a, 3)); }

// the two halves of a quad of words
struct quad {
    vint a;
    vint b;
};

TRIT_INLINE struct quad quad_load(const uint16_t * words, int lane0, int i) {
    const uint16_t * w = words + 4*TRIT_STRIP*i + 2*lane0;
    struct quad q = { v_load(w), v_load(w + 2*TRIT_STRIP) };
    return q;
}

TRIT_INLINE vint quad_field(struct quad q, int radix) {
    return V(packus_epi16)(field(q.a, radix), field(q.b, radix));
}

TRIT_INLINE struct quad quad_rest(struct quad q, int radix) {
    q.a = rest(q.a, radix);
    q.b = rest(q.b, radix);
    return q;
}

// the first n codes of the words of quad i; what remains of the words
TRIT_INLINE struct quad unpack_quad(const uint16_t * words, int lane0, int i, int n, int radix, vint * code) {
    struct quad q = quad_load(words, lane0, i);
    TRIT_UNROLL
    for (int j = 0; j < n; ++j) {
        code[j] = quad_field(q, radix);
        q = quad_rest(q, radix);
    }
    return q;
}

// The next four codes of depth 1, or two of depth 2, are a field of 81 values. Both functions return what remains of the words.

#if TRIT_LANES == 16 && defined(__AVX512VBMI__) && defined(__AVX512BF16__) && !defined(__AMX_TILE__)

// Tables take the field apart. A lookup in 128 bytes is one operation on AMD's CPUs and three on Intel's, so this is for
// those that know bfloat16, and not AMX.

#define X3(...) __VA_ARGS__, __VA_ARGS__, __VA_ARGS__
#define X9(...) X3(X3(__VA_ARGS__))

static const uint8_t trits_of_field[4][128] = {
    { X9(X3(0)), X9(X3(1)), X9(X3(2)) },
    { X3(X9(0), X9(1), X9(2)) },
    { X9(X3(0), X3(1), X3(2)) },
    { X9(X3(0, 1, 2)) },
};
static const uint8_t pairs_of_field[2][128] = {
    { X9(0), X9(1), X9(2), X9(3), X9(4), X9(5), X9(6), X9(7), X9(8) },
    { X9(0, 1, 2, 3, 4, 5, 6, 7, 8) },
};

TRIT_INLINE vint look_up(const uint8_t * table, vint i) {
    return _mm512_permutex2var_epi8(v_load(table), i, v_load(table + 64));
}

TRIT_INLINE struct quad unpack_trits(struct quad q, vint code[4]) {
    const vint four = quad_field(q, 81);
    TRIT_UNROLL
    for (int i = 0; i < 4; ++i) {
        code[i] = look_up(trits_of_field[i], four);
    }
    return quad_rest(q, 81);
}

TRIT_INLINE struct quad unpack_pairs(struct quad q, vint code[2]) {
    const vint four = quad_field(q, 81);
    code[0] = look_up(pairs_of_field[0], four);
    code[1] = look_up(pairs_of_field[1], four);
    return quad_rest(q, 81);
}

#else

// the second pair is what the field has besides the first, in bytes: a multiplication less for each word
TRIT_INLINE struct quad unpack_pairs(struct quad q, vint code[2]) {
    code[0] = quad_field(q, 9);
    const vint times_9 = v_table(_mm_setr_epi8(0, 9, 18, 27, 36, 45, 54, 63, 72, 0, 0, 0, 0, 0, 0, 0));
    code[1] = V(sub_epi8)(quad_field(q, 81), V(shuffle_epi8)(times_9, code[0]));
    return quad_rest(q, 81);
}

TRIT_INLINE struct quad unpack_trits(struct quad q, vint code[4]) {
    const vint first  = v_table(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0));
    const vint second = v_table(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0));
    vint pair[2];
    q = unpack_pairs(q, pair);
    TRIT_UNROLL
    for (int i = 0; i < 2; ++i) {
        code[2*i + 0] = V(shuffle_epi8)(first,  pair[i]);
        code[2*i + 1] = V(shuffle_epi8)(second, pair[i]);
    }
    return q;
}

#endif

// two scale indexes of a pair of words: k0, k1 of the one, k2, k3 of the other
TRIT_INLINE vint pair_scales(vint pair) {
    return v_or(field(pair, 27), V(slli_epi16)(field(rest(pair, 27), 27), 8));
}

// Codes of the rows from lane0 on, to a sink. Returns the bytes k0..k3 of each row.
TRIT_INLINE vint unpack_codes(int depth, int n_cols, const uint16_t * words, int lane0, struct sink * sink) {
    vint code[4];
    if (depth == 1) {
        struct quad q[2];
        TRIT_UNROLL
        for (int i = 0; i < 2; ++i) {
            q[i] = quad_load(words, lane0, i);
            TRIT_UNROLL
            for (int j = 0; j < 8; j += 4) {
                q[i] = unpack_trits(q[i], code);
                take_codes(depth, n_cols, sink, 8*i + j, 4, code);
            }
        }
        return V(packus_epi16)(mul3_add(field(q[0].a, 9), field(q[1].a, 3)), mul3_add(field(q[0].b, 9), field(q[1].b, 3)));
    }
    if (depth == 2) {
        TRIT_UNROLL
        for (int i = 0; i < 3; ++i) {
            struct quad q = quad_load(words, lane0, i);
            TRIT_UNROLL
            for (int j = 0; j < 4; j += 2) {
                q = unpack_pairs(q, code);
                take_codes(depth, n_cols, sink, 5*i + j, 2, code);
            }
            code[0] = quad_field(q, 9);
            take_codes(depth, n_cols, sink, 5*i + 4, 1, code);
        }
        vint pair = v_load(words + 12*TRIT_STRIP + 2*lane0);
        const vint w0 = field(pair, 9);
        pair = rest(pair, 9);
        const vint w1 = field(pair, 9);
        pair = rest(pair, 9);
        code[0] = v_or(w0, V(slli_epi16)(w1, 8));
        take_codes(depth, n_cols, sink, 15, 1, code);
        return pair_scales(pair);
    }
    if (depth == 3) {
        struct quad q[5];
        TRIT_UNROLL
        for (int i = 0; i < 5; ++i) {
            q[i] = unpack_quad(words, lane0, i, 3, 27, code);
            take_codes(depth, n_cols, sink, 3*i, 3, code);
        }
        // the four fields of a word: of its copies, two each
        const vint single = v_load_twice(words + 20*TRIT_STRIP + lane0);
        const vint even   = field(V(mullo_epi16)(single, V(set1_epi32)(1 |  81 << 16)), 9);
        const vint odd    = field(V(mullo_epi16)(single, V(set1_epi32)(9 | 729 << 16)), 9);
        code[0] = mul3_add(v_or(even, V(slli_epi16)(odd, 8)), quad_field(q[3], 3));
        take_codes(depth, n_cols, sink, 15, 1, code);
        return V(packus_epi16)(
            mul3_add(mul3_add(field(q[0].a, 3), field(q[1].a, 3)), field(q[2].a, 3)),
            mul3_add(mul3_add(field(q[0].b, 3), field(q[1].b, 3)), field(q[2].b, 3)));
    }
    TRIT_UNROLL
    for (int i = 0; i < 3; ++i) {
        const struct quad u = unpack_quad(words, lane0, 2*i + 0, 2, 81, code);
        const struct quad l = unpack_quad(words, lane0, 2*i + 1, 2, 81, code + 2);
        take_codes(depth, n_cols, sink, 4*i, 4, code);
        code[0] = V(packus_epi16)(mul9_add(field(u.a, 9), field(l.a, 9)), mul9_add(field(u.b, 9), field(l.b, 9)));
        take_codes(depth, n_cols, sink, 12 + i, 1, code);
    }
    const vint pair   = v_load(words + 24*TRIT_STRIP + 2*lane0);
    const vint single = v_load_twice(words + 26*TRIT_STRIP + lane0);
    const vint odd    = field(V(mullo_epi16)(single, V(set1_epi32)(1 | 81 << 16)), 81);
    code[0] = v_or(field(pair, 81), V(slli_epi16)(odd, 8));
    take_codes(depth, n_cols, sink, 15, 1, code);
    return pair_scales(rest(pair, 81));
}

//
// scales
//

// the ratios of scale indexes k0..k3, given as bytes: (R[k0], R[k2]) and (R[k1], R[k3]) in 16-bit lanes
TRIT_INLINE void lookup_ratios(vint k, vint * even, vint * odd) {
#if TRIT_LANES == 16
    // only the lower five bits of an index count
    const vint table = _mm512_maskz_loadu_epi16((1u << TRIT_N_SCALES) - 1, ggml_trit_ratio);
    *even = _mm512_permutexvar_epi16(k, table);
    *odd  = _mm512_permutexvar_epi16(_mm512_srli_epi16(k, 8), table);
#else
    // low and high bytes of entries 0..15 and 16..26
    const __m128i low_byte = _mm_set1_epi16(0xff);
    const __m128i r0 = _mm_loadu_si128((const __m128i *) ggml_trit_ratio);
    const __m128i r1 = _mm_loadu_si128((const __m128i *) (ggml_trit_ratio + 8));
    const __m128i r2 = _mm_loadu_si128((const __m128i *) (ggml_trit_ratio + 16));
    const __m128i r3 = _mm_srli_si128(_mm_loadu_si128((const __m128i *) (ggml_trit_ratio + TRIT_N_SCALES - 8)), 10);
    const vint low0  = v_table(_mm_packus_epi16(_mm_and_si128(r0, low_byte), _mm_and_si128(r1, low_byte)));
    const vint low1  = v_table(_mm_packus_epi16(_mm_and_si128(r2, low_byte), _mm_and_si128(r3, low_byte)));
    const vint high0 = v_table(_mm_packus_epi16(_mm_srli_epi16(r0, 8), _mm_srli_epi16(r1, 8)));
    const vint high1 = v_table(_mm_packus_epi16(_mm_srli_epi16(r2, 8), _mm_srli_epi16(r3, 8)));

    const vint above = V(cmpgt_epi8)(k, V(set1_epi8)(15));
    const vint low   = V(blendv_epi8)(V(shuffle_epi8)(low0,  k), V(shuffle_epi8)(low1,  k), above);
    const vint high  = V(blendv_epi8)(V(shuffle_epi8)(high0, k), V(shuffle_epi8)(high1, k), above);
    *even = V(blendv_epi8)(low, V(slli_epi16)(high, 8), V(set1_epi16)((short) 0xff00));
    *odd  = V(blendv_epi8)(V(srli_epi16)(low, 8), high, V(set1_epi16)((short) 0xff00));
#endif
}

// VNNI sums a group to 32 bits, the others to two sums of 16 bits: each needs the ratio
TRIT_INLINE vint low_ratio(vint pair) {
#if TRIT_VNNI
    return v_and(pair, V(set1_epi32)(0xffff));
#else
    return V(shuffle_epi8)(pair, v_table(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13)));
#endif
}

TRIT_INLINE vint high_ratio(vint pair) {
#if TRIT_VNNI
    return V(srli_epi32)(pair, 16);
#else
    return V(shuffle_epi8)(pair, v_table(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15)));
#endif
}

TRIT_INLINE void unpack_ratios(int depth, vint k, vint ratio[NG_TRIT]) {
    vint even;
    vint odd;
    lookup_ratios(k, &even, &odd);
#if TRIT_VNNI
    if (depth < 4) {
        ratio[1] = low_ratio(odd);
        ratio[2] = v_upper_half(high_ratio(even), odd); // of groups 2 and 3
        return;
    }
#endif
    ratio[0] = V(set1_epi32)(TRIT_VNNI ? TRIT_RATIO_ONE : TRIT_RATIO_ONE*0x10001); // in both halves
    ratio[1] = low_ratio(odd);
    ratio[2] = high_ratio(even);
    ratio[3] = high_ratio(odd);
}

// the first octave of anchors, where 3*k0 + 2*(k1 + k2 + k3) mod 6 as an eighth finds them: it tells k0 mod 2 and
// (k1 + k2 + k3) mod 3, and so n mod 6
TRIT_INLINE void init_anchors(int depth, float anchors[8]) {
    static const int order[8] = { 0, 5, 1, 1, 3, 2, 4, 4 };
    for (int i = 0; i < 8; ++i) {
        anchors[i] = ggml_trit_anchor_octave[depth - 1][order[i]];
    }
}

TRIT_INLINE vfloat unpack_anchor(const float * anchors, vint k) {
    // at most 234; times 10923/2^16, the fraction is that of a sixth
    const vint weights = V(set1_epi32)(0x02020203);
#if TRIT_VNNI
    const vint sum = v_dpbusd(V(set1_epi32)(0), k, weights);
#else
    const vint sum = V(madd_epi16)(V(maddubs_epi16)(k, weights), V(set1_epi16)(1));
#endif
    const vint top = v_lookup_8(anchors, V(srli_epi16)(V(mullo_epi16)(sum, V(set1_epi16)(10923)), 13));

    // n div 6 is k0 div 2: so much less in the exponent
    const vint octave = v_and(V(slli_epi32)(k, 22), V(set1_epi32)(15 << 23));
    return v_as_float(V(sub_epi32)(top, octave));
}

TRIT_INLINE void unpack_to(struct sink * sink, int depth, int n_cols, const float * anchors, const uint16_t * words, int lane0, struct strip_scales * scales) {
    const vint k = unpack_codes(depth, n_cols, words, lane0, sink);
    unpack_ratios(depth, k, scales->ratio);
    scales->anchor = unpack_anchor(anchors, k);
}

TRIT_INLINE void unpack_block(int depth, const float * anchors, const uint16_t * words, int lane0, struct strip_block * x) {
    struct sink sink;
    sink.code = x->code;
    unpack_to(&sink, depth, 0, anchors, words, lane0, &x->scales);
}

//
// scaled sums
//

// Sums of the groups of a half times their ratios. With VNNI, a sum has 16 bits up to depth 3.
TRIT_INLINE vint scaled_sum(int depth, int half, const vint * sum, const vint * ratio) {
#if TRIT_VNNI
    if (depth < 4 && half == 0) {
        return v_dpwssd(V(slli_epi32)(sum[0], 10), sum[1], ratio[1]); // TRIT_RATIO_ONE is 2^10
    }
    if (depth < 4) {
        return V(madd_epi16)(v_upper_half(sum[0], V(slli_epi32)(sum[1], 16)), ratio[2]);
    }
    return V(add_epi32)(V(mullo_epi32)(sum[0], ratio[2*half]), V(mullo_epi32)(sum[1], ratio[2*half + 1]));
#else
    const int n = sums_per_group(depth);
    vint isum = V(madd_epi16)(sum[0], ratio[2*half]);
    TRIT_UNROLL
    for (int i = 1; i < 2*n; ++i) {
        isum = V(add_epi32)(isum, V(madd_epi16)(sum[i], ratio[2*half + i/n]));
    }
    return isum;
#endif
}

// the sums of a half, scaled; added to those of the half before
TRIT_INLINE vfloat add_half(int depth, int half, const vint * sum, const struct strip_scales * scales, const struct trit_activations * y, vfloat sumf) {
    const vfloat s = V(cvtepi32_ps)(scaled_sum(depth, half, sum, scales->ratio));
    const vfloat d = V(set1_ps)(y->d[half]);
    return half == 0 ? V(mul_ps)(s, d) : v_multiply_add(s, d, sumf);
}

// acc[c] += block of words times block ib of column c, for few columns
TRIT_INLINE void unpack_and_dot(int depth, const float * anchors, const uint16_t * words, int lane0,
        int n_cols, const struct trit_activations * const * y, int64_t ib, vfloat * acc) {
    const int n_sums = sums_per_group(depth);
    struct strip_scales scales;
    struct sink sink;

    TRIT_UNROLL
    for (int c = 0; c < n_cols; ++c) {
        sink.y[c] = y[c] + ib;
        TRIT_UNROLL
        for (int i = 0; i < NG_TRIT*n_sums; ++i) {
            sink.sum[c][i] = V(set1_epi32)(sink.y[c]->bias[i]);
        }
    }
    unpack_to(&sink, depth, n_cols, anchors, words, lane0, &scales);
    TRIT_UNROLL
    for (int c = 0; c < n_cols; ++c) {
        const vfloat first = add_half(depth, 0, sink.sum[c],            &scales, sink.y[c], V(setzero_ps)());
        const vfloat sumf  = add_half(depth, 1, sink.sum[c] + 2*n_sums, &scales, sink.y[c], first);
        acc[c] = v_multiply_add(scales.anchor, sumf, acc[c]);
    }
}

// acc[c] += block x times block ib of column c
TRIT_INLINE void dot_block(int depth, const struct strip_block * x, int n_cols, const struct trit_activations * const * y, int64_t ib, vfloat * acc) {
    const int n_sums = sums_per_group(depth);
    vfloat sumf[TRIT_MAX_COLS];

    TRIT_UNROLL
    for (int half = 0; half < 2; ++half) {
        vint sum[TRIT_MAX_COLS][4];
        TRIT_UNROLL
        for (int i = 0; i < 2*n_sums; ++i) {
            const int first = 2*half*n_sums + i;
            TRIT_UNROLL
            for (int c = 0; c < n_cols; ++c) {
                sum[c][i] = V(set1_epi32)(y[c][ib].bias[first]);
            }
            TRIT_UNROLL
            for (int j = 4*first/n_sums; j < 4*(first + 1)/n_sums; ++j) {
                TRIT_UNROLL
                for (int c = 0; c < n_cols; ++c) {
                    sum[c][i] = dot_4(sum[c][i], x->code[j], broadcast_4(y[c][ib].qs + 4*j));
                }
            }
        }
        TRIT_UNROLL
        for (int c = 0; c < n_cols; ++c) {
            sumf[c] = add_half(depth, half, sum[c], &x->scales, y[c] + ib, half == 0 ? V(setzero_ps)() : sumf[c]);
        }
    }
    TRIT_UNROLL
    for (int c = 0; c < n_cols; ++c) {
        acc[c] = v_multiply_add(x->scales.anchor, sumf[c], acc[c]);
    }
}

TRIT_INLINE void first_sums(int n_cols, vfloat * acc, float * const * s, int64_t row0, bool accumulate) {
    TRIT_UNROLL
    for (int c = 0; c < n_cols; ++c) {
        acc[c] = accumulate ? V(loadu_ps)(s[c] + row0) : V(setzero_ps)();
    }
}

TRIT_INLINE void store_sums(int n_cols, const vfloat * acc, float * const * s, int64_t row0) {
    TRIT_UNROLL
    for (int c = 0; c < n_cols; ++c) {
        V(storeu_ps)(s[c] + row0, acc[c]);
    }
}

//
// interleaving
//

#if TRIT_LANES == 16

// columns of eight rows, 64 bits wide: of rows 0, 1, 4, 5, 8, 9, 12 and 13 behind x; mask has the words of a row that there are
TRIT_INLINE void load_columns(const char * x, size_t row_size, __mmask16 mask, vint column[4]) {
    vint rows[4]; // two each
    TRIT_UNROLL
    for (int i = 0; i < 4; ++i) {
        const char * row = x + 4*i*row_size;
        rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, row)), _mm256_maskz_loadu_epi16(mask, row + row_size), 1);
    }
    const vint first = _mm512_setr_epi64(0, 4,  8, 12, 1, 5,  9, 13);
    const vint last  = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
    const vint a01 = _mm512_permutex2var_epi64(rows[0], first, rows[1]);
    const vint b01 = _mm512_permutex2var_epi64(rows[2], first, rows[3]);
    const vint a23 = _mm512_permutex2var_epi64(rows[0], last,  rows[1]);
    const vint b23 = _mm512_permutex2var_epi64(rows[2], last,  rows[3]);
    column[0] = _mm512_inserti64x4(a01, _mm512_castsi512_si256(b01), 1);
    column[1] = _mm512_shuffle_i64x2(a01, b01, _MM_SHUFFLE(3, 2, 3, 2));
    column[2] = _mm512_inserti64x4(a23, _mm512_castsi512_si256(b23), 1);
    column[3] = _mm512_shuffle_i64x2(a23, b23, _MM_SHUFFLE(3, 2, 3, 2));
}

// the lower half of each quad, row by row
TRIT_INLINE vint halves_of_quads(struct quad q) {
    return _mm512_permutex2var_epi32(q.a, _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30), q.b);
}

// The first n_quads < 4 quads of 16 rows, and what follows them, or four quads. Returns what follows.
TRIT_INLINE struct quad interleave_quads(const char * x, size_t row_size, __mmask16 mask, int n_quads, char * strip) {
    vint a[4];
    vint b[4];
    load_columns(x,              row_size, mask, a);
    load_columns(x + 2*row_size, row_size, mask, b);
    TRIT_UNROLL
    for (int i = 0; i < n_quads; ++i) {
        _mm512_storeu_si512(strip + 128*i,      a[i]);
        _mm512_storeu_si512(strip + 128*i + 64, b[i]);
    }
    const struct quad rest = { a[n_quads%4], b[n_quads%4] };
    return rest;
}

// a block of 16 rows
TRIT_INLINE void interleave_block(int depth, const char * x, size_t row_size, char * strip) {
    switch (depth) {
        case 1: {
            interleave_quads(x, row_size, 0xff, 2, strip);
            break;
        }
        case 2: {
            const struct quad rest = interleave_quads(x, row_size, 0x3fff, 3, strip);
            _mm512_storeu_si512(strip + 3*128, halves_of_quads(rest));
            break;
        }
        case 3: {
            interleave_quads(x, row_size, 0xffff, 4, strip);
            const struct quad rest = interleave_quads(x + 32, row_size, 0x1f, 1, strip + 4*128);
            _mm256_storeu_si256((__m256i *) (strip + 5*128), _mm512_cvtepi32_epi16(halves_of_quads(rest)));
            break;
        }
        case 4: {
            interleave_quads(x, row_size, 0xffff, 4, strip);
            const struct quad rest  = interleave_quads(x + 32, row_size, 0x7ff, 2, strip + 4*128);
            const struct quad upper = { _mm512_srli_epi64(rest.a, 32), _mm512_srli_epi64(rest.b, 32) };
            _mm512_storeu_si512(strip + 6*128, halves_of_quads(rest));
            _mm256_storeu_si256((__m256i *) (strip + 6*128 + 64), _mm512_cvtepi32_epi16(halves_of_quads(upper)));
            break;
        }
    }
}

#else

// a block of 16 rows, two rows at a time
TRIT_INLINE void interleave_block(int depth, const char * x, size_t row_size, char * strip) {
    const int n_quads   = TRIT_WORDS(depth)/4;
    const int pair_size = TRIT_WORDS(depth)%4/2*4;
    const int rest_size = TRIT_WORDS(depth)%2*2;

    for (int row = 0; row < TRIT_STRIP; row += 2, x += 2*row_size) {
        const char * next = x + row_size;
        char * quads = strip + row%4/2*64 + row/4*16;
        TRIT_UNROLL
        for (int i = 0; i + 2 <= n_quads; i += 2) {
            const __m128i a = _mm_loadu_si128((const __m128i *) (x    + 8*i));
            const __m128i b = _mm_loadu_si128((const __m128i *) (next + 8*i));
            _mm_storeu_si128((__m128i *) (quads + 128*i),       _mm_unpacklo_epi64(a, b));
            _mm_storeu_si128((__m128i *) (quads + 128*i + 128), _mm_unpackhi_epi64(a, b));
        }
        if (n_quads%2) {
            const __m128i a = _mm_loadl_epi64((const __m128i *) (x    + 8*(n_quads - 1)));
            const __m128i b = _mm_loadl_epi64((const __m128i *) (next + 8*(n_quads - 1)));
            _mm_storeu_si128((__m128i *) (quads + 128*(n_quads - 1)), _mm_unpacklo_epi64(a, b));
        }
        TRIT_UNROLL
        for (int i = 0; i < 2; ++i) {
            const char * rest  = x + i*row_size + 8*n_quads;
            char       * pairs = strip + 128*n_quads;
            memcpy(pairs + (row + i)*pair_size, rest, pair_size);
            memcpy(pairs + TRIT_STRIP*pair_size + (row + i)*rest_size, rest + pair_size, rest_size);
        }
    }
}

#endif

TRIT_INLINE void interleave(int depth, int64_t n_blocks, const char * x, size_t row_size, char * strip) {
    const size_t block_size = TRIT_WORDS(depth)*sizeof(uint16_t);
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        interleave_block(depth, x + ib*block_size, row_size, strip + ib*TRIT_STRIP*block_size);
    }
}

void ggml_trit_interleave(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size, void * GGML_RESTRICT strip) {
    if (n_rows < TRIT_STRIP) {
        ggml_trit_interleave_generic(depth, n_blocks, n_rows, x, row_size, strip);
        return;
    }
    switch (depth) {
        case 1: interleave(1, n_blocks, x, row_size, strip); break;
        case 2: interleave(2, n_blocks, x, row_size, strip); break;
        case 3: interleave(3, n_blocks, x, row_size, strip); break;
        case 4: interleave(4, n_blocks, x, row_size, strip); break;
    }
}

//
// products
//

// Sixteen rows: a strip, or, if they have a row_size, as they are in a file. These are interleaved on the way, block by block.
struct source {
    const char * data;
    size_t       row_size;
};

// What comes next is the next strip, or the next rows; all of a strip lies together in both. So data can be fetched across
// the ends of pages, where the hardware stops, and of rows, of which it can follow a few only.
TRIT_INLINE void prefetch_block(int depth, struct source x, int64_t ib) {
    const size_t size  = TRIT_STRIP*TRIT_WORDS(depth)*sizeof(uint16_t);
    const char * ahead = x.data + ib*size + (x.row_size > 0 ? TRIT_STRIP*x.row_size : TRIT_PREFETCH);
    TRIT_UNROLL
    for (size_t i = 0; i < size; i += 64) {
        _mm_prefetch(ahead + i, _MM_HINT_T0);
    }
}

// few columns: blocks are unpacked to registers
TRIT_INLINE void stream_columns(int depth, int64_t n_blocks, struct source rows,
        int n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    vfloat acc[TRIT_STRIP/TRIT_LANES][TRIT_FEW_COLUMNS];
    TRIT_UNROLL
    for (int i = 0; i < TRIT_STRIP/TRIT_LANES; ++i) {
        first_sums(n_cols, acc[i], s, row0 + i*TRIT_LANES, accumulate);
    }
    float anchors[8];
    init_anchors(depth, anchors);

    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        prefetch_block(depth, rows, ib);

        uint16_t interleaved[TRIT_STRIP*TRIT_WORDS(4)];
        const uint16_t * words = (const uint16_t *) rows.data + ib*TRIT_STRIP*TRIT_WORDS(depth);
        if (rows.row_size > 0) {
            interleave_block(depth, rows.data + ib*TRIT_WORDS(depth)*sizeof(uint16_t), rows.row_size, (char *) interleaved);
            words = interleaved;
        }
        TRIT_UNROLL
        for (int i = 0; i < TRIT_STRIP/TRIT_LANES; ++i) {
#if TRIT_LANES == 16
            // registers enough to keep the codes
            struct strip_block x;
            unpack_block(depth, anchors, words, i*TRIT_LANES, &x);
            dot_block(depth, &x, n_cols, y, y_block0 + ib, acc[i]);
#else
            unpack_and_dot(depth, anchors, words, i*TRIT_LANES, n_cols, y, y_block0 + ib, acc[i]);
#endif
        }
    }
    TRIT_UNROLL
    for (int i = 0; i < TRIT_STRIP/TRIT_LANES; ++i) {
        store_sums(n_cols, acc[i], s, row0 + i*TRIT_LANES);
    }
}

// many columns: blocks have been unpacked to memory
TRIT_INLINE void tile_columns(int depth, int64_t n_blocks, const struct strip_block * x,
        int n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    vfloat acc[TRIT_MAX_COLS];
    first_sums(n_cols, acc, s, row0, accumulate);
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        dot_block(depth, x + ib, n_cols, y, y_block0 + ib, acc);
    }
    store_sums(n_cols, acc, s, row0);
}

TRIT_INLINE void few_columns(int depth, int64_t n_blocks, struct source rows,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    switch (n_cols) {
        case 1: stream_columns(depth, n_blocks, rows, 1, y, y_block0, s, row0, accumulate); break;
        case 2: stream_columns(depth, n_blocks, rows, 2, y, y_block0, s, row0, accumulate); break;
        case 3: stream_columns(depth, n_blocks, rows, 3, y, y_block0, s, row0, accumulate); break;
        case 4: stream_columns(depth, n_blocks, rows, 4, y, y_block0, s, row0, accumulate); break;
    }
}

TRIT_INLINE void gemm_strip(int depth, int64_t n_blocks, const uint16_t * words,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    if (n_cols <= TRIT_FEW_COLUMNS) {
        const struct source strip = { (const char *) words, 0 };
        few_columns(depth, n_blocks, strip, n_cols, y, y_block0, s, row0, accumulate);
        return;
    }
    assert(n_blocks <= TRIT_TILE_BLOCKS);

    float anchors[8];
    init_anchors(depth, anchors);

    for (int lane0 = 0; lane0 < TRIT_STRIP; lane0 += TRIT_LANES) {
        struct strip_block tile[TRIT_TILE_BLOCKS];
        for (int64_t ib = 0; ib < n_blocks; ++ib) {
            unpack_block(depth, anchors, words + ib*TRIT_STRIP*TRIT_WORDS(depth), lane0, tile + ib);
        }
        int64_t c = 0;
        for (; c + TRIT_MAX_COLS <= n_cols; c += TRIT_MAX_COLS) {
            tile_columns(depth, n_blocks, tile, TRIT_MAX_COLS, y + c, y_block0, s + c, row0 + lane0, accumulate);
        }
        for (; c + TRIT_MAX_COLS/2 <= n_cols; c += TRIT_MAX_COLS/2) {
            tile_columns(depth, n_blocks, tile, TRIT_MAX_COLS/2, y + c, y_block0, s + c, row0 + lane0, accumulate);
        }
        for (; c < n_cols; ++c) {
            tile_columns(depth, n_blocks, tile, 1, y + c, y_block0, s + c, row0 + lane0, accumulate);
        }
    }
}

void ggml_trit_prepare_activations(int depth, int64_t n_blocks, const block_q8_0 * GGML_RESTRICT x, struct trit_activations * GGML_RESTRICT y) {
    const __m128i minus_offset = _mm_set1_epi16((short) -TRIT_OFFSET(depth));

    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        memset(y[ib].bias, 0, sizeof(y[ib].bias));
        for (int g = 0; g < NG_TRIT; ++g) {
            const block_q8_0 * b = x + 2*ib + g/2;
            y[ib].d[g/2] = GGML_CPU_FP16_TO_FP32(b->d);

            const __m128i q = _mm_loadu_si128((const __m128i *) (b->qs + QG_TRIT*(g%2)));
            _mm_storeu_si128((__m128i *) (y[ib].qs + QG_TRIT*g), q);

            const __m128i pairs = _mm_maddubs_epi16(_mm_set1_epi8(1), q);
#if TRIT_VNNI
            const __m128i sum4 = _mm_madd_epi16(pairs, minus_offset);
            const __m128i sum8 = _mm_add_epi32(sum4, _mm_srli_si128(sum4, 8));
            y[ib].bias[g] = _mm_cvtsi128_si32(_mm_add_epi32(sum8, _mm_srli_si128(sum8, 4)));
#else
            // even and odd pairs of the group, or of its halves at depth 4
            const __m128i sum2 = _mm_mullo_epi16(pairs, minus_offset);
            const __m128i sum4 = _mm_add_epi16(sum2, _mm_srli_si128(sum2, 4));
            if (depth == 4) {
                y[ib].bias[2*g + 0] = _mm_cvtsi128_si32(sum4);
                y[ib].bias[2*g + 1] = _mm_extract_epi32(sum4, 2);
            } else {
                y[ib].bias[g] = _mm_cvtsi128_si32(_mm_add_epi16(sum4, _mm_srli_si128(sum4, 8)));
            }
#endif
        }
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

void ggml_trit_gemm_rows(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate) {
    if (n_rows < TRIT_STRIP || n_cols > TRIT_FEW_COLUMNS) {
        ggml_trit_gemm_rows_generic(depth, n_blocks, n_rows, x, row_size, n_cols, y, y_block0, s, row0, accumulate);
        return;
    }
    const struct source rows = { x, row_size };
    switch (depth) {
        case 1: few_columns(1, n_blocks, rows, n_cols, y, y_block0, s, row0, accumulate); break;
        case 2: few_columns(2, n_blocks, rows, n_cols, y, y_block0, s, row0, accumulate); break;
        case 3: few_columns(3, n_blocks, rows, n_cols, y, y_block0, s, row0, accumulate); break;
        case 4: few_columns(4, n_blocks, rows, n_cols, y, y_block0, s, row0, accumulate); break;
    }
}

#endif
