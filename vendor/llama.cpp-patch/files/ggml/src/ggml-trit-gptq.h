#pragma once

// Second-order error feedback (GPTQ) on TRIT blocks: what is done with 64 columns of a matrix, a block of each row.
//
// Matrices are transposed: entry (column j, row r) at data[j*stride + r]. Rows do not depend on each other, so calls for
// different rows may run at the same time. Every CPU computes the same bits: sums go over the columns in order, without
// fused multiply-add.

#include "ggml-trit.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_trit_gptq_matrix {
    float * data;
    int64_t stride; // floats
};

// the scales of each row's block
struct ggml_trit_gptq_scales {
    struct ggml_trit_gptq_matrix scale; // [4][n_rows], of each group
    uint8_t * k;                        // [n_rows][4], scale indexes
};

// what is known of the 64 columns, given other columns
struct ggml_trit_gptq_columns {
    const float * feedback;   // [64][64], read above the diagonal: (i, j) is how much of the error of column i goes into column j
    const float * importance; // [64], weights of the squared errors in the search of scales
    const float * hessian;    // [64][64], symmetric
    const float * inverse;    // [64][64], of the Hessian
};

// Searches the scales for the weights `aim`, then quantizes column after column: value[j] is the multiple of its scale that is
// nearest to aim[j] + sum over i < j of feedback(i, j)*(aim[i] - value[i]).
//   columns: without Hessian and inverse
//   aim:     [64][n_rows]
//   value:   [64][n_rows], output
//   scales:  output
// Returns the first row that is not finite or above the range of the scales, where it stops, or -1.
GGML_API int64_t ggml_trit_gptq_quantize(int depth, int64_t n_rows, const struct ggml_trit_gptq_columns * columns,
    const struct ggml_trit_gptq_matrix * aim, const struct ggml_trit_gptq_matrix * value, const struct ggml_trit_gptq_scales * scales);

// Coordinate descent: moves each column in turn to the multiple of its scale where the squared error of the products is least,
// given all other columns.
//   search:        whether to try other scales too: those for the values that are best without rounding, quantized as above,
//                  with a descent of their own. A row takes them where its error gets less.
//   gradient:      [64][n_rows], half the gradient of the squared error of the products
//   value, scales: changed
// Returns the first row whose values are not finite, where it stops, or -1.
GGML_API int64_t ggml_trit_gptq_descend(int depth, int64_t n_rows, const struct ggml_trit_gptq_columns * columns, bool search,
    const struct ggml_trit_gptq_matrix * gradient, const struct ggml_trit_gptq_matrix * value, const struct ggml_trit_gptq_scales * scales);

#ifdef __cplusplus
}
#endif
