#pragma once

#include "traits.h"

// GGML internal header

// Buffer type that holds TRIT matrices as strips of interleaved rows; nullptr where this build has no kernels for them.
// The same kernels multiply matrices in plain host buffers, whose strips they interleave on the way.
ggml_backend_buffer_type_t ggml_backend_cpu_trit_buffer_type(void);
