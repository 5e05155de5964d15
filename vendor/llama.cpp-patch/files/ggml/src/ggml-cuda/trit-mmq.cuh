#pragma once

#include "mmq.cuh"
#include "trit.cuh"

// Codes as bytes and a float scale for each 16 of them: the layout of Q8_0_16, that NVFP4 and IQ2_XS have too.
// Rows end in the middle of a tile where they are no multiple of MMQ_ITER_K. What is loaded there, of the next row
// or of the padding, is finite whatever the bits, and is multiplied with activations that are zero.
template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_trit(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    constexpr int warp_size = ggml_cuda_get_physical_warp_size();
    constexpr int nwarps    = ggml_cuda_mmq_get_nthreads(type, J, fallback) / warp_size;
    constexpr int I         = ggml_cuda_mmq_get_I(type, J, fallback);
    constexpr int depth     = trit_depth(type);

    int * x_qs = x_tile;
#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
    constexpr int sram_stride = ggml_cuda_mmq_get_sram_stride(type, J, fallback);
    float * x_df = (float *) (x_qs + 2*MMQ_TILE_NE_K);
#else
    constexpr tile_x_sizes txs = mmq_get_dp4a_tile_x_sizes(type, I);
    float * x_df = (float *) (x_qs + txs.qs);
#endif // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

    constexpr int threads_per_row = MMQ_ITER_K / QK_TRIT; // each thread unpacks one block
    constexpr int rows_per_warp   = warp_size / threads_per_row;
    const int kbx = threadIdx.x % threads_per_row;

#pragma unroll
    for (int i0 = 0; i0 < I; i0 += rows_per_warp*nwarps) {
        int i = i0 + threadIdx.y*rows_per_warp + threadIdx.x/threads_per_row;

        if (fallback) {
            i = min(i, i_max);
        }

        uint32_t codes[QK_TRIT/4];
        uint32_t k[NG_TRIT];
        const int64_t ib = (int64_t) kbx0 + i*stride + kbx;
        trit_unpack<depth>(x + ib*(2*TRIT_WORDS(depth)), codes, k);
        const float anchor = trit_anchor<depth>(k);

#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
        int   * row_qs = x_qs + i*sram_stride;
        float * row_df = x_df + i*sram_stride;
#else
        int   * row_qs = x_qs + i*(2*MMQ_TILE_NE_K + 1);
        float * row_df = x_df + i*(4*MMQ_TILE_NE_K/QI8_0) + i/(QI8_0/4);
#endif // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

#pragma unroll
        for (int j = 0; j < QK_TRIT/4; ++j) {
            row_qs[QK_TRIT/4*kbx + j] = trit_signed_bytes<depth>(codes[j]);
        }
#pragma unroll
        for (int g = 0; g < NG_TRIT; ++g) {
            row_df[NG_TRIT*kbx + g] = anchor*trit_ratio(k[g], g);
        }
    }
}
