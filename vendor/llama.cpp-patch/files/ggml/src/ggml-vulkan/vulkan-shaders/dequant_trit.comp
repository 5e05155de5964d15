#version 450

#include "dequant_head.glsl"

layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;

layout (binding = 0) readonly buffer A {A_TYPE data_a[];};
layout (binding = 1) writeonly buffer D {D_TYPE data_b[];};

#include "dequant_funcs_trit.glsl"

void main() {
    // a group
    const uint i = 16 * gl_GlobalInvocationID.x;
    if (i >= p.nel) {
        return;
    }

    const uint x = i / QUANT_K * TRIT_N_WORDS;
    const uint g = i % QUANT_K / 16;
    const float d = trit_scale(TRIT_DEPTH, x, g);

    [[unroll]] for (uint l = 0; l < 4; ++l) {
        const vec4 v = trit_weights(TRIT_DEPTH, x, 4*g + l, d);

        data_b[i + 4*l    ] = D_TYPE(v.x);
        data_b[i + 4*l + 1] = D_TYPE(v.y);
        data_b[i + 4*l + 2] = D_TYPE(v.z);
        data_b[i + 4*l + 3] = D_TYPE(v.w);
    }
}
