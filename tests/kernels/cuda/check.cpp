// Checks the device functions of the CUDA backend, compiled for the host, against the scalar reference: all bits are the same.
//
// Compiled twice: the tiles of mmq have another layout where TURING_MMA_AVAILABLE is defined.
// Nothing is printed but what is wrong.

#include "../problem.h"
#include "trit-mmq.cuh"

#include <vector>

template <int depth> struct reference;
template <> struct reference<1> { static constexpr ggml_type type = GGML_TYPE_TRIT1; static void dequantize(const void * x, float * y, int k) { dequantize_row_trit1((const block_trit1 *) x, y, k); } };
template <> struct reference<2> { static constexpr ggml_type type = GGML_TYPE_TRIT2; static void dequantize(const void * x, float * y, int k) { dequantize_row_trit2((const block_trit2 *) x, y, k); } };
template <> struct reference<3> { static constexpr ggml_type type = GGML_TYPE_TRIT3; static void dequantize(const void * x, float * y, int k) { dequantize_row_trit3((const block_trit3 *) x, y, k); } };
template <> struct reference<4> { static constexpr ggml_type type = GGML_TYPE_TRIT4; static void dequantize(const void * x, float * y, int k) { dequantize_row_trit4((const block_trit4 *) x, y, k); } };

static bool same(float a, float b) {
    return memcmp(&a, &b, sizeof(a)) == 0;
}

static int signed_byte(uint32_t bytes, int i) {
    return (int8_t) (bytes >> 8*i);
}

template <int depth>
static const uint16_t * words_of(const struct problem & p, int row, int ib) {
    return (const uint16_t *) p.rows.data + ((int64_t) row*p.n_blocks + ib)*TRIT_WORDS(depth);
}

template <int depth>
static void check_block(const struct problem & p, int row, int ib) {
    const struct ggml_trit_block & block = p.block[row][ib];
    const uint16_t * words = words_of<depth>(p, row, ib);

    uint32_t codes[QK_TRIT/4];
    uint32_t k[NG_TRIT];
    trit_unpack<depth>(words, codes, k);

    for (int i = 0; i < QK_TRIT; ++i) {
        const int whole  = (int) (codes[i/4] >> 8*(i%4) & 0xFF) - TRIT_OFFSET(depth);
        const int tile   = signed_byte(trit_signed_bytes<depth>(codes[i/4]), i%4);
        const int single = trit_code<depth>(words, i);
        if (whole != block.code[i] || tile != block.code[i] || single != block.code[i]) {
            fail("TRIT%d, row %d, block %d: code %d is %d, %d and %d, not %d", depth, row, ib, i, whole, tile, single, block.code[i]);
        }
    }
    for (int g = 0; g < NG_TRIT; ++g) {
        const uint32_t single = trit_scale_index<depth>(words, g);
        if (k[g] != block.k[g] || single != block.k[g]) {
            fail("TRIT%d, row %d, block %d: scale index %d is %u and %u, not %d", depth, row, ib, g, k[g], single, block.k[g]);
        }
    }
    const float anchor = ggml_trit_anchor(depth, block.k);
    if (!same(trit_anchor<depth>(k), anchor)) {
        fail("TRIT%d, row %d, block %d: the anchor is %a, not %a", depth, row, ib, trit_anchor<depth>(k), anchor);
    }
}

template <int depth>
static void check_dequantize(const struct problem & p, int row) {
    std::vector<float> expected(QK_TRIT*p.n_blocks);
    reference<depth>::dequantize(words_of<depth>(p, row, 0), expected.data(), expected.size());
    for (int ib = 0; ib < p.n_blocks; ++ib) {
        for (int i = 0; i < QK_TRIT/2; ++i) {
            float2 v;
            dequantize_trit<depth>(words_of<depth>(p, row, 0), ib, i, v);
            const float * y = &expected[QK_TRIT*ib + i];
            if (!same(v.x, y[0]) || !same(v.y, y[QK_TRIT/2])) {
                fail("TRIT%d, row %d, block %d: weights %d and %d are %a and %a, not %a and %a", depth, row, ib, i, i + QK_TRIT/2, v.x, v.y, y[0], y[QK_TRIT/2]);
            }
        }
    }
}

template <int depth>
static void check_dot(const struct problem & p, int row, int c) {
    // the same activations as Q8_1; the sum that it also holds is not used
    const struct memory memory = memory_alloc(2*p.n_blocks*sizeof(block_q8_1));
    block_q8_1 * y = (block_q8_1 *) memory.data;
    for (int i = 0; i < 2*p.n_blocks; ++i) {
        y[i].ds = column(&p, c)[i].d | 0x7E000000;
        memcpy(y[i].qs, column(&p, c)[i].qs, QK8_1);
    }
    for (int ib = 0; ib < p.n_blocks; ++ib) {
        float term[2];
        for (int half = 0; half < 2; ++half) {
            const block_q8_0 * q = column(&p, c) + 2*ib + half;
            term[half] = GGML_COMPUTE_FP16_TO_FP32(q->d)*integer_sum(&p.block[row][ib], q->qs, half, NULL);
        }
        const float expected = ggml_trit_anchor(depth, p.block[row][ib].k)*(term[0] + term[1]);
        const float got      = vec_dot_trit_q8_1<depth>(words_of<depth>(p, row, 0), y + 2*ib, ib, 0);
        if (!same(got, expected)) {
            fail("TRIT%d, row %d, column %d, block %d: the dot product is %a, not %a", depth, row, c, ib, got, expected);
        }
    }
    memory_free(memory);
}

// the tile of all rows, and of the blocks from kbx0 on
template <int depth, bool fallback>
static void check_tile(const struct problem & p, int kbx0) {
    enum { N_BLOCKS = MMQ_ITER_K/QK_TRIT, CODE_INTS = MMQ_ITER_K/4, SCALES = NG_TRIT*N_BLOCKS };
    constexpr ggml_type type = reference<depth>::type;

#ifdef TURING_MMA_AVAILABLE
    // codes and scales of a row side by side
    constexpr int stride = ggml_cuda_mmq_get_sram_stride(type, 0, fallback);
    std::vector<int> tile(TILE_ROWS*stride);
#else
    // codes of all rows, with an odd stride; then their scales, one unused after each two rows
    constexpr tile_x_sizes sizes = mmq_get_dp4a_tile_x_sizes(type, TILE_ROWS);
    std::vector<int> tile(sizes.qs + sizes.dm);
#endif
    for (threadIdx.x = 0; threadIdx.x < 32; ++threadIdx.x) {
        ggml_cuda_mmq_load_tiles_trit<type, 0, fallback>(p.rows.data, tile.data(), kbx0, p.n_rows - 1, p.n_blocks);
    }

    for (int row = 0; row < p.n_rows; ++row) {
#ifdef TURING_MMA_AVAILABLE
        const int   * codes  = &tile[row*stride];
        const float * scales = (const float *) (codes + CODE_INTS);
#else
        const int   * codes  = &tile[row*(CODE_INTS + 1)];
        const float * scales = (const float *) &tile[sizes.qs + row*SCALES + row/2];
#endif
        for (int i = 0; i < MMQ_ITER_K; ++i) {
            const int expected = p.block[row][kbx0 + i/QK_TRIT].code[i%QK_TRIT];
            if (signed_byte(codes[i/4], i%4) != expected) {
                fail("TRIT%d, tile row %d: code %d is %d, not %d", depth, row, i, signed_byte(codes[i/4], i%4), expected);
            }
        }
        for (int i = 0; i < SCALES; ++i) {
            const struct ggml_trit_block & block = p.block[row][kbx0 + i/NG_TRIT];
            const int ratio = i%NG_TRIT == 0 ? TRIT_RATIO_ONE : ggml_trit_ratio[block.k[i%NG_TRIT]];
            const float expected = ggml_trit_anchor(depth, block.k)*ratio;
            if (!same(scales[i], expected)) {
                fail("TRIT%d, tile row %d: scale %d is %a, not %a", depth, row, i, scales[i], expected);
            }
        }
    }
}

template <int depth>
static void check_problem(enum kind kind, int n_rows, int n_blocks, int n_cols) {
    struct problem p = make_problem(kind, depth, n_rows, n_blocks, n_cols);
    for (int row = 0; row < n_rows; ++row) {
        for (int ib = 0; ib < n_blocks; ++ib) {
            check_block<depth>(p, row, ib);
        }
        check_dequantize<depth>(p, row);
        for (int c = 0; c < n_cols; ++c) {
            check_dot<depth>(p, row, c);
        }
    }
    for (int kbx0 = 0; kbx0 + MMQ_ITER_K/QK_TRIT <= n_blocks; kbx0 += MMQ_ITER_K/QK_TRIT) {
        check_tile<depth, true>(p, kbx0);
        if (n_rows == TILE_ROWS) {
            check_tile<depth, false>(p, kbx0);
        }
    }
    free_problem(&p);
}

template <int depth>
static void check_depth() {
    for (int kind = 0; kind < EVERY_WORD; ++kind) {
        for (int trial = 0; trial < 50; ++trial) {
            const int n_rows = trial%2 ? TILE_ROWS : 1 + random_below(TILE_ROWS);
            check_problem<depth>((enum kind) kind, n_rows, 1 + random_below(MAX_BLOCKS), 2);
        }
    }
    for (int i = 0; i < N_WORDS; i += TILE_ROWS*MAX_BLOCKS) {
        check_problem<depth>(EVERY_WORD, TILE_ROWS, MAX_BLOCKS, 1);
    }
}

int main() {
    check_depth<1>();
    check_depth<2>();
    check_depth<3>();
    check_depth<4>();
    return report();
}
