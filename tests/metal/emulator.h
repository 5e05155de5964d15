// Runs Metal kernels that were compiled as C++: what the kernels see of the emulator.
//
// The threads of a threadgroup are fibers. One runs until it comes to a barrier or to an operation across its SIMD
// group, and then waits until all others that take part are there. Threads that wait for different things, or that have
// ended where others wait, are an error.
#pragma once

#include <stdint.h>

namespace emulator {

constexpr int SIMD_WIDTH = 32;

struct size3 {
    int x, y, z;
};

// a thread of a grid
struct thread_state {
    void * const * buffers; // by index, as the encoder has set them
    char * threadgroup_memory;

    size3 threadgroup_position_in_grid;
    size3 thread_position_in_threadgroup;
    size3 threads_per_threadgroup;

    int thread_index_in_threadgroup;
    int thread_index_in_simdgroup;
    int simdgroup_index_in_threadgroup;
};

typedef void (*kernel_t)(const thread_state & thread);

// What a translated .metal file makes known of itself. Strings must stay where they are.
struct kernel_registration {
    kernel_registration(const char * name, kernel_t kernel);
};

struct function_constant_registration {
    function_constant_registration(int index, bool * value);
    function_constant_registration(int index, int16_t * value);
};

// threadgroup_barrier and simdgroup_barrier
void threadgroup_barrier();
void simdgroup_barrier();

// All threads of a SIMD group give a value and get all 32 values. The pointer is good until the next such operation.
const uint64_t * simd_exchange(uint64_t value);

int thread_index_in_simdgroup();
int thread_index_in_threadgroup();

} // namespace emulator
