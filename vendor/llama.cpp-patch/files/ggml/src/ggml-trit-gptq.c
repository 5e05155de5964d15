// Second-order error feedback on TRIT blocks: takes rows to the kernels, a tile at a time.

#include "ggml-trit-gptq.h"
#include "ggml-trit-tile.h"

#include <assert.h>
#include <string.h>

// n entries of the rows from row first on; lanes without a row get a default
static void load_tile(float * tile, const struct ggml_trit_gptq_matrix * matrix, int n, int64_t first, int n_rows, float lacking) {
    for (int j = 0; j < n; ++j) {
        float * lanes = tile + j*TRIT_TILE;
        memcpy(lanes, matrix->data + j*matrix->stride + first, n_rows*sizeof(float));
        for (int r = n_rows; r < TRIT_TILE; ++r) {
            lanes[r] = lacking;
        }
    }
}

static void store_tile(const struct ggml_trit_gptq_matrix * matrix, const float * tile, int n, int64_t first, int n_rows) {
    for (int j = 0; j < n; ++j) {
        memcpy(matrix->data + j*matrix->stride + first, tile + j*TRIT_TILE, n_rows*sizeof(float));
    }
}

static int rows_of_tile(int64_t first, int64_t n_rows) {
    return n_rows - first < TRIT_TILE ? (int) (n_rows - first) : TRIT_TILE;
}

int64_t ggml_trit_gptq_quantize(int depth, int64_t n_rows, const struct ggml_trit_gptq_columns * columns,
        const struct ggml_trit_gptq_matrix * aim, const struct ggml_trit_gptq_matrix * value, const struct ggml_trit_gptq_scales * scales) {
    assert(depth >= 1 && depth <= 4);

    const struct trit_kernels * kernels = trit_kernels();
    struct trit_lattice lat;
    trit_init_lattice(&lat, depth);

    TRIT_ALIGNED float importance[QK_TRIT*TRIT_TILE];
    for (int i = 0; i < QK_TRIT*TRIT_TILE; ++i) {
        importance[i] = columns->importance[i/TRIT_TILE];
    }

    for (int64_t first = 0; first < n_rows; first += TRIT_TILE) {
        TRIT_ALIGNED float aims  [QK_TRIT*TRIT_TILE];
        TRIT_ALIGNED float values[QK_TRIT*TRIT_TILE];
        TRIT_ALIGNED float scale [NG_TRIT*TRIT_TILE];
        uint8_t k[TRIT_TILE][NG_TRIT];
        bool found[TRIT_TILE];

        const int n = rows_of_tile(first, n_rows);
        load_tile(aims, aim, QK_TRIT, first, n, 0.0f);
        kernels->search(&lat, aims, importance, k, found);
        for (int r = 0; r < n; ++r) {
            if (!found[r]) {
                return first + r;
            }
        }
        trit_group_scales(&lat, k, scale);
        kernels->feed_back(&lat, columns->feedback, aims, scale, values);

        store_tile(value, values, QK_TRIT, first, n);
        store_tile(&scales->scale, scale, NG_TRIT, first, n);
        memcpy(scales->k + first*NG_TRIT, k, n*NG_TRIT);
    }
    return -1;
}

int64_t ggml_trit_gptq_descend(int depth, int64_t n_rows, const struct ggml_trit_gptq_columns * columns, bool search,
        const struct ggml_trit_gptq_matrix * gradient, const struct ggml_trit_gptq_matrix * value, const struct ggml_trit_gptq_scales * scales) {
    assert(depth >= 1 && depth <= 4);

    const struct trit_kernels * kernels = trit_kernels();
    struct trit_lattice lat;
    trit_init_lattice(&lat, depth);

    for (int64_t first = 0; first < n_rows; first += TRIT_TILE) {
        TRIT_ALIGNED float values[QK_TRIT*TRIT_TILE];
        TRIT_ALIGNED float slopes[QK_TRIT*TRIT_TILE];
        TRIT_ALIGNED float scale [NG_TRIT*TRIT_TILE];
        uint8_t k[TRIT_TILE][NG_TRIT] = { { 0 } };

        const int n = rows_of_tile(first, n_rows);
        load_tile(values, value, QK_TRIT, first, n, 0.0f);
        load_tile(slopes, gradient, QK_TRIT, first, n, 0.0f);
        load_tile(scale, &scales->scale, NG_TRIT, first, n, 1.0f);
        memcpy(k, scales->k + first*NG_TRIT, n*NG_TRIT);

        kernels->descend(&lat, columns, values, slopes, scale, k, search);

        float finite[TRIT_TILE] = { 0.0f }; // or NaN
        for (int j = 0; j < QK_TRIT; ++j) {
            for (int r = 0; r < TRIT_TILE; ++r) {
                finite[r] += values[j*TRIT_TILE + r]*0.0f;
            }
        }
        for (int r = 0; r < n; ++r) {
            if (finite[r] != 0.0f) {
                return first + r;
            }
        }
        store_tile(value, values, QK_TRIT, first, n);
        store_tile(&scales->scale, scale, NG_TRIT, first, n);
        memcpy(scales->k + first*NG_TRIT, k, n*NG_TRIT);
    }
    return -1;
}
