// Kernels for sass.py: each thread multiplies one block of weights with 1 or 8 columns, and does nothing else.

#include "vecdotq.cuh"

template <int depth, int n_cols>
static __device__ void multiply(const void * __restrict__ x, const block_q8_1 * __restrict__ y, const int stride_y, float * __restrict__ dst) {
    const int i = blockIdx.x*blockDim.x + threadIdx.x;
    float sum[n_cols];
#pragma unroll
    for (int c = 0; c < n_cols; ++c) {
        sum[c] = vec_dot_trit_q8_1<depth>(x, y + c*stride_y + 2*i, i, 0);
    }
#pragma unroll
    for (int c = 0; c < n_cols; ++c) {
        dst[n_cols*i + c] = sum[c];
    }
}

#define KERNEL(depth, n_cols)                                                                                             \
    extern "C" __global__ void trit##depth##_##n_cols(const void * x, const block_q8_1 * y, int stride_y, float * dst) { \
        multiply<depth, n_cols>(x, y, stride_y, dst);                                                                    \
    }

KERNEL(1, 1) KERNEL(1, 8)
KERNEL(2, 1) KERNEL(2, 8)
KERNEL(3, 1) KERNEL(3, 8)
KERNEL(4, 1) KERNEL(4, 8)
