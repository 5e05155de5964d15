#ifndef GGML_METAL_MUL_MV_TRIT
#define GGML_METAL_MUL_MV_TRIT

// TRIT1..TRIT4 times a vector. A part of mul_mv.metal, for its function constants.
//
// Four threads share a block. Each takes a lane of its quads, so that all do the same with other words, and neighbours
// read neighbouring words and activations.
template<typename block_t, short nr0, typename args_t>
void kernel_mul_mv_trit_f32_impl(
        args_t args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        threadgroup  char * shmem,
        uint3  tgpig,
        ushort tiisg,
        ushort sgitg) {
    const short NSG = FC_mul_mv_nsg;

    const int nb = args.ne00/QK_TRIT;

    const int r0 = tgpig.x;
    const int r1 = tgpig.y;
    const int im = tgpig.z;

    const int first_row = (r0 * NSG + sgitg) * nr0;

    const uint i12 = im%FC_mul_mv_ne12;
    const uint i13 = im/FC_mul_mv_ne12;

    const uint64_t offset1 = r1*args.nb11 + (i12)*args.nb12 + (i13)*args.nb13;

    device const float * y = (device const float *) (src1 + offset1);

    device const block_t * ax[nr0];
    for (short row = 0; row < nr0; ++row) {
        // the last row again where there are no more
        const int      i01     = MIN(first_row + row, args.ne01 - 1);
        const uint64_t offset0 = i01*args.nb01 + (i12/FC_mul_mv_r2)*args.nb02 + (i13/FC_mul_mv_r3)*args.nb03;
        ax[row] = (device const block_t *) (src0 + offset0);
    }

    const short ix   = tiisg/4;
    const short lane = tiisg%4;

    float sumf[nr0] = {0.f};

    for (int ib = ix; ib < nb; ib += N_SIMDWIDTH/4) {
        device const float * yb = y + ib*QK_TRIT + lane;

        float4x4 yl;

        FOR_UNROLL (short i = 0; i < 16; ++i) {
            yl[i/4][i%4] = yb[4*i];
        }

        FOR_UNROLL (short row = 0; row < nr0; ++row) {
            float4x4 codes;
            trit_lane(ax[row] + ib, lane, codes);

            const float4 sums = float4(
                    dot(codes[0], yl[0]),
                    dot(codes[1], yl[1]),
                    dot(codes[2], yl[2]),
                    dot(codes[3], yl[3]));

            sumf[row] += dot(trit_scales(ax[row] + ib), sums);
        }
    }

    device float * dst_f32 = (device float *) dst + (uint64_t)im*args.ne0*args.ne1 + (uint64_t)r1*args.ne0;

    for (short row = 0; row < nr0; ++row) {
        const float tot = simd_sum(sumf[row]);

        if (tiisg == 0 && first_row + row < args.ne01) {
            dst_f32[first_row + row] = tot;
        }
    }
}

template<typename block_t>
kernel void kernel_mul_mv_trit_f32(
        constant ggml_metal_kargs_mul_mv & args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]]) {
    kernel_mul_mv_trit_f32_impl<block_t, N_R0_TRIT, constant ggml_metal_kargs_mul_mv &>(args, src0, src1, dst, nullptr, tgpig, tiisg, sgitg);
}

typedef decltype(kernel_mul_mv_trit_f32<block_trit1>) mul_mv_trit_t;

template [[host_name("kernel_mul_mv_trit1_f32")]] kernel mul_mv_trit_t kernel_mul_mv_trit_f32<block_trit1>;
template [[host_name("kernel_mul_mv_trit2_f32")]] kernel mul_mv_trit_t kernel_mul_mv_trit_f32<block_trit2>;
template [[host_name("kernel_mul_mv_trit3_f32")]] kernel mul_mv_trit_t kernel_mul_mv_trit_f32<block_trit3>;
template [[host_name("kernel_mul_mv_trit4_f32")]] kernel mul_mv_trit_t kernel_mul_mv_trit_f32<block_trit4>;

#endif // GGML_METAL_MUL_MV_TRIT
