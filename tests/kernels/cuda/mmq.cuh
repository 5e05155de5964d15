#pragma once

// In place of ggml-cuda/mmq.cuh: a tile of 16 rows, loaded by one warp in two steps. The strides are upstream's, of
// GGML_CUDA_MMQ_SRAM_LAYOUT_Q3_K and MMQ_DP4A_TXS_Q8_0_16.

#include "common.cuh"

#define MMQ_ITER_K    256
#define MMQ_TILE_NE_K 32
#define QI8_0         8

#define TILE_ROWS 16

struct tile_x_sizes {
    int qs;
    int dm;
    int sc;
};

static constexpr int ggml_cuda_get_physical_warp_size() {
    return 32;
}

static constexpr int ggml_cuda_mmq_get_nthreads(ggml_type, int, bool) {
    return 32;
}

static constexpr int ggml_cuda_mmq_get_I(ggml_type, int, bool) {
    return TILE_ROWS;
}

#ifdef TURING_MMA_AVAILABLE
static constexpr int ggml_cuda_mmq_get_sram_stride(ggml_type, int, bool) {
    return 2*MMQ_TILE_NE_K + MMQ_TILE_NE_K/2 + 4;
}
#else
static constexpr tile_x_sizes mmq_get_dp4a_tile_x_sizes(ggml_type, int I) {
    return { I*MMQ_TILE_NE_K*2 + I, I*MMQ_TILE_NE_K*4/QI8_0 + I/(QI8_0/4), 0 };
}
#endif
