#pragma once

// In place of ggml-cuda/common.cuh: what trit.cuh and trit-mmq.cuh use of CUDA and of ggml's headers, as host C++.

#include "ggml-impl.h"
#include "ggml-trit.h"

#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __forceinline__ inline

struct int2   { int x, y; };
struct uint4  { uint32_t x, y, z, w; };
struct float2 { float x, y; };

// the thread that is emulated
static struct { int x, y; } threadIdx;

template <ggml_type type> struct ggml_cuda_type_traits;

static float __uint_as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static uint32_t __float_as_uint(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static uint32_t __umulhi(uint32_t a, uint32_t b) {
    return (uint64_t) a*b >> 32;
}

static uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return ((uint64_t) high << 32 | low) >> (shift & 31);
}

static int min(int a, int b) {
    return a < b ? a : b;
}

// byte i of the result is the one that digit i of the selector counts from the low end of a, then of b
static uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t) b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= (uint32_t) (bytes >> 8*(selector >> 4*i & 7) & 0xFF) << 8*i;
    }
    return result;
}

static int ggml_cuda_dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c += (int8_t) (a >> 8*i)*(int8_t) (b >> 8*i);
    }
    return c;
}

static float __low2float(ggml_half2 x) {
    return GGML_COMPUTE_FP16_TO_FP32((ggml_half) x);
}
