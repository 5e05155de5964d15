// Checks the arithmetic of the Vulkan shaders, compiled for the host, against the scalar reference: all bits are the same,
// but for products with vectors of floats, which are as near as their sums of floats allow.
//
// Compiled for each type, DATA_A_TRIT<depth>, and without and with TRIT_Q8_1. Nothing is printed but what is wrong.

#include "../problem.h"
#include "glsl.h"

#include <vector>

#include "trit_types.glsl"

#define DEPTH TRIT_DEPTH

enum { NUM_ROWS = 3, NUM_COLS = 2 };

#define FLOAT_TYPE   float
#define FLOAT_TYPEV2 vec2

// what the shaders name: buffers, and the push constants

template <typename T>
struct words_as {
    const uint8_t * data;
    size_t size;

    T operator[](size_t i) const {
        T x = 0;
        if ((i + 1)*sizeof(T) > size) {
            fail("TRIT%d: %zu bytes are read at %zu of %zu", DEPTH, sizeof(T), i*sizeof(T), size);
        } else {
            memcpy(&x, data + i*sizeof(T), sizeof(T));
        }
        return x;
    }
};

static words_as<uint16_t> data_a;
static words_as<uint32_t> data_a_packed32;

struct block_q8_1_x4 {
    vec2 ds[4];
    int  qs[32];
};
static std::vector<block_q8_1_x4> data_b;
static std::vector<vec4>          data_b_v4;

static struct { uint batch_stride_b; } p;

static struct { int qs[8]; vec2 d_scales; } buf_a[1];

#include "mul_mmq_trit_funcs.glsl"
#include "mul_mat_vec_trit_funcs.glsl"

static bool same(float a, float b) {
    return memcmp(&a, &b, sizeof(a)) == 0;
}

static float scale_of(const struct ggml_trit_block & block, int g) {
    return ggml_trit_anchor(DEPTH, block.k)*(g == 0 ? TRIT_RATIO_ONE : ggml_trit_ratio[block.k[g]]);
}

static void check_block(const struct ggml_trit_block & block, int ib) {
    const uint x = ib*TRIT_N_WORDS;

    const uvec4 k = trit_scale_indexes(DEPTH, x);
    for (int g = 0; g < NG_TRIT; ++g) {
        if (k[g] != block.k[g]) {
            fail("TRIT%d: scale index %d is %u, not %d", DEPTH, g, k[g], block.k[g]);
        }
    }
    if (!same(trit_anchor(DEPTH, k), ggml_trit_anchor(DEPTH, block.k))) {
        fail("TRIT%d: the anchor is %a, not %a", DEPTH, trit_anchor(DEPTH, k), ggml_trit_anchor(DEPTH, block.k));
    }
    for (int i = 0; i < QK_TRIT; ++i) {
        const float expected = scale_of(block, i/QG_TRIT)*block.code[i];
        const float weight   = trit_weights(DEPTH, x, i/4, trit_scale(DEPTH, x, i/QG_TRIT))[i%4];
        if (!same(weight, expected)) {
            fail("TRIT%d: weight %d is %a, not %a", DEPTH, i, weight, expected);
        }
    }

    // the tile of mul_mmq
    for (int half = 0; half < 2; ++half) {
        for (uint c = 0; c < 8; ++c) {
            block_a_to_shmem(0, 2*ib + half, c);
        }
        for (int i = 0; i < 32; ++i) {
            const int code = (int8_t) (buf_a[0].qs[i/4] >> 8*(i%4));
            if (code != block.code[32*half + i]) {
                fail("TRIT%d, tile: code %d is %d, not %d", DEPTH, 32*half + i, code, block.code[32*half + i]);
            }
        }
        if (!same(buf_a[0].d_scales.x, scale_of(block, 2*half)) || !same(buf_a[0].d_scales.y, scale_of(block, 2*half + 1))) {
            fail("TRIT%d, tile: scales %d and %d are %a and %a", DEPTH, 2*half, 2*half + 1, buf_a[0].d_scales.x, buf_a[0].d_scales.y);
        }
    }
}

// one block of each row, times each column
static void check_product(const struct problem & problem, int ib) {
    for (int c = 0; c < NUM_COLS; ++c) {
        for (int n = 0; n < NUM_ROWS; ++n) {
            temp[c][n] = 0;
        }
    }
    p.batch_stride_b = problem.n_blocks*QK_TRIT;
    calc_block(0, 0, ib, problem.n_blocks, 0, problem.n_rows - 1);

    for (int c = 0; c < problem.n_cols; ++c) {
        for (int n = 0; n < problem.n_rows; ++n) {
            const struct ggml_trit_block & block = problem.block[n][ib];
            float term[2], absolute = 0;
            for (int half = 0; half < 2; ++half) {
                const block_q8_0 * y = column(&problem, c) + 2*ib + half;
                int32_t absolutes;
                term[half] = GGML_COMPUTE_FP16_TO_FP32(y->d)*integer_sum(&block, y->qs, half, &absolutes);
                absolute  += GGML_COMPUTE_FP16_TO_FP32(y->d)*absolutes;
            }
            const float anchor   = ggml_trit_anchor(DEPTH, block.k);
            const float expected = anchor*(term[0] + term[1]);
#if defined(TRIT_Q8_1)
            const float tolerance = 0;
            GGML_UNUSED(absolute);
#else
            const float tolerance = 1e-6f*anchor*absolute;
#endif
            if (!(fabsf(temp[c][n] - expected) <= tolerance)) {
                fail("TRIT%d, row %d, column %d, block %d: the product is %a, not %a", DEPTH, n, c, ib, temp[c][n], expected);
            }
        }
    }
}

static void check_problem(enum kind kind, int n_rows, int n_blocks) {
    struct problem problem = make_problem(kind, DEPTH, n_rows, n_blocks, NUM_COLS);
    const size_t size = (size_t) n_rows*n_blocks*TRIT_N_WORDS*sizeof(uint16_t);

    data_a          = { (const uint8_t *) problem.rows.data, size };
    data_a_packed32 = { (const uint8_t *) problem.rows.data, size };
    data_b.assign((NUM_COLS*n_blocks + 1)/2, block_q8_1_x4());
    data_b_v4.clear();
    for (int c = 0; c < NUM_COLS; ++c) {
        for (int i = 0; i < 2*n_blocks; ++i) {
            const block_q8_0 * y = column(&problem, c) + i;
            const float        d = GGML_COMPUTE_FP16_TO_FP32(y->d);
            const int          j = 2*n_blocks*c + i;
            data_b[j/4].ds[j%4].x = d;
            memcpy(&data_b[j/4].qs[8*(j%4)], y->qs, QK8_0);
            for (int l = 0; l < QK8_0; l += 4) {
                data_b_v4.push_back(d*vec4(y->qs[l], y->qs[l + 1], y->qs[l + 2], y->qs[l + 3]));
            }
        }
    }

    for (int ib = 0; ib < n_blocks; ++ib) {
        for (int n = 0; n < n_rows; ++n) {
            check_block(problem.block[n][ib], n*n_blocks + ib);
        }
        check_product(problem, ib);
    }
    free_problem(&problem);
}

int main() {
    init_ggml();
    for (int kind = 0; kind < EVERY_WORD; ++kind) {
        for (int trial = 0; trial < 50; ++trial) {
            check_problem((enum kind) kind, 1 + random_below(NUM_ROWS), 1 + random_below(MAX_BLOCKS));
        }
    }
    for (int i = 0; i < N_WORDS; i += NUM_ROWS*MAX_BLOCKS) {
        check_problem(EVERY_WORD, NUM_ROWS, MAX_BLOCKS);
    }
    return report();
}
