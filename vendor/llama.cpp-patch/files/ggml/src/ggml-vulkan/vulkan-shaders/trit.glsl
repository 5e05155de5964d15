#if !defined(GGML_TRIT_COMP)
#define GGML_TRIT_COMP

// TRIT1..TRIT4: fields, codes and scales. ggml-trit.c is the reference of the format.
//
// A word is a fraction, of 16 bits. Times 3^n, it is the field of its first n trits before the point, and what the next
// field is taken from behind it. Four words are a quad; column c of a block is the weights 4c to 4c + 3, a field of a quad.
//
// This file is GLSL and C++, as the tests run it on the host. What includes it says where words come from: TRIT_REF is the
// type of a reference to a block, TRIT_WORD(x, i) is word i of block x, as a uint.

#include "../../ggml-trit-common.h"

#if !defined(__cplusplus)
#define TRIT_INOUT(type) inout type
#endif

const uint  trit_ratios[TRIT_N_SCALES] = { TRIT_RATIOS };
const float trit_anchor_octave[4][6]   = { TRIT_ANCHOR_OCTAVES };
const uint  trit_pow3[TRIT_PER_WORD]   = { TRIT_POWERS };

//
// scales of the four groups
//

// divided by 1024; times a power of two, all anchors are normal numbers
float trit_anchor(const uint depth, const uvec4 k) {
    const float octave = trit_anchor_octave[depth - 1u][3u*(k.x%2u) + (k.y + k.z + k.w)%3u];

    return uintBitsToFloat(floatBitsToUint(octave) - (k.x/2u << 23u));
}

uvec4 trit_ratios_of(const uvec4 k) {
    return uvec4(uint(TRIT_RATIO_ONE), trit_ratios[k.y], trit_ratios[k.z], trit_ratios[k.w]);
}

//
// codes as bytes
//

uint trit_pack(const uvec4 codes) {
    return codes.x | (codes.y << 8u) | (codes.z << 16u) | (codes.w << 24u);
}

// the same without the offset, as signed bytes; no byte overflows into the next
int trit_signed_bytes(const uint depth, const uint packed_codes) {
    return int((packed_codes + (0x80u - uint(TRIT_OFFSET(depth)))*0x01010101u) ^ 0x80808080u);
}

//
// one field after the other: a word that is read once gives all it holds
//

// Of the product, the upper half is the field, and the lower half what the next one is taken from. Floats are exact: none has
// more than 24 bits. Their fields lose an offset in the same operation.
#define TRIT_DEFINE_TAKE(uint_type, float_type)                                                    \
    uint_type trit_take(TRIT_INOUT(uint_type) x, const uint levels) {                              \
        const uint_type product = x*levels;                                                        \
        x = product & 0xFFFFu;                                                                     \
        return product >> 16u;                                                                     \
    }                                                                                              \
    float_type trit_take(TRIT_INOUT(float_type) x, const float levels, const float offset) {       \
        const float_type scaled = fma(x, float_type(levels), float_type(-offset));                 \
        const float_type field  = floor(scaled);                                                   \
        x = scaled - field;                                                                        \
        return field;                                                                              \
    }

TRIT_DEFINE_TAKE(uint,  float)
TRIT_DEFINE_TAKE(uvec2, vec2)
TRIT_DEFINE_TAKE(uvec4, vec4)

// the two words of 32 bits as fractions of 65536
uvec2 trit_words(const uint pair) {
    return uvec2(pair & 0xFFFFu, pair >> 16u);
}

// and as floats: one between 1 and 2 has the word behind its point, without a conversion, which many GPUs do slowly
vec2 trit_fractions(const uint pair) {
    return vec2(uintBitsToFloat(((pair << 7u) & 0x7FFF80u) | 0x3F800000u),
                uintBitsToFloat(((pair >> 9u) & 0x7FFF80u) | 0x3F800000u)) - 1.0f;
}

//
// any field, for shaders that take a column at a time
//

#if defined(TRIT_REF)

// the fields of four words behind what skip = 3^j leaves out
uvec4 trit_field(const uvec4 words, const uvec4 skip, const uint levels) {
    return (((words*skip) & 0xFFFFu)*levels) >> 16u;
}

uvec4 trit_quad(TRIT_REF x, const uint p) {
    return uvec4(TRIT_WORD(x, 4u*p), TRIT_WORD(x, 4u*p + 1u), TRIT_WORD(x, 4u*p + 2u), TRIT_WORD(x, 4u*p + 3u));
}

// two words that hold four things each, in halves
uvec4 trit_pair(TRIT_REF x, const uint i) {
    return uvec4(TRIT_WORD(x, i), TRIT_WORD(x, i), TRIT_WORD(x, i + 1u), TRIT_WORD(x, i + 1u));
}

uvec4 trit_scale_indexes(const uint depth, TRIT_REF x) {
    uvec4 k;
    if (depth == 1u) {
        k = 3u*trit_field(trit_quad(x, 0u), uvec4(trit_pow3[8]), 9u) + trit_field(trit_quad(x, 1u), uvec4(trit_pow3[8]), 3u);
    } else if (depth == 3u) {
        k = 9u*trit_field(trit_quad(x, 0u), uvec4(trit_pow3[9]), 3u) +
            3u*trit_field(trit_quad(x, 1u), uvec4(trit_pow3[9]), 3u) +
               trit_field(trit_quad(x, 2u), uvec4(trit_pow3[9]), 3u);
    } else {
        k = trit_field(trit_pair(x, depth == 2u ? 12u : 24u), uvec4(81u, 2187u, 81u, 2187u), 27u);
    }
    return k;
}

// The codes of column c, plus the offset. One return, as the optimizer of old versions of glslc crashes otherwise.
uvec4 trit_column(const uint depth, TRIT_REF x, const uint c) {
    const uint per_word = uint(TRIT_CODES_PER_WORD(depth));
    const uint levels   = uint(TRIT_LEVELS(depth));

    uvec4 codes;
    if (c < per_word*uint(TRIT_QUADS(depth))) {
        codes = trit_field(trit_quad(x, c/per_word), uvec4(trit_pow3[depth*(c%per_word)]), levels);
    } else if (depth == 2u) {
        codes = trit_field(trit_pair(x, 12u), uvec4(1u, 9u, 1u, 9u), levels);
    } else if (depth == 3u) {
        codes = 3u*trit_field(uvec4(TRIT_WORD(x, 20u)), uvec4(1u, 9u, 81u, 729u), 9u) +
                   trit_field(trit_quad(x, 3u), uvec4(trit_pow3[9]), 3u);
    } else if (c < 15u) {
        codes = 9u*trit_field(trit_quad(x, 2u*(c - 12u)), uvec4(trit_pow3[8]), 9u) +
                   trit_field(trit_quad(x, 2u*(c - 12u) + 1u), uvec4(trit_pow3[8]), 9u);
    } else {
        codes = trit_field(uvec4(TRIT_WORD(x, 24u), TRIT_WORD(x, 26u), TRIT_WORD(x, 25u), TRIT_WORD(x, 26u)),
                           uvec4(1u, 1u, 1u, 81u), levels);
    }
    return codes;
}

// The scale of group g, and with it the weights of column c of that group. Each product is rounded, as in the reference.

float trit_scale(const uint depth, TRIT_REF x, const uint g) {
    const uvec4 k = trit_scale_indexes(depth, x);
    precise float scale = trit_anchor(depth, k)*float(g == 0u ? uint(TRIT_RATIO_ONE) : trit_ratios[k[g]]);

    return scale;
}

vec4 trit_weights(const uint depth, TRIT_REF x, const uint c, const float scale) {
    precise vec4 weights = scale*(vec4(trit_column(depth, x, c)) - float(TRIT_OFFSET(depth)));

    return weights;
}

#endif // defined(TRIT_REF)

#endif // !defined(GGML_TRIT_COMP)
