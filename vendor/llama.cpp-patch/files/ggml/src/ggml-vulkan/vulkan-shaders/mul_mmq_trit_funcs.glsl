// TRIT1..TRIT4 for mul_mmq.comp: a tile has signed bytes and two scales for 32 weights, as that of Q6_K.
// GLSL and C++, as trit.glsl is.

#define TRIT_REF uint // the first word of the block
#define TRIT_WORD(x, i) uint(data_a[(x) + (i)])

#include "trit.glsl"

// Like those of the K-quants, ib counts 32 weights; iqs is one of their 8 columns.
void block_a_to_shmem(const uint buf_ib, const uint ib, const uint iqs) {
    const uint x = ib/2*TRIT_N_WORDS;
    const uint h = ib%2;

    buf_a[buf_ib].qs[iqs] = trit_signed_bytes(TRIT_DEPTH, trit_pack(trit_column(TRIT_DEPTH, x, 8*h + iqs)));

    if (iqs == 0) {
        const uvec4 k      = trit_scale_indexes(TRIT_DEPTH, x);
        const vec4  scales = trit_anchor(TRIT_DEPTH, k)*vec4(trit_ratios_of(k));

        buf_a[buf_ib].d_scales = FLOAT_TYPEV2(h == 0 ? scales.x : scales.z, h == 0 ? scales.y : scales.w);
    }
}
