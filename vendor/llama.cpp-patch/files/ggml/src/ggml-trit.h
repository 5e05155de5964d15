#pragma once

// Balanced-ternary types TRIT1..TRIT4: 3^depth levels, blocks of 64 weights in 4 groups of 16, a
// 27-entry scale codebook per group. The functions in ggml-trit.c are the reference of the format.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-trit-common.h"

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// a block unpacked to integers: weight i is anchor * ratio[i / QG_TRIT] * code[i]
struct ggml_trit_block {
    int8_t  code[QK_TRIT]; // |code| <= (3^depth - 1) / 2
    uint8_t k[NG_TRIT];    // scale indexes, 0..26
};

// TRIT_RATIOS
GGML_API const int16_t ggml_trit_ratio[TRIT_N_SCALES];

// TRIT_ANCHOR_OCTAVES, in rows of eight for vector code
GGML_API const float ggml_trit_anchor_octave[4][8];

// 16-bit words in a block
GGML_API int ggml_trit_n_words(int depth);

// the anchor of a block, divided by 1024: entry n mod 6 of the octave times 2^-(n div 6), n = 3*k0 + (k1 + k2 + k3) mod 3
GGML_API float ggml_trit_anchor(int depth, const uint8_t k[NG_TRIT]);

GGML_API void ggml_trit_unpack(int depth, const uint16_t * words, struct ggml_trit_block * block);
GGML_API void ggml_trit_pack  (int depth, const struct ggml_trit_block * block, uint16_t * words);

// false if a word is not an encoding, or a reserved trit is not as the format has it
GGML_API bool ggml_trit_validate_row(int depth, const void * data, size_t n_blocks);

// A block that the type cannot hold (NaN, Inf, a weight above the range) is written as words that ggml_validate_row_data
// refuses. A block below the range gets the least anchor: ggml_trit_reaches says whether that will do.
GGML_API void quantize_row_trit1_ref(const float * GGML_RESTRICT x, block_trit1 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_trit2_ref(const float * GGML_RESTRICT x, block_trit2 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_trit3_ref(const float * GGML_RESTRICT x, block_trit3 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_trit4_ref(const float * GGML_RESTRICT x, block_trit4 * GGML_RESTRICT y, int64_t k);

// Scale indexes, 4 for each block, of least squared error. weight: of the squared error of each entry of x, or NULL.
// found: whether the type can hold the block. _ref is the reference, which gives the same.
GGML_API void ggml_trit_search    (int depth, int64_t n_blocks, const float * x, const float * weight, uint8_t * k, bool * found);
GGML_API void ggml_trit_search_ref(int depth, int64_t n_blocks, const float * x, const float * weight, uint8_t * k, bool * found);

// How well a type reaches down to the weights of a tensor: sums over its blocks, zero at first.
struct ggml_trit_reach {
    double energy; // of all weights: the sum of their squares
    double excess; // of what the search loses in blocks below the range, over what the type usually loses of their energy
};

// adds some blocks of the tensor; they should be finite
GGML_API void ggml_trit_measure_reach(int depth, const float * x, int64_t n_blocks, struct ggml_trit_reach * reach);

// false if the tensor is too small for the type: the excess shows beside what the type usually loses
GGML_API bool ggml_trit_reaches(int depth, const struct ggml_trit_reach * reach);

GGML_API void dequantize_row_trit1(const block_trit1 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_trit2(const block_trit2 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_trit3(const block_trit3 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_trit4(const block_trit4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

GGML_API size_t quantize_trit1(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_trit2(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_trit3(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_trit4(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif
