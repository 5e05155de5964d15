// What the checks see of the emulator, beside upstream's own interface.
#pragma once

#include "ggml-metal-device.h"

// as far as supports_op looks into it; that function is taken from ggml-metal-device.m as it is
struct ggml_metal_device {
    struct ggml_metal_device_props props;
};

#ifdef __cplusplus
#include <string>
#include <vector>

namespace emulator {

// memory with nothing readable behind it
struct guarded_memory {
    char * data;

    explicit guarded_memory(size_t size);
    guarded_memory(const guarded_memory &) = delete;
    ~guarded_memory();

private:
    char * base;
    size_t mapped;
};

ggml_metal_device_t device();

// the last threads of a threadgroup first: results must not depend on it
extern bool reverse_order;

std::vector<std::string> kernel_names();

// the kernels that were run
extern std::vector<std::string> dispatched;

} // namespace emulator
#endif
