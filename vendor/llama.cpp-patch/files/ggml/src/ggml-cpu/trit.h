#pragma once

// CPU kernels of the balanced-ternary types: dot products and the matrix product

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-trit-common.h"

#include "ggml.h"

#include <stdbool.h>

// Kernels are written for any depth and number of columns, and compiled for each: all of their loops have to be unrolled,
// so that arrays become registers.
#if defined(__clang__)
#define TRIT_INLINE static inline __attribute__((always_inline))
#define TRIT_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(_MSC_VER)
#define TRIT_INLINE static __forceinline
#define TRIT_UNROLL
#else
#define TRIT_INLINE static inline __attribute__((always_inline))
#define TRIT_UNROLL _Pragma("GCC unroll 16")
#endif

#ifdef __cplusplus
extern "C" {
#endif

void quantize_row_trit1(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_trit2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_trit3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_trit4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void ggml_vec_dot_trit1_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_trit2_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_trit3_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_trit4_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// scalar reference
void ggml_vec_dot_trit1_q8_0_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_trit2_q8_0_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_trit3_q8_0_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_trit4_q8_0_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

//
// matrix product: a strip of rows, interleaved block by block, times columns of activations
//

// the instruction sets that have kernels for it, in arch/
#if defined(__SSE4_1__) || defined(__AVX2__) || (defined(__aarch64__) && defined(__ARM_NEON))
#define GGML_TRIT_GEMM
#endif

#define TRIT_STRIP       16   // rows in a strip
#define TRIT_TILE_BLOCKS 12   // blocks of a strip that are unpacked at a time for many columns
#define TRIT_FEW_COLUMNS 4    // up to so many columns are multiplied without unpacking to memory
#define TRIT_PREFETCH    4096 // so many bytes ahead

// activations of a block of weights: two blocks of Q8_0, and the terms that undo the offset of unsigned codes
struct trit_activations {
    float   d[2];
    int32_t bias[8];
    int8_t  qs[QK_TRIT];
};

// Blocks of n_rows <= TRIT_STRIP rows to a strip; the last row stands in for rows that are missing.
// Block i of the strip takes TRIT_STRIP blocks of memory. Its words lie in quads, four words of each row:
// first those of rows 0, 1, 4, 5, 8, 9, 12, 13, then those of the others, so that packing both halves
// to bytes gives the rows in order. Words that are left over follow row by row, in pairs and one by one.
void ggml_trit_interleave        (int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size, void * GGML_RESTRICT strip);
void ggml_trit_interleave_generic(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size, void * GGML_RESTRICT strip);

void ggml_trit_prepare_activations(int depth, int64_t n_blocks, const block_q8_0 * GGML_RESTRICT x, struct trit_activations * GGML_RESTRICT y);

// s[c][row0 + i] = row i of the strip times column c, from block y_block0 of the column on; accumulate goes on from what s has.
// n_blocks <= TRIT_TILE_BLOCKS or n_cols <= TRIT_FEW_COLUMNS
void ggml_trit_gemm_strip(int depth, int64_t n_blocks, const void * GGML_RESTRICT strip,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate);

// the same for n_rows <= TRIT_STRIP rows as they are in a file, which are interleaved on the way; any number of blocks
void ggml_trit_gemm_rows(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate);
void ggml_trit_gemm_rows_generic(int depth, int64_t n_blocks, int n_rows, const void * GGML_RESTRICT x, size_t row_size,
        int64_t n_cols, const struct trit_activations * const * y, int64_t y_block0, float * const * s, int64_t row0, bool accumulate);

#ifdef __cplusplus
}
#endif
