// The variants of the kernels: AVX-512, AVX2, and plain C for all others. The best that runs on this CPU is taken.
// This file is compiled without floating-point contraction, so that all variants give the same bits.

#include "ggml-trit-tile.h"
#include "ggml-trit-gptq.h"
#include "ggml-impl.h"

#include <math.h>
#include <string.h>

void trit_init_lattice(struct trit_lattice * lat, int depth) {
    // how many positions below its clipping point a group's scale is searched, per depth:
    // few levels gain from clipping the largest weights, many levels do not
    static const int search_depth[5] = { 0, 10, 6, 5, 4 };

    const float * octave = ggml_trit_anchor_octave[depth - 1];
    lat->code_max     = TRIT_OFFSET(depth);
    lat->search_depth = search_depth[depth];
    for (int n = 0; n < TRIT_N_ANCHORS; ++n) {
        lat->anchor[n] = ldexpf(octave[n % 6], -(n/6)); // a power of two: exact
    }
    for (int i = 0; i < 128; ++i) {
        lat->reach[i] = -1.0f;
    }
    for (int p = 0; p < TRIT_N_POS; ++p) {
        // three octaves up and down again, to keep the index positive
        const int n = p - TRIT_POS_ANCHOR + 18;
        lat->scale[p] = ldexpf(octave[n % 6], 3 - n/6)*TRIT_RATIO_ONE;
        lat->inv  [p] = 1.0f/lat->scale[p];
        lat->reach[p] = lat->scale[p]*lat->code_max;
    }
}

void trit_group_scales(const struct trit_lattice * lat, uint8_t k[TRIT_TILE][NG_TRIT], float * scale) {
    for (int r = 0; r < TRIT_TILE; ++r) {
        const float anchor = lat->anchor[3*k[r][0] + (k[r][1] + k[r][2] + k[r][3]) % 3];
        scale[r] = anchor*TRIT_RATIO_ONE;
        for (int g = 1; g < NG_TRIT; ++g) {
            scale[g*TRIT_TILE + r] = anchor*ggml_trit_ratio[k[r][g]];
        }
    }
}

//
// any CPU: vectors of four floats, where the compiler knows them
//

#if defined(_MSC_VER) && !defined(__clang__)
#define TRIT_INLINE static __forceinline
#define PLAIN_PARTS TRIT_TILE
typedef float   plain_part;
typedef int32_t plain_mask;

TRIT_INLINE plain_part plain_choose(plain_mask m, plain_part a, plain_part b) {
    return m ? a : b;
}
#else
#define TRIT_INLINE static inline __attribute__((always_inline))
#define PLAIN_PARTS (TRIT_TILE/4)
typedef float   plain_part __attribute__((vector_size(16)));
typedef int32_t plain_mask __attribute__((vector_size(16)));

TRIT_INLINE plain_part plain_choose(plain_mask m, plain_part a, plain_part b) {
    return (plain_part) (((plain_mask) a & m) | ((plain_mask) b & ~m));
}
#endif

typedef struct { plain_part part[PLAIN_PARTS]; } plain_v;
typedef struct { plain_mask part[PLAIN_PARTS]; } plain_m;

#define PLAIN_OP(type, name, args, expression) \
    TRIT_INLINE type name args { \
        type y; \
        for (int i = 0; i < PLAIN_PARTS; ++i) { \
            y.part[i] = (expression); \
        } \
        return y; \
    }

PLAIN_OP(plain_v, plain_set1,   (float x),                         x - (plain_part) { 0 })
PLAIN_OP(plain_v, plain_add,    (plain_v a, plain_v b),            a.part[i] + b.part[i])
PLAIN_OP(plain_v, plain_sub,    (plain_v a, plain_v b),            a.part[i] - b.part[i])
PLAIN_OP(plain_v, plain_mul,    (plain_v a, plain_v b),            a.part[i] * b.part[i])
PLAIN_OP(plain_v, plain_div,    (plain_v a, plain_v b),            a.part[i] / b.part[i])
PLAIN_OP(plain_m, plain_lt,     (plain_v a, plain_v b),            a.part[i] < b.part[i])
PLAIN_OP(plain_v, plain_select, (plain_m m, plain_v a, plain_v b), plain_choose(m.part[i], a.part[i], b.part[i]))
PLAIN_OP(plain_v, plain_min,    (plain_v a, plain_v b),            plain_choose(a.part[i] < b.part[i], a.part[i], b.part[i]))
PLAIN_OP(plain_v, plain_max,    (plain_v a, plain_v b),            plain_choose(a.part[i] > b.part[i], a.part[i], b.part[i]))

TRIT_INLINE plain_v plain_load(const float * x) {
    plain_v v;
    memcpy(&v, x, sizeof(v));
    return v;
}
TRIT_INLINE void plain_store(float * x, plain_v v) {
    memcpy(x, &v, sizeof(v));
}
TRIT_INLINE plain_v plain_lookup(const float * table, plain_v at) {
    float y[TRIT_TILE];
    plain_store(y, at);
    for (int r = 0; r < TRIT_TILE; ++r) {
        y[r] = table[(int) y[r]];
    }
    return plain_load(y);
}

#define TRIT_NAME     "plain"
#define TRIT_FN(name) plain_##name
#define TRIT_TARGET   static
#define V        plain_v
#define M        plain_m
#define v_set1   plain_set1
#define v_load   plain_load
#define v_store  plain_store
#define v_lookup plain_lookup
#define v_add    plain_add
#define v_sub    plain_sub
#define v_mul    plain_mul
#define v_div    plain_div
#define v_min    plain_min
#define v_max    plain_max
#define v_lt     plain_lt
#define v_select plain_select

#include "ggml-trit-tile-impl.h"

#undef TRIT_NAME
#undef TRIT_FN
#undef TRIT_TARGET
#undef TRIT_INLINE
#undef V
#undef M
#undef v_set1
#undef v_load
#undef v_store
#undef v_lookup
#undef v_add
#undef v_sub
#undef v_mul
#undef v_div
#undef v_min
#undef v_max
#undef v_lt
#undef v_select

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define TRIT_X86

#include <immintrin.h>

//
// AVX2: a pair of vectors
//

#define TRIT_ISA      "avx2"
#define TRIT_NAME     "avx2"
#define TRIT_FN(name) avx2_##name
#define TRIT_TARGET   static __attribute__((target(TRIT_ISA)))
#define TRIT_INLINE   static inline __attribute__((always_inline, target(TRIT_ISA)))

typedef struct { __m256 lo, hi; } avx2_v;

#define AVX2_OP(name, op) \
    TRIT_INLINE avx2_v name(avx2_v a, avx2_v b) { \
        return (avx2_v) { op(a.lo, b.lo), op(a.hi, b.hi) }; \
    }

AVX2_OP(avx2_add, _mm256_add_ps)
AVX2_OP(avx2_sub, _mm256_sub_ps)
AVX2_OP(avx2_mul, _mm256_mul_ps)
AVX2_OP(avx2_div, _mm256_div_ps)
AVX2_OP(avx2_min, _mm256_min_ps)
AVX2_OP(avx2_max, _mm256_max_ps)

TRIT_INLINE avx2_v avx2_set1(float x) {
    return (avx2_v) { _mm256_set1_ps(x), _mm256_set1_ps(x) };
}
TRIT_INLINE avx2_v avx2_load(const float * x) {
    return (avx2_v) { _mm256_load_ps(x), _mm256_load_ps(x + 8) };
}
TRIT_INLINE void avx2_store(float * x, avx2_v v) {
    _mm256_store_ps(x, v.lo);
    _mm256_store_ps(x + 8, v.hi);
}
TRIT_INLINE avx2_v avx2_lookup(const float * table, avx2_v i) {
    return (avx2_v) { _mm256_i32gather_ps(table, _mm256_cvttps_epi32(i.lo), 4), _mm256_i32gather_ps(table, _mm256_cvttps_epi32(i.hi), 4) };
}
TRIT_INLINE avx2_v avx2_lt(avx2_v a, avx2_v b) {
    return (avx2_v) { _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ) };
}
TRIT_INLINE avx2_v avx2_select(avx2_v m, avx2_v a, avx2_v b) {
    return (avx2_v) { _mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi) };
}

#define V        avx2_v
#define M        avx2_v
#define v_set1   avx2_set1
#define v_load   avx2_load
#define v_store  avx2_store
#define v_lookup avx2_lookup
#define v_add    avx2_add
#define v_sub    avx2_sub
#define v_mul    avx2_mul
#define v_div    avx2_div
#define v_min    avx2_min
#define v_max    avx2_max
#define v_lt     avx2_lt
#define v_select avx2_select

#include "ggml-trit-tile-impl.h"

#undef TRIT_ISA
#undef TRIT_NAME
#undef TRIT_FN
#undef V
#undef M
#undef v_set1
#undef v_load
#undef v_store
#undef v_lookup
#undef v_add
#undef v_sub
#undef v_mul
#undef v_div
#undef v_min
#undef v_max
#undef v_lt
#undef v_select

//
// AVX-512
//

#define TRIT_ISA      "avx512f"
#define TRIT_NAME     "avx512"
#define TRIT_FN(name) avx512_##name

TRIT_INLINE __m512 avx512_lookup(const float * table, __m512 i) {
    return _mm512_i32gather_ps(_mm512_cvttps_epi32(i), table, 4);
}

#define V        __m512
#define M        __mmask16
#define v_set1   _mm512_set1_ps
#define v_load   _mm512_load_ps
#define v_store  _mm512_store_ps
#define v_lookup avx512_lookup
#define v_add    _mm512_add_ps
#define v_sub    _mm512_sub_ps
#define v_mul    _mm512_mul_ps
#define v_div    _mm512_div_ps
#define v_min    _mm512_min_ps
#define v_max    _mm512_max_ps
#define v_lt(a, b)        _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define v_select(m, a, b) _mm512_mask_blend_ps(m, b, a)

#include "ggml-trit-tile-impl.h"
#endif

//
// choice
//

static const struct trit_kernels * best_kernels(void) {
#ifdef TRIT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        return &avx512_kernels;
    }
    if (__builtin_cpu_supports("avx2")) {
        return &avx2_kernels;
    }
#endif
    return &plain_kernels;
}

static const struct trit_kernels * chosen; // by a test

const struct trit_kernels * trit_kernels(void) {
    return chosen ? chosen : best_kernels();
}

bool ggml_trit_use_kernels(const char * name) {
    const struct trit_kernels * kernels = NULL;
    if (!name) {
        chosen = NULL;
        return true;
    }
    if (strcmp(name, plain_kernels.name) == 0) {
        kernels = &plain_kernels;
    }
#ifdef TRIT_X86
    __builtin_cpu_init();
    if (strcmp(name, avx2_kernels.name) == 0 && __builtin_cpu_supports("avx2")) {
        kernels = &avx2_kernels;
    }
    if (strcmp(name, avx512_kernels.name) == 0 && __builtin_cpu_supports("avx512f")) {
        kernels = &avx512_kernels;
    }
#endif
    if (kernels) {
        chosen = kernels;
    }
    return kernels;
}
