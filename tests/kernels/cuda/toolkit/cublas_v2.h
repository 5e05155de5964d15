#pragma once

// In place of cuBLAS's header where the CUDA toolkit comes without: the names that common.cuh and ggml-cuda.cu use. It is
// enough to compile objects; arguments are not checked, nothing is defined.

#include <cuda_runtime.h>

#define CUBLAS_VER_MAJOR 13
#define CUBLAS_VER_MINOR 0

typedef struct cublasContext * cublasHandle_t;

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasMath_t { CUBLAS_TF32_TENSOR_OP_MATH };
enum cublasComputeType_t { CUBLAS_COMPUTE_16F, CUBLAS_COMPUTE_32F };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT_TENSOR_OP };

const char * cublasGetStatusString(cublasStatus_t status);

template <typename... T> cublasStatus_t cublasCreate(T...);
template <typename... T> cublasStatus_t cublasDestroy(T...);
template <typename... T> cublasStatus_t cublasSetMathMode(T...);
template <typename... T> cublasStatus_t cublasSetStream(T...);
template <typename... T> cublasStatus_t cublasSetWorkspace(T...);
template <typename... T> cublasStatus_t cublasSgemm(T...);
template <typename... T> cublasStatus_t cublasGemmEx(T...);
template <typename... T> cublasStatus_t cublasGemmBatchedEx(T...);
template <typename... T> cublasStatus_t cublasGemmStridedBatchedEx(T...);
