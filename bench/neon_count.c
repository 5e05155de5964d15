// Runs one of ggml's AArch64 kernels, for neon_instructions.py to count its instructions: two runs that differ in
// REPEATS alone differ in nothing else. No kernel's path depends on its data, so all data are zeros.
//
// usage: neon_count                  prints the names of the kernels, a line each
//        neon_count KERNEL REPEATS   runs that line's kernel (the first is 0), and prints how many times 32 weights
//                                    meet a column in one repeat

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml.h"
#include "quants.h"
#include "trit.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define N_WEIGHTS 2304 // in a row: a multiple of 256, and of the blocks of a tile
#define N_COLS    16

// what the kernels need from the rest of ggml
size_t ggml_row_size(enum ggml_type type, int64_t ne) {
    (void) type;
    (void) ne;
    abort();
}

static char weights    [TRIT_STRIP*N_WEIGHTS*2];
static char activations[N_COLS*N_WEIGHTS*2];
static float sums[N_COLS][TRIT_STRIP];

typedef void (*vec_dot)(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

// `rows` rows times as many columns
static int run_vec_dot(vec_dot kernel, int rows) {
    const size_t row_size = N_WEIGHTS*2;
    kernel(N_WEIGHTS, sums[0], TRIT_STRIP, weights, row_size, activations, row_size, rows);
    return rows*rows*N_WEIGHTS/32;
}

static int run_strip(int depth, int n_cols) {
    const struct trit_activations * y[N_COLS];
    float * s[N_COLS];
    for (int c = 0; c < n_cols; ++c) {
        y[c] = (const struct trit_activations *) (activations + c*N_WEIGHTS*2);
        s[c] = sums[c];
    }
    const int n_blocks = N_WEIGHTS/QK_TRIT;
    const int step     = n_cols <= TRIT_FEW_COLUMNS ? n_blocks : TRIT_TILE_BLOCKS;
    for (int ib = 0; ib < n_blocks; ib += step) {
        ggml_trit_gemm_strip(depth, step, weights, n_cols, y, ib, s, 0, ib > 0);
    }
    return TRIT_STRIP*n_cols*N_WEIGHTS/32;
}

struct kernel {
    const char * name;
    vec_dot      dot;   // NULL: a strip
    int          depth; // of a strip
    int          n;     // rows and columns of a dot product, or columns of a strip
};

static const struct kernel kernels[] = {
    { "TRIT1 strip, 1 column",   NULL, 1, 1      },
    { "TRIT2 strip, 1 column",   NULL, 2, 1      },
    { "TRIT3 strip, 1 column",   NULL, 3, 1      },
    { "TRIT4 strip, 1 column",   NULL, 4, 1      },
    { "TRIT1 strip, 16 columns", NULL, 1, N_COLS },
    { "TRIT2 strip, 16 columns", NULL, 2, N_COLS },
    { "TRIT3 strip, 16 columns", NULL, 3, N_COLS },
    { "TRIT4 strip, 16 columns", NULL, 4, N_COLS },
    { "TRIT1 row",               ggml_vec_dot_trit1_q8_0, 0, 1 },
    { "TRIT2 row",               ggml_vec_dot_trit2_q8_0, 0, 1 },
    { "TRIT3 row",               ggml_vec_dot_trit3_q8_0, 0, 1 },
    { "TRIT4 row",               ggml_vec_dot_trit4_q8_0, 0, 1 },
    { "Q3_K row",                ggml_vec_dot_q3_K_q8_K,  0, 1 },
    { "Q4_K row",                ggml_vec_dot_q4_K_q8_K,  0, 1 },
    { "Q4_0 row",                ggml_vec_dot_q4_0_q8_0,  0, 1 },
#if defined(__ARM_FEATURE_MATMUL_INT8)
    { "Q4_K 2 rows, 2 columns",  ggml_vec_dot_q4_K_q8_K,  0, 2 },
    { "Q4_0 2 rows, 2 columns",  ggml_vec_dot_q4_0_q8_0,  0, 2 },
#endif
};

enum { N_KERNELS = sizeof(kernels)/sizeof(kernels[0]) };

int main(int argc, char ** argv) {
    if (argc == 1) {
        for (int i = 0; i < N_KERNELS; ++i) {
            puts(kernels[i].name);
        }
        return 0;
    }
    if (argc != 3 || atoi(argv[1]) >= N_KERNELS) {
        return 2;
    }
    const struct kernel * k = &kernels[atoi(argv[1])];
    const int repeats = atoi(argv[2]);
    int n = 0;
    for (int i = 0; i < repeats; ++i) {
        n = k->dot ? run_vec_dot(k->dot, k->n) : run_strip(k->depth, k->n);
    }
    printf("%d\n", n);
    return 0;
}
