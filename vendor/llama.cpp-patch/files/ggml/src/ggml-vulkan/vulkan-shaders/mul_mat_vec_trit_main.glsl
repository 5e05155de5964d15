// mul_mat_vec_trit.comp and, for vectors of Q8_1, mul_mat_vecq.comp

#include "mul_mat_vec_trit_funcs.glsl"

void main() {
    const uint first_row = NUM_ROWS * (gl_WorkGroupID.x + gl_NumWorkGroups.x * gl_WorkGroupID.z);
    if (first_row >= p.stride_d) {
        return;
    }

    uint a_offset, b_offset, d_offset;
    get_offsets(a_offset, b_offset, d_offset);

    const uint tid = gl_LocalInvocationID.x;
    const uint num_blocks_per_row = p.ncols / QUANT_K;

    [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            temp[j][n] = FLOAT_TYPE(0);
        }
    }

    for (uint i = tid; i < num_blocks_per_row; i += gl_WorkGroupSize.x) {
        calc_block(a_offset, b_offset, i, num_blocks_per_row, first_row, p.stride_d - 1);
    }

    if (first_row + NUM_ROWS <= p.stride_d) {
        reduce_result(temp, d_offset, first_row, NUM_ROWS, tid);
    } else {
        reduce_result(temp, d_offset, first_row, p.stride_d - first_row, tid);
    }
}
