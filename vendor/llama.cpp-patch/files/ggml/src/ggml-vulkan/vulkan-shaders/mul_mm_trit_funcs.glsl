// TRIT1..TRIT4 for mul_mm.comp: MmTypeA says which

layout (binding = 0) readonly buffer BUF_TRIT { uint16_t data[]; } a_trit;

#define TRIT_REF uint // the first word of the block
#define TRIT_WORD(x, i) uint(a_trit.data[(x) + (i)])

#include "trit.glsl"

// Eight weights, two columns of the same group. idx counts eights.
void load_trit_to_shmem(const uint idx, const uint col, const uint k_pair) {
    const uint depth   = MmTypeA - GGML_TYPE_TRIT1 + 1;
    const uint n_words = depth == 1 ? 8 : depth == 2 ? 14 : depth == 3 ? 21 : 27;

    const uint x = idx/(QUANT_K_TRIT/8)*n_words;
    const uint c = 2*(idx%(QUANT_K_TRIT/8));

    const float d  = trit_scale(depth, x, c/4);
    const vec4  v0 = trit_weights(depth, x, c,     d);
    const vec4  v1 = trit_weights(depth, x, c + 1, d);

    store_a(col, k_pair,     FLOAT_TYPEV2(v0.xy));
    store_a(col, k_pair + 1, FLOAT_TYPEV2(v0.zw));
    store_a(col, k_pair + 2, FLOAT_TYPEV2(v1.xy));
    store_a(col, k_pair + 3, FLOAT_TYPEV2(v1.zw));
}
