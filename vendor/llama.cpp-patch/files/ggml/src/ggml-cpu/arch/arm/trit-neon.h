#pragma once

// Blocks of four rows of a strip, unpacked to NEON registers, and their dot products.
//
// A word with its highest bit flipped is a signed number F, and F/2^16 a fraction between -1/2 and 1/2. The integer
// nearest to 3^depth * F/2^16 is the next code, with its sign, and 3^depth * F mod 2^16 is the rest of the word, in the
// same form. `sqdmulh` gives floor(2 * 3^depth * F/2^16), which is twice the code or one less, and a narrowing shift
// with rounding makes the code of it. So codes need no offset, and eight of them take three instructions.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-trit.h"
#include "trit.h"

#include <arm_neon.h>
#include <string.h>

#define TRIT_LANES 4 // rows that are unpacked together, one in 32 bits of a register

// a block of TRIT_LANES rows
struct strip_block {
    int8x16_t   code[16];       // of weights 4i..4i+3: a byte each
    int32x4_t   ratio[NG_TRIT]; // that of group 0 is TRIT_RATIO_ONE and not stored
    float32x4_t anchor;
};

//
// codes
//

// a factor whose value the compiler must not see: it would multiply by shifting and adding, which takes longer here
TRIT_INLINE int16x8_t factor(int x) {
    int16x8_t f = vdupq_n_s16(x);
    __asm__("" : "+w" (f));
    return f;
}

TRIT_INLINE int16x8_t load_words(const uint16_t * words) {
    return vreinterpretq_s16_u16(veorq_u16(vld1q_u16(words), vdupq_n_u16(0x8000)));
}

// words of four rows, each twice
TRIT_INLINE int16x8_t load_words_twice(const uint16_t * words) {
    const uint16x4_t w = veor_u16(vld1_u16(words), vdup_n_u16(0x8000));
    return vreinterpretq_s16_u16(vcombine_u16(vzip1_u16(w, w), vzip2_u16(w, w)));
}

TRIT_INLINE int16x8_t field(int16x8_t f, int radix) { return vrshrq_n_s16(vqdmulhq_s16(f, factor(radix)), 1); }
TRIT_INLINE int16x8_t rest (int16x8_t f, int radix) { return vmulq_s16(f, factor(radix)); }

// the fields of two vectors of words, as bytes
TRIT_INLINE int8x16_t narrow_fields(int16x8_t a, int16x8_t b, int radix) {
    const int8x8_t low = vrshrn_n_s16(vqdmulhq_s16(a, factor(radix)), 1);
    return vrshrn_high_n_s16(low, vqdmulhq_s16(b, factor(radix)), 1);
}

// low bytes of a and b, in turn
TRIT_INLINE int8x16_t interleave_bytes(int16x8_t a, int16x8_t b) {
    return vtrn1q_s8(vreinterpretq_s8_s16(a), vreinterpretq_s8_s16(b));
}

TRIT_INLINE int8x16_t mul3_add(int8x16_t a, int8x16_t b) { return vmlaq_s8(b, a, vreinterpretq_s8_s16(factor(0x0303))); }
TRIT_INLINE int8x16_t mul9_add(int8x16_t a, int8x16_t b) { return vmlaq_s8(b, a, vreinterpretq_s8_s16(factor(0x0909))); }

// the quads of two rows, and of the next two
struct quads {
    int16x8_t a;
    int16x8_t b;
};

TRIT_INLINE int8x16_t quad_field(struct quads q, int radix) {
    return narrow_fields(q.a, q.b, radix);
}

// the first n codes of the words of quad i; what remains of the words
TRIT_INLINE struct quads unpack_quad(const uint16_t * words, int lane0, int i, int n, int radix, int8x16_t * code) {
    const uint16_t * w = words + 4*TRIT_STRIP*i + 2*lane0;
    struct quads q = { load_words(w), load_words(w + 2*TRIT_STRIP) };
    TRIT_UNROLL
    for (int j = 0; j < n; ++j) {
        code[j] = quad_field(q, radix);
        q.a = rest(q.a, radix);
        q.b = rest(q.b, radix);
    }
    return q;
}

// two scale indexes of a pair of words: k0, k1 of the one, k2, k3 of the other
TRIT_INLINE int8x16_t pair_scales(int16x8_t pair) {
    return interleave_bytes(field(pair, 27), field(rest(pair, 27), 27));
}

// codes of the rows from lane0 on; returns k0..k3 of each row less 13
TRIT_INLINE int8x16_t unpack_codes(int depth, const uint16_t * words, int lane0, int8x16_t code[16]) {
    if (depth == 1) {
        const struct quads q0 = unpack_quad(words, lane0, 0, 8, 3, code);
        const struct quads q1 = unpack_quad(words, lane0, 1, 8, 3, code + 8);
        return mul3_add(quad_field(q0, 9), quad_field(q1, 3));
    }
    if (depth == 2) {
        TRIT_UNROLL
        for (int i = 0; i < 3; ++i) {
            unpack_quad(words, lane0, i, 5, 9, code + 5*i);
        }
        const int16x8_t pair0 = load_words(words + 12*TRIT_STRIP + 2*lane0);
        const int16x8_t pair1 = rest(pair0, 9);
        code[15] = interleave_bytes(field(pair0, 9), field(pair1, 9));
        return pair_scales(rest(pair1, 9));
    }
    if (depth == 3) {
        struct quads q[5];
        TRIT_UNROLL
        for (int i = 0; i < 5; ++i) {
            q[i] = unpack_quad(words, lane0, i, 3, 27, code + 3*i);
        }
        // four copies of the word, taken to its first four fields
        static const int16_t powers[8] = { 1, 9, 81, 729, 1, 9, 81, 729 };
        const int16x8_t power  = vld1q_s16(powers);
        const int32x4_t single = vreinterpretq_s32_s16(load_words_twice(words + 20*TRIT_STRIP + lane0));
        const int8x16_t upper  = narrow_fields(
            vmulq_s16(vreinterpretq_s16_s32(vzip1q_s32(single, single)), power),
            vmulq_s16(vreinterpretq_s16_s32(vzip2q_s32(single, single)), power), 9);
        code[15] = mul3_add(upper, quad_field(q[3], 3));
        return mul3_add(mul3_add(quad_field(q[0], 3), quad_field(q[1], 3)), quad_field(q[2], 3));
    }
    TRIT_UNROLL
    for (int i = 0; i < 3; ++i) {
        const struct quads u = unpack_quad(words, lane0, 2*i + 0, 2, 81, code + 4*i);
        const struct quads l = unpack_quad(words, lane0, 2*i + 1, 2, 81, code + 4*i + 2);
        code[12 + i] = mul9_add(quad_field(u, 9), quad_field(l, 9));
    }
    static const int16_t powers[8] = { 1, 81, 1, 81, 1, 81, 1, 81 };
    const int16x8_t pair   = load_words(words + 24*TRIT_STRIP + 2*lane0);
    const int16x8_t single = vmulq_s16(load_words_twice(words + 26*TRIT_STRIP + lane0), vld1q_s16(powers));
    code[15] = interleave_bytes(field(pair, 81), field(single, 81));
    return pair_scales(rest(pair, 81));
}

//
// scales
//

// What scales are looked up in. The tables stay in memory: there are too few registers to keep them.
struct scale_tables {
    uint8_t ratio_low [32]; // bytes of the ratios
    uint8_t ratio_high[32];
    uint8_t anchor    [32]; // the first octave of anchors
};

TRIT_INLINE void init_scale_tables(int depth, struct scale_tables * tables) {
    memset(tables, 0, sizeof(*tables));

    const uint8x16x2_t first = vld2q_u8((const uint8_t *) ggml_trit_ratio);
    const uint8x16x2_t last  = vld2q_u8((const uint8_t *) (ggml_trit_ratio + TRIT_N_SCALES - 16));
    vst1q_u8(tables->ratio_low,                       first.val[0]);
    vst1q_u8(tables->ratio_high,                      first.val[1]);
    vst1q_u8(tables->ratio_low  + TRIT_N_SCALES - 16, last.val[0]);
    vst1q_u8(tables->ratio_high + TRIT_N_SCALES - 16, last.val[1]);

    // 3*k0 + 2*(k1 + k2 + k3) mod 6 tells k0 mod 2 and (k1 + k2 + k3) mod 3, and so n mod 6: the order is that of this sum
    const float * octave = ggml_trit_anchor_octave[depth - 1];
    const float anchor[6] = { octave[0], octave[5], octave[1], octave[3], octave[2], octave[4] };
    memcpy(tables->anchor, anchor, sizeof(anchor));
}

TRIT_INLINE uint8x16_t lookup(const uint8_t * table, uint8x16_t index) {
    return vqtbl2q_u8(vld1q_u8_x2(table), index);
}

TRIT_INLINE void unpack_ratios(const struct scale_tables * tables, uint8x16_t k, int32x4_t ratio[NG_TRIT]) {
    const uint8x16_t low  = lookup(tables->ratio_low,  k);
    const uint8x16_t high = lookup(tables->ratio_high, k);
    const int32x4_t even = vreinterpretq_s32_u8(vtrn1q_u8(low, high));
    const int32x4_t odd  = vreinterpretq_s32_u8(vtrn2q_u8(low, high));
    ratio[1] = vandq_s32(odd, vdupq_n_s32(0xffff));
    ratio[2] = vshrq_n_s32(even, 16);
    ratio[3] = vshrq_n_s32(odd, 16);
}

TRIT_INLINE float32x4_t unpack_anchor(const struct scale_tables * tables, uint8x16_t k_bytes) {
    // 3*k0 + 2*(k1 + k2 + k3), at most 234, is the highest byte of the product; times 2*5462/2^16 is that div 6, up to there
    const uint32x4_t k   = vreinterpretq_u32_u8(k_bytes);
    const int16x8_t  sum = vreinterpretq_s16_u32(vshrq_n_u32(vmulq_u32(k, vdupq_n_u32(0x03020202)), 24));
    const int16x8_t  mod = vmlsq_s16(sum, vqdmulhq_s16(sum, factor(5462)), factor(6));

    const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), vreinterpretq_u32_s16(mod), vdupq_n_u32(0x04040404));
    const uint32x4_t top   = vreinterpretq_u32_u8(lookup(tables->anchor, vreinterpretq_u8_u32(bytes)));

    // n div 6 is k0 div 2: so much less in the exponent
    const uint32x4_t octave = vshlq_n_u32(vandq_u32(k, vdupq_n_u32(30)), 22);
    return vreinterpretq_f32_u32(vsubq_u32(top, octave));
}

TRIT_INLINE void unpack_block(int depth, const struct scale_tables * tables, const uint16_t * words, int lane0, struct strip_block * x) {
    const int8x16_t k = vaddq_s8(unpack_codes(depth, words, lane0, x->code), vdupq_n_s8(TRIT_N_SCALES/2));
    unpack_ratios(tables, vreinterpretq_u8_s8(k), x->ratio);
    x->anchor = unpack_anchor(tables, vreinterpretq_u8_s8(k));
}

//
// dot products
//

// of a group of four rows with activations: register i has those of weights 4i..4i+3, for each row
TRIT_INLINE int32x4_t dot_quads(int depth, const int8x16_t * code, const int8x16_t * q) {
#if defined(__ARM_FEATURE_DOTPROD)
    (void) depth;
    int32x4_t sum = vdotq_s32(vdupq_n_s32(0), code[0], q[0]);
    sum = vdotq_s32(sum, code[1], q[1]);
    sum = vdotq_s32(sum, code[2], q[2]);
    return vdotq_s32(sum, code[3], q[3]);
#else
    // two rows each, four sums a row: at depth 4 up to 4*40*127 = 20320, so that 16 bits hold one sum, but not two
    int16x8_t low  = vmull_s8(vget_low_s8(code[0]), vget_low_s8(q[0]));
    int16x8_t high = vmull_high_s8(code[0], q[0]);
    TRIT_UNROLL
    for (int i = 1; i < 4; ++i) {
        low  = vmlal_s8(low, vget_low_s8(code[i]), vget_low_s8(q[i]));
        high = vmlal_high_s8(high, code[i], q[i]);
    }
    return depth < 4 ? vpaddlq_s16(vpaddq_s16(low, high)) : vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
}
