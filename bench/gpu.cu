// What gpu.py compares with, as lines "name value": bytes per second of a copy within the GPU's memory, read and written, and
// the microseconds that cuBLAS takes for an F16 matrix of 4096 rows of 14336 times a vector.

#include <cublas_v2.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define REPEATS 50
#define WARM_UP 5

static void check(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "gpu: %s failed\n", what);
        exit(1);
    }
}

static void * allocate(size_t size) {
    void * data = nullptr;
    check(cudaMalloc(&data, size) == cudaSuccess, "cudaMalloc");
    check(cudaMemset(data, 0, size) == cudaSuccess, "cudaMemset");
    return data;
}

// seconds that one call takes
template <typename Function>
static double timed(Function function) {
    cudaEvent_t begin;
    cudaEvent_t end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int i = 0; i < WARM_UP; ++i) {
        function();
    }
    cudaEventRecord(begin);
    for (int i = 0; i < REPEATS; ++i) {
        function();
    }
    cudaEventRecord(end);
    check(cudaEventSynchronize(end) == cudaSuccess, "the measurement");
    float milliseconds;
    cudaEventElapsedTime(&milliseconds, begin, end);
    return milliseconds/1e3/REPEATS;
}

int main() {
    const size_t size = 1 << 30;
    void * from = allocate(size);
    void * to   = allocate(size);
    const double copy = timed([&] {
        check(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice) == cudaSuccess, "cudaMemcpyAsync");
    });
    printf("copy_bytes_per_second %.0f\n", 2*size/copy);

    const int m = 4096;
    const int k = 14336;
    cublasHandle_t handle;
    check(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS, "cublasCreate");
    const void * x = allocate((size_t) m*k*sizeof(half));
    const void * y = allocate(k*sizeof(half));
    void * dst     = allocate(m*sizeof(half));
    const float alpha = 1.0f;
    const float beta  = 0.0f;
    const double product = timed([&] {
        const cublasStatus_t status = cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, m, 1, k, &alpha, x, CUDA_R_16F, k,
            y, CUDA_R_16F, k, &beta, dst, CUDA_R_16F, m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT_TENSOR_OP);
        check(status == CUBLAS_STATUS_SUCCESS, "cublasGemmEx");
    });
    printf("cublas_f16_microseconds %.2f\n", 1e6*product);
    return 0;
}
