// Compares the kernels of ggml-cpu that this program is linked with to arithmetic that anyone can read.
//
// Matrix products must be the same bits: their integer sums are exact, and the order of their float operations is the
// same on every machine. Dot products of vector code may round partial sums, so these are compared with a tolerance;
// that of a single weight must be exact. All that kernels read ends where the memory ends.
//
// `test_kernels_cross.py` compiles this for several instruction sets. Nothing is printed but what is wrong.

#include "problem.h"

#include <math.h>

#define TOLERANCE  3e-7  // of float sums: five roundings

//
// the matrix product
//

#ifdef GGML_TRIT_GEMM

// rounded once where the machine can
static float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return fmaf(a, b, c);
#else
    return a*b + c;
#endif
}

static float expected_product(const struct problem * p, float acc, int row, int c, int block0, int n) {
    for (int ib = block0; ib < block0 + n; ++ib) {
        const struct ggml_trit_block * x = &p->block[MIN(row, p->n_rows - 1)][ib];
        const block_q8_0 * y = column(p, c) + 2*ib;
        const float first = GGML_FP16_TO_FP32(y[0].d)*(float) integer_sum(x, y[0].qs, 0, NULL);
        const float sum   = multiply_add(GGML_FP16_TO_FP32(y[1].d), (float) integer_sum(x, y[1].qs, 1, NULL), first);
        acc = multiply_add(ggml_trit_anchor(p->depth, x->k), sum, acc);
    }
    return acc;
}

// rows from block0 on as a strip: the same from both functions that make one
static struct memory interleave(const struct problem * p, int block0) {
    const int n = p->n_blocks - block0;
    const size_t block_size = ggml_trit_n_words(p->depth)*sizeof(uint16_t);
    const char * rows = p->rows.data + block0*block_size;
    const struct memory strip   = memory_alloc(TRIT_STRIP*n*block_size);
    const struct memory generic = memory_alloc(TRIT_STRIP*n*block_size);
    ggml_trit_interleave        (p->depth, n, p->n_rows, rows, p->n_blocks*block_size, strip.data);
    ggml_trit_interleave_generic(p->depth, n, p->n_rows, rows, p->n_blocks*block_size, generic.data);
    if (memcmp(strip.data, generic.data, TRIT_STRIP*n*block_size) != 0) {
        fail("TRIT%d, blocks %d to %d of %d rows: interleaved otherwise than by the generic code", p->depth, block0, block0 + n - 1, p->n_rows);
    }
    memory_free(generic);
    return strip;
}

// blocks from block0 on, as a strip or as rows; what comes before them has been multiplied, if anything does
static void check_product(const struct problem * p, int block0, bool as_rows) {
    enum { ROW0 = 3, WIDTH = ROW0 + TRIT_STRIP + 2 };

    const int n = p->n_blocks - block0;
    const size_t block_size = ggml_trit_n_words(p->depth)*sizeof(uint16_t);
    const struct memory strip = interleave(p, block0);

    struct memory y[MAX_COLS];
    const struct trit_activations * y_ptr[MAX_COLS];
    float   before[MAX_COLS][WIDTH];
    float   s     [MAX_COLS][WIDTH];
    float * s_ptr [MAX_COLS];
    for (int c = 0; c < p->n_cols; ++c) {
        y[c] = memory_alloc(p->n_blocks*sizeof(struct trit_activations));
        ggml_trit_prepare_activations(p->depth, p->n_blocks, column(p, c), (struct trit_activations *) y[c].data);
        y_ptr[c] = (const struct trit_activations *) y[c].data;
        s_ptr[c] = s[c];
        for (int i = 0; i < WIDTH; ++i) {
            before[c][i] = s[c][i] = (float) random_below(1000);
        }
    }

    const bool accumulate = block0 > 0;
    if (as_rows) {
        const char * rows = p->rows.data + block0*block_size;
        ggml_trit_gemm_rows(p->depth, n, p->n_rows, rows, p->n_blocks*block_size, p->n_cols, y_ptr, block0, s_ptr, ROW0, accumulate);
    } else {
        ggml_trit_gemm_strip(p->depth, n, strip.data, p->n_cols, y_ptr, block0, s_ptr, ROW0, accumulate);
    }

    for (int c = 0; c < p->n_cols; ++c) {
        for (int i = 0; i < WIDTH; ++i) {
            const int row = i - ROW0;
            float expected = before[c][i];
            if (row >= 0 && row < TRIT_STRIP) {
                expected = expected_product(p, accumulate ? expected : 0.0f, row, c, block0, n);
            }
            if (memcmp(&expected, &s[c][i], sizeof(float)) != 0) {
                fail("TRIT%d, blocks %d to %d, %d columns, row %d, column %d: %a, not %a",
                    p->depth, block0, block0 + n - 1, p->n_cols, row, c, s[c][i], expected);
            }
        }
        memory_free(y[c]);
    }
    memory_free(strip);
}

static void check_products(void) {
    static const int n_cols[] = { 1, 2, 3, 4, 5, 8, 9, 17 };

    for (int depth = 1; depth <= 4; ++depth) {
        for (enum kind kind = 0; kind < EVERY_WORD; ++kind) {
            for (size_t i = 0; i < sizeof(n_cols)/sizeof(n_cols[0]); ++i) {
                const int few = n_cols[i] <= TRIT_FEW_COLUMNS;
                const int n_blocks[] = { 1, 2, TRIT_TILE_BLOCKS, TRIT_TILE_BLOCKS + 3, few ? MAX_BLOCKS : 9 };
                for (size_t j = 0; j < sizeof(n_blocks)/sizeof(n_blocks[0]); ++j) {
                    const int n_rows = random_below(2) ? TRIT_STRIP : 1 + random_below(TRIT_STRIP);
                    const int block0 = n_blocks[j] > TRIT_TILE_BLOCKS ? n_blocks[j] - TRIT_TILE_BLOCKS : 0;
                    struct problem p = make_problem(kind, depth, n_rows, n_blocks[j], n_cols[i]);
                    check_product(&p, block0, false);
                    check_product(&p, block0, true);
                    if (few) {
                        check_product(&p, 0, false);
                        check_product(&p, 0, true);
                    }
                    free_problem(&p);
                }
            }
        }
    }
}

static void check_every_word(void) {
    for (int depth = 1; depth <= 4; ++depth) {
        for (int i = 0; i < N_WORDS; i += TRIT_STRIP*MAX_BLOCKS) {
            struct problem p = make_problem(EVERY_WORD, depth, TRIT_STRIP, MAX_BLOCKS, 1);
            check_product(&p, 0, false);
            free_problem(&p);
        }
    }
}

#endif

//
// dot products of single rows
//

typedef void (*vec_dot)(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

struct dot_kernels {
    vec_dot vector;
    vec_dot scalar;
};

static const struct dot_kernels dot_kernels[5] = {
    { NULL, NULL },
    { ggml_vec_dot_trit1_q8_0, ggml_vec_dot_trit1_q8_0_generic },
    { ggml_vec_dot_trit2_q8_0, ggml_vec_dot_trit2_q8_0_generic },
    { ggml_vec_dot_trit3_q8_0, ggml_vec_dot_trit3_q8_0_generic },
    { ggml_vec_dot_trit4_q8_0, ggml_vec_dot_trit4_q8_0_generic },
};

static float dot(vec_dot kernel, const struct problem * p) {
    float s = NAN;
    kernel(QK_TRIT*p->n_blocks, &s, 0, p->rows.data, 0, p->cols[0].data, 0, 1);
    return s;
}

static void check_dot(const struct problem * p, const char * name, vec_dot kernel) {
    double exact     = 0.0;
    double magnitude = 0.0; // of the sum, were nothing to cancel out
    for (int ib = 0; ib < p->n_blocks; ++ib) {
        const struct ggml_trit_block * x = &p->block[0][ib];
        for (int half = 0; half < 2; ++half) {
            const block_q8_0 * y = column(p, 0) + 2*ib + half;
            const double scale = (double) ggml_trit_anchor(p->depth, x->k)*(double) GGML_FP16_TO_FP32(y->d);
            int32_t sum_of_absolutes;
            exact     += scale*integer_sum(x, y->qs, half, &sum_of_absolutes);
            magnitude += scale*sum_of_absolutes;
        }
    }
    const double got = (double) dot(kernel, p);
    if (!(fabs(got - exact) <= TOLERANCE*magnitude)) {
        fail("TRIT%d, %s dot product of %d blocks: %a, not %a", p->depth, name, p->n_blocks, got, exact);
    }
}

// one weight times one activation: the order of the sum does not matter
static void check_single_weights(struct problem * p, const char * name, vec_dot kernel) {
    block_q8_0 * y = (block_q8_0 *) p->cols[0].data;
    for (int i = 0; i < 2*p->n_blocks; ++i) {
        y[i].d = 0x3c00; // 1
        memset(y[i].qs, 0, QK8_0);
    }
    for (int i = 0; i < QK_TRIT*p->n_blocks; ++i) {
        const struct ggml_trit_block * x = &p->block[0][i/QK_TRIT];
        int8_t * q = &y[i/QK8_0].qs[i%QK8_0];
        *q = 127*random_sign();
        const float expected = ggml_trit_anchor(p->depth, x->k)*(float) integer_sum(x, y[i/QK8_0].qs, i/QK8_0%2, NULL);
        const float got      = dot(kernel, p);
        if (got != expected) {
            fail("TRIT%d, %s dot product with weight %d alone: %a, not %a", p->depth, name, i, got, expected);
        }
        *q = 0;
    }
}

// The scalar code adds all of a half of a block before it rounds.
static void check_integer_sum(struct problem * p, vec_dot kernel, int half) {
    block_q8_0 * y = (block_q8_0 *) p->cols[0].data;
    y[0].d = y[1].d = 0x3c00;
    memset(y[1 - half].qs, 0, QK8_0);
    const struct ggml_trit_block * x = &p->block[0][0];
    const float expected = ggml_trit_anchor(p->depth, x->k)*(float) integer_sum(x, y[half].qs, half, NULL);
    const float got      = dot(kernel, p);
    if (got != expected) {
        fail("TRIT%d, scalar dot product of half %d of a block: %a, not %a", p->depth, half, got, expected);
    }
}

static void check_dots(void) {
    for (int depth = 1; depth <= 4; ++depth) {
        const struct dot_kernels kernels = dot_kernels[depth];
        for (int trial = 0; trial < 200; ++trial) {
            const enum kind kind = trial%N_KINDS;
            struct problem p = make_problem(kind, depth, 1, 1 + random_below(MAX_BLOCKS), 1);
            check_dot(&p, "vector", kernels.vector);
            check_dot(&p, "scalar", kernels.scalar);
            free_problem(&p);

            p = make_problem(kind, depth, 1, 1, 1);
            check_integer_sum(&p, kernels.scalar, trial%2);
            free_problem(&p);
        }
        for (int n_blocks = 1; n_blocks <= 5; ++n_blocks) {
            for (enum kind kind = 0; kind < N_KINDS; ++kind) {
                struct problem p = make_problem(kind, depth, 1, n_blocks, 1);
                check_single_weights(&p, "vector", kernels.vector);
                check_single_weights(&p, "scalar", kernels.scalar);
                free_problem(&p);
            }
        }
    }
}

int main(void) {
    init_ggml();
#ifdef GGML_TRIT_GEMM
    check_products();
    check_every_word();
#else
    fail("there is no matrix product for this instruction set");
#endif
    check_dots();
    return report();
}
