// TRIT1..TRIT4 for mul_mm_cm2.comp: MmTypeA says which

layout(buffer_reference, std430, buffer_reference_align = 2) buffer decodeBufTRIT {
   uint16_t qs[27]; // of TRIT4; the blocks of the others are shorter
};

#define TRIT_REF decodeBufTRIT
#define TRIT_WORD(x, i) uint(x.qs[i])

#include "trit.glsl"

f16vec4 dequantFuncTRIT_v(const in decodeBufTRIT bl, const in uint blockCoords[2], const in uint coordInBlock[2])
{
    const uint depth = MmTypeA - GGML_TYPE_TRIT1 + 1;
    const uint idx = coordInBlock[1];

    return f16vec4(trit_weights(depth, bl, idx/4, trit_scale(depth, bl, idx/16)));
}

float16_t dequantFuncTRIT(const in decodeBufTRIT bl, const in uint blockCoords[2], const in uint coordInBlock[2])
{
    return dequantFuncTRIT_v(bl, blockCoords, coordInBlock)[coordInBlock[1]%4];
}
