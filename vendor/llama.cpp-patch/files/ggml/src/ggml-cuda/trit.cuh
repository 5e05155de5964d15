#pragma once

// Balanced-ternary types TRIT1..TRIT4: unpacking, dot product with Q8_1, dequantization.
// All of it also compiles as host C++, where the tests compare it with the reference in ggml-trit.c.

#include "common.cuh"
#include "ggml-trit.h"

#include <cstdint>

#define QR_TRIT 2 // weights i and i + QK_TRIT/2 are dequantized together
#define QI_TRIT (QK_TRIT / (4*QR_TRIT))

// A thread multiplies a whole block: its weights lie across quads of words, and all need all scale indexes.
#define VDR_TRIT_Q8_1_MMVQ QI_TRIT
#define VDR_TRIT_Q8_1_MMQ  QI_TRIT

template <typename block>
struct trit_type_traits {
    static constexpr int qk = QK_TRIT;
    static constexpr int qr = QR_TRIT;
    static constexpr int qi = QI_TRIT;
    static constexpr int bs = sizeof(block);
};

template<> struct ggml_cuda_type_traits<GGML_TYPE_TRIT1> : trit_type_traits<block_trit1> {};
template<> struct ggml_cuda_type_traits<GGML_TYPE_TRIT2> : trit_type_traits<block_trit2> {};
template<> struct ggml_cuda_type_traits<GGML_TYPE_TRIT3> : trit_type_traits<block_trit3> {};
template<> struct ggml_cuda_type_traits<GGML_TYPE_TRIT4> : trit_type_traits<block_trit4> {};

static constexpr __host__ __device__ bool is_trit(ggml_type type) {
    return type >= GGML_TYPE_TRIT1 && type <= GGML_TYPE_TRIT4;
}

// 4 for types that are none of ours: mmq names its tile loader for every type, and uses it for ours
static constexpr __host__ __device__ int trit_depth(ggml_type type) {
    return type == GGML_TYPE_TRIT1 ? 1 : type == GGML_TYPE_TRIT2 ? 2 : type == GGML_TYPE_TRIT3 ? 3 : 4;
}

static const __device__ uint16_t trit_ratios[TRIT_N_SCALES] = { TRIT_RATIOS };
static const __device__ float    trit_anchor_octave[4][6]   = { TRIT_ANCHOR_OCTAVES };
static const __device__ uint16_t trit_power[TRIT_PER_WORD]  = { TRIT_POWERS };

static __device__ __forceinline__ int trit_ratio(const uint32_t k, const int g) {
    return g == 0 ? TRIT_RATIO_ONE : trit_ratios[k];
}

// the anchor of a block, divided by 1024: entry n mod 6 of the octave times 2^-(n div 6), n = 3*k0 + (k1 + k2 + k3) mod 3
template <int depth>
static __device__ __forceinline__ float trit_anchor(const uint32_t * k) {
    const float anchor = trit_anchor_octave[depth - 1][3*(k[0] % 2) + (k[1] + k[2] + k[3]) % 3];
    return __uint_as_float(__float_as_uint(anchor) - (k[0]/2 << 23));
}

//
// a whole block
//

// The words of a block as 32-bit fractions: each in the upper half, zeros in the lower.
template <int depth>
static __device__ __forceinline__ void trit_load_words(const void * __restrict__ block, uint32_t * __restrict__ frac) {
    constexpr int n_words = TRIT_WORDS(depth);
    constexpr int n_pairs = n_words/2;
    uint32_t pair[n_pairs + 1];

    if constexpr (n_words % 8 == 0) {
        const uint4 x = *(const uint4 *) block; // blocks of 16 bytes are aligned to 16
        pair[0] = x.x;
        pair[1] = x.y;
        pair[2] = x.z;
        pair[3] = x.w;
    } else if constexpr (n_words % 2 == 0) {
        const uint32_t * x = (const uint32_t *) block;
#pragma unroll
        for (int i = 0; i < n_pairs; ++i) {
            pair[i] = x[i];
        }
    } else {
        // Every other block begins in the middle of an aligned pair of words. The first half of that pair
        // is the end of another block; nothing behind the block is read.
        const int        odd = (uintptr_t) block / 2 % 2;
        const uint32_t * x   = (const uint32_t *) ((const uint16_t *) block - odd);
        const uint32_t   end = x[n_pairs - 1 + odd];
#pragma unroll
        for (int i = 0; i < n_pairs; ++i) {
            pair[i] = __funnelshift_r(x[i], i < n_pairs - 1 ? x[i + 1] : end, 16*odd);
        }
        frac[n_words - 1] = (uint32_t) ((const uint16_t *) block)[n_words - 1] << 16;
    }

#pragma unroll
    for (int i = 0; i < n_pairs; ++i) {
        frac[2*i + 0] = pair[i] << 16;
        frac[2*i + 1] = pair[i] & 0xFFFF0000;
    }
}

// Takes the next field off a word: with factor == 3^n the n next trits. The upper half of the product is the field,
// the lower half what the next one is taken from. In assembly, because nvcc masks bits that are zero otherwise.
static __device__ __forceinline__ uint32_t trit_take(uint32_t & frac, const uint32_t factor) {
    uint64_t product;
#if defined(__CUDA_ARCH__) && !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(frac), "r"(factor));
#else
    product = (uint64_t) frac*factor;
#endif
    frac = (uint32_t) product;
    return product >> 32;
}

static __device__ __forceinline__ uint32_t trit_pack_bytes(const uint32_t c0, const uint32_t c1, const uint32_t c2, const uint32_t c3) {
    return __byte_perm(__byte_perm(c0, c1, 0x0040), __byte_perm(c2, c3, 0x0040), 0x5410);
}

// codes[i] has the codes of weights 4*i to 4*i + 3, plus the offset, as bytes; k has the scale indexes
template <int depth>
static __device__ __forceinline__ void trit_unpack(
    const void * __restrict__ block, uint32_t * __restrict__ codes, uint32_t * __restrict__ k) {

    constexpr int n_levels = TRIT_LEVELS(depth);
    constexpr int n_quads  = TRIT_QUADS(depth);
    constexpr int per_word = TRIT_CODES_PER_WORD(depth);

    uint32_t frac[TRIT_WORDS(depth)];
    trit_load_words<depth>(block, frac);

#pragma unroll
    for (int p = 0; p < n_quads; ++p) {
#pragma unroll
        for (int j = 0; j < per_word; ++j) {
            uint32_t c[4];
#pragma unroll
            for (int lane = 0; lane < 4; ++lane) {
                c[lane] = trit_take(frac[4*p + lane], n_levels);
            }
            codes[per_word*p + j] = trit_pack_bytes(c[0], c[1], c[2], c[3]);
        }
    }

    // the rest: what is left of the words of the quads, and the last words
    if constexpr (depth == 1) {
#pragma unroll
        for (int g = 0; g < NG_TRIT; ++g) {
            const uint32_t high = trit_take(frac[g], 9);
            k[g] = 3*high + trit_take(frac[4 + g], 3);
        }
    } else if constexpr (depth == 2) {
        uint32_t c[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            c[2*i + 0] = trit_take(frac[12 + i],  9);
            c[2*i + 1] = trit_take(frac[12 + i],  9);
            k[2*i + 0] = trit_take(frac[12 + i], 27);
            k[2*i + 1] = trit_take(frac[12 + i], 27);
        }
        codes[15] = trit_pack_bytes(c[0], c[1], c[2], c[3]);
    } else if constexpr (depth == 3) {
        uint32_t c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t k0 = trit_take(frac[    i], 3);
            const uint32_t k1 = trit_take(frac[4 + i], 3);
            const uint32_t k2 = trit_take(frac[8 + i], 3);
            k[i] = 9*k0 + 3*k1 + k2;

            const uint32_t high = trit_take(frac[20], 9);
            c[i] = 3*high + trit_take(frac[12 + i], 3);
        }
        codes[15] = trit_pack_bytes(c[0], c[1], c[2], c[3]);
    } else {
        uint32_t c[4];
#pragma unroll
        for (int p = 0; p < 3; ++p) {
#pragma unroll
            for (int lane = 0; lane < 4; ++lane) {
                const uint32_t high = trit_take(frac[8*p + lane], 9);
                c[lane] = 9*high + trit_take(frac[8*p + 4 + lane], 9);
            }
            codes[12 + p] = trit_pack_bytes(c[0], c[1], c[2], c[3]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            c[2*i + 0] = trit_take(frac[24 + i], 81);
            c[2*i + 1] = trit_take(frac[26],     81);
            k[2*i + 0] = trit_take(frac[24 + i], 27);
            k[2*i + 1] = trit_take(frac[24 + i], 27);
        }
        codes[15] = trit_pack_bytes(c[0], c[1], c[2], c[3]);
    }
}

// The same codes without the offset, as signed bytes. No byte overflows into the next.
template <int depth>
static __device__ __forceinline__ int trit_signed_bytes(const uint32_t codes) {
    constexpr uint32_t offset = TRIT_OFFSET(depth);
    return (codes + (0x80 - offset)*0x01010101) ^ 0x80808080;
}

// Sums over half a block are below 2 * 16 * 40 * 128 * 4598 < 2^30, those over a group before the offset is
// subtracted below 2^18.
template <int depth>
static __device__ __forceinline__ float vec_dot_trit_q8_1(
    const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {

    // Activations come in pairs of blocks, 72 bytes, at even blocks of rows that are padded to 512: aligned to 8.
    int2 u[2*sizeof(block_q8_1)/sizeof(int2)];
#pragma unroll
    for (int i = 0; i < (int) (sizeof(u)/sizeof(int2)); ++i) {
        u[i] = ((const int2 *) bq8_1)[i];
    }
    const block_q8_1 * y = (const block_q8_1 *) u;

    uint32_t codes[QK_TRIT/4];
    uint32_t k[NG_TRIT];
    trit_unpack<depth>((const char *) vbq + (int64_t) kbx*(2*TRIT_WORDS(depth)), codes, k);

    constexpr int minus_offset = ~((TRIT_OFFSET(depth) - 1)*0x01010101); // in each byte

    int sumi[2] = { 0, 0 };
#pragma unroll
    for (int g = 0; g < NG_TRIT; ++g) {
        const int * q8 = (const int *) y[g/2].qs + QG_TRIT/4*(g % 2);

        int sumg = 0;
#pragma unroll
        for (int i = 0; i < QG_TRIT/4; ++i) {
            sumg = ggml_cuda_dp4a(minus_offset, q8[i], sumg); // the same for all rows
        }
#pragma unroll
        for (int i = 0; i < QG_TRIT/4; ++i) {
            sumg = ggml_cuda_dp4a(codes[QG_TRIT/4*g + i], q8[i], sumg);
        }
        sumi[g/2] += sumg*trit_ratio(k[g], g);
    }

    GGML_UNUSED(iqs); // always 0: a thread has the whole block
    return trit_anchor<depth>(k)*(__low2float(y[0].ds)*sumi[0] + __low2float(y[1].ds)*sumi[1]);
}

//
// single weights
//

// the n trits from trit j on
static __device__ __forceinline__ int trit_field(const uint16_t word, const int j, const int n) {
    return __umulhi(((uint32_t) word << 16)*trit_power[j], trit_power[n]);
}

template <int depth>
static __device__ __forceinline__ int trit_code(const uint16_t * __restrict__ words, const int i) {
    constexpr int per_word = TRIT_CODES_PER_WORD(depth);
    constexpr int offset   = TRIT_OFFSET(depth);

    const int lane = i % 4;
    if (i < 4*per_word*TRIT_QUADS(depth)) {
        const int p = i / (4*per_word);
        const int j = i / 4 % per_word;
        return trit_field(words[4*p + lane], depth*j, depth) - offset;
    }
    if constexpr (depth == 2) {
        return trit_field(words[12 + lane/2], 2*(lane % 2), 2) - offset;
    }
    if constexpr (depth == 3) {
        return 3*trit_field(words[20], 2*lane, 2) + trit_field(words[12 + lane], 9, 1) - offset;
    }
    if (i < 60) {
        const int p = (i - 48)/4;
        return 9*trit_field(words[8*p + lane], 8, 2) + trit_field(words[8*p + 4 + lane], 8, 2) - offset;
    }
    return (lane % 2 == 0 ? trit_field(words[24 + lane/2], 0, 4) : trit_field(words[26], 4*(lane/2), 4)) - offset;
}

template <int depth>
static __device__ __forceinline__ uint32_t trit_scale_index(const uint16_t * __restrict__ words, const int g) {
    if constexpr (depth == 1) {
        return 3*trit_field(words[g], 8, 2) + trit_field(words[4 + g], 8, 1);
    }
    if constexpr (depth == 3) {
        return 9*trit_field(words[g], 9, 1) + 3*trit_field(words[4 + g], 9, 1) + trit_field(words[8 + g], 9, 1);
    }
    return trit_field(words[(depth == 2 ? 12 : 24) + g/2], 4 + 3*(g % 2), 3);
}

template <int depth>
static __device__ __forceinline__ void dequantize_trit(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const uint16_t * words = (const uint16_t *) vx + ib*TRIT_WORDS(depth);

    uint32_t k[NG_TRIT];
#pragma unroll
    for (int g = 0; g < NG_TRIT; ++g) {
        k[g] = trit_scale_index<depth>(words, g);
    }
    const float anchor = trit_anchor<depth>(k);

    // two products, each rounded, as the format has it
    const int g = iqs / QG_TRIT;
    v.x = (anchor*(g == 0 ? trit_ratio(k[0], 0) : trit_ratio(k[1], 1))) * trit_code<depth>(words, iqs);
    v.y = (anchor*(g == 0 ? trit_ratio(k[2], 2) : trit_ratio(k[3], 3))) * trit_code<depth>(words, iqs + QK_TRIT/2);
}
