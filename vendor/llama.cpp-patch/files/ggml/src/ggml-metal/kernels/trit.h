#ifndef GGML_METAL_TRIT
#define GGML_METAL_TRIT

#if !defined(GGML_METAL_EMBED_LIBRARY) // CMakeLists.txt puts it before this header there
#include "ggml-trit-common.h"
#endif

// TRIT1..TRIT4: codes and scales of a block. ggml-trit.c is the reference of the format.
//
// A word is a fraction, of 16 bits. Times 3^n, it is the field of its first n trits before the point, and what the next
// field is taken from behind it. That is done in floats, as in the kernel of TQ2_0. All of it is exact: no product has
// more than 24 bits, as 3^n <= 81.
//
// Four words are a quad, of four lanes. Column c of a block is the weights 4c to 4c + 3, one in each lane.

constexpr constant static float  trit_ratio[TRIT_N_SCALES] = { TRIT_RATIOS };
constexpr constant static float  trit_anchor_octave[4][6]  = { TRIT_ANCHOR_OCTAVES };
constexpr constant static ushort trit_pow3[TRIT_PER_WORD]  = { TRIT_POWERS };

//
// words
//

// what is left of a word behind its first n trits, pow = 3^n
static inline float trit_skip(ushort word, ushort pow) {
    return (float) (ushort) (word*pow) / 65536.f;
}

static inline float4 trit_skip(ushort4 words, ushort4 pow) {
    return float4(words*pow) / 65536.f;
}

// the next field, of n trits, less offset: a code
template <short n, typename T>
static inline T trit_next(thread T & x, float offset = TRIT_OFFSET(n)) {
    const T scaled = x*(float) TRIT_LEVELS(n) - offset;
    const T field  = floor(scaled);

    x = scaled - field;

    return field;
}

// blocks are only aligned to words
static inline ushort4 trit_quad(device const uint16_t * q) {
    return ushort4(q[0], q[1], q[2], q[3]);
}

// two words that hold four things each, in halves
static inline ushort4 trit_pair(device const uint16_t * q) {
    return ushort4(q[0], q[0], q[1], q[1]);
}

//
// scales of the four groups
//

// indexes in the last trits of two words, of TRIT2 and TRIT4
static inline float4 trit_scale_line(device const uint16_t * q) {
    float4 x = trit_skip(trit_pair(q), ushort4(81, 2187, 81, 2187));

    return trit_next<3>(x, 0.f);
}

// Each product is rounded, as in the reference.
static inline float4 trit_scales(constant const float * octave, float4 index) {
    const int4 k = int4(index);
    const int  n = 3*k[0] + (k[1] + k[2] + k[3])%3;

    // divided by a power of two, all anchors are normal numbers
    const float anchor = as_type<float>(as_type<int>(octave[n%6]) - ((n/6) << 23));

    return anchor*float4((float) TRIT_RATIO_ONE, trit_ratio[k[1]], trit_ratio[k[2]], trit_ratio[k[3]]);
}

static inline float4 trit_scales(device const block_trit1 * xb) {
    float4 high = trit_skip(trit_quad(xb->qs    ), ushort4(trit_pow3[8]));
    float4 low  = trit_skip(trit_quad(xb->qs + 4), ushort4(trit_pow3[8]));

    return trit_scales(trit_anchor_octave[0], 3.f*trit_next<2>(high, 0.f) + trit_next<1>(low, 0.f));
}

static inline float4 trit_scales(device const block_trit2 * xb) {
    return trit_scales(trit_anchor_octave[1], trit_scale_line(xb->qs + 12));
}

static inline float4 trit_scales(device const block_trit3 * xb) {
    float4 index = float4(0.f);

    FOR_UNROLL (short s = 0; s < 3; ++s) {
        float4 x = trit_skip(trit_quad(xb->qs + 4*s), ushort4(trit_pow3[9]));
        index = 3.f*index + trit_next<1>(x, 0.f);
    }

    return trit_scales(trit_anchor_octave[2], index);
}

static inline float4 trit_scales(device const block_trit4 * xb) {
    return trit_scales(trit_anchor_octave[3], trit_scale_line(xb->qs + 24));
}

//
// codes of a column: any of them, for kernels that take a group at a time
//

static inline float4 trit_column(device const block_trit1 * xb, short c) {
    float4 x = trit_skip(trit_quad(xb->qs + 4*(c/8)), ushort4(trit_pow3[c%8]));

    return trit_next<1>(x);
}

static inline float4 trit_column(device const block_trit2 * xb, short c) {
    float4 x = c < 15 ?
        trit_skip(trit_quad(xb->qs + 4*(c/5)), ushort4(trit_pow3[2*(c%5)])) :
        trit_skip(trit_pair(xb->qs + 12), ushort4(1, 9, 1, 9));

    return trit_next<2>(x);
}

static inline float4 trit_column(device const block_trit3 * xb, short c) {
    if (c < 15) {
        float4 x = trit_skip(trit_quad(xb->qs + 4*(c/3)), ushort4(trit_pow3[3*(c%3)]));

        return trit_next<3>(x);
    }

    float4 high = trit_skip(ushort4(xb->qs[20]), ushort4(1, 9, 81, 729));
    float4 low  = trit_skip(trit_quad(xb->qs + 12), ushort4(trit_pow3[9]));

    return 3.f*trit_next<2>(high) + trit_next<1>(low);
}

static inline float4 trit_column(device const block_trit4 * xb, short c) {
    if (c < 12) {
        float4 x = trit_skip(trit_quad(xb->qs + 4*(c/2)), ushort4(trit_pow3[4*(c%2)]));

        return trit_next<4>(x);
    }

    if (c < 15) {
        float4 high = trit_skip(trit_quad(xb->qs + 8*(c - 12)    ), ushort4(trit_pow3[8]));
        float4 low  = trit_skip(trit_quad(xb->qs + 8*(c - 12) + 4), ushort4(trit_pow3[8]));

        return 9.f*trit_next<2>(high) + trit_next<2>(low);
    }

    float4 x = trit_skip(ushort4(xb->qs[24], xb->qs[26], xb->qs[25], xb->qs[26]), ushort4(1, 1, 1, 81));

    return trit_next<4>(x);
}

// group il of a block
template <typename block_t, typename type4x4>
void dequantize_trit(device const block_t * xb, short il, thread type4x4 & reg) {
    const float d = trit_scales(xb)[il];

    float4x4 reg_f;

    FOR_UNROLL (short i = 0; i < 4; ++i) {
        reg_f[i] = d*trit_column(xb, 4*il + i);
    }

    reg = (type4x4) reg_f;
}

//
// codes of a lane, for kernels that take a block at a time: codes[c/4][c%4] is that of column c
//

static inline void trit_lane(device const block_trit1 * xb, short lane, thread float4x4 & codes) {
    FOR_UNROLL (short w = 0; w < 2; ++w) {
        float x = trit_skip(xb->qs[4*w + lane], 1);

        FOR_UNROLL (short c = 8*w; c < 8*w + 8; ++c) {
            codes[c/4][c%4] = trit_next<1>(x);
        }
    }
}

static inline void trit_lane(device const block_trit2 * xb, short lane, thread float4x4 & codes) {
    FOR_UNROLL (short w = 0; w < 3; ++w) {
        float x = trit_skip(xb->qs[4*w + lane], 1);

        FOR_UNROLL (short c = 5*w; c < 5*w + 5; ++c) {
            codes[c/4][c%4] = trit_next<2>(x);
        }
    }

    float x = trit_skip(xb->qs[12 + lane/2], lane%2 == 0 ? 1 : 9);
    codes[3][3] = trit_next<2>(x);
}

static inline void trit_lane(device const block_trit3 * xb, short lane, thread float4x4 & codes) {
    float high = trit_skip(xb->qs[20], trit_pow3[2*lane]);
    codes[3][3] = 3.f*trit_next<2>(high);

    FOR_UNROLL (short w = 0; w < 5; ++w) {
        float x = trit_skip(xb->qs[4*w + lane], 1);

        FOR_UNROLL (short c = 3*w; c < 3*w + 3; ++c) {
            codes[c/4][c%4] = trit_next<3>(x);
        }

        if (w == 3) {
            codes[3][3] += trit_next<1>(x);
        }
    }
}

static inline void trit_lane(device const block_trit4 * xb, short lane, thread float4x4 & codes) {
    FOR_UNROLL (short w = 0; w < 6; ++w) {
        float x = trit_skip(xb->qs[4*w + lane], 1);

        FOR_UNROLL (short c = 2*w; c < 2*w + 2; ++c) {
            codes[c/4][c%4] = trit_next<4>(x);
        }

        const float rest = trit_next<2>(x);
        codes[3][w/2] = w%2 == 0 ? 9.f*rest : codes[3][w/2] + rest;
    }

    float x = trit_skip(xb->qs[lane%2 == 0 ? 24 + lane/2 : 26], lane == 3 ? 81 : 1);
    codes[3][3] = trit_next<4>(x);
}

#endif // GGML_METAL_TRIT
