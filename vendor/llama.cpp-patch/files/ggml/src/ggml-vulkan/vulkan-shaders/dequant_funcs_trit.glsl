// TRIT1..TRIT4 for the shaders that include dequant_funcs.glsl

#define TRIT_REF uint // the first word of the block
#define TRIT_WORD(x, i) uint(data_a[(x) + (i)])

#include "trit.glsl"

vec4 dequantize4(uint ib, uint iqs, uint a_offset) {
    const uint x = (a_offset + ib)*TRIT_N_WORDS;

    return trit_weights(TRIT_DEPTH, x, iqs/4, trit_scale(TRIT_DEPTH, x, iqs/16));
}
vec2 dequantize(uint ib, uint iqs, uint a_offset) {
    const vec4 v = dequantize4(ib, iqs, a_offset);
    return iqs%4 == 0 ? v.xy : v.zw;
}
vec2 get_dm(uint ib, uint a_offset) {
    return vec2(1, 0);
}
