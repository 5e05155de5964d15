#pragma once

// Kernels that quantize TRIT_TILE rows (or blocks) at a time, one in each lane of the vectors. There is a variant for
// each instruction set; all give the same bits. ggml-trit-tile-impl.h is the code, ggml-trit-tile.c makes the variants.
//
// A tile is an array [n][TRIT_TILE]: entry j of all rows side by side. Tiles are aligned to 64 bytes.

#include "ggml-trit.h"

#define TRIT_TILE 16

#if defined(_MSC_VER) && !defined(__clang__)
#define TRIT_ALIGNED __declspec(align(64))
#else
#define TRIT_ALIGNED __attribute__((aligned(64)))
#endif

// All scales of a depth lie, up to the rounding of the ratios, on one lattice of sixth-octave steps:
// position p stands for the scale 3^(2 - depth) * 2^(3 - (p - 13)/6), a larger p for a smaller scale.
// An anchor n puts group 0 at p = n + 13 and lets group g > 0 take p = n + k_g.
#define TRIT_N_POS      (TRIT_N_ANCHORS + TRIT_N_SCALES - 1)
#define TRIT_POS_ANCHOR 13                                      // position of the anchor n = 0
#define TRIT_POS_LAST   (TRIT_POS_ANCHOR + TRIT_N_ANCHORS - 1)  // position of the last anchor

// a group whose weights all lie below half of F16's least subnormal is a group of zeros
#define TRIT_ZERO 0x1p-25f

struct trit_lattice {
    float scale [TRIT_N_POS];
    float inv   [TRIT_N_POS];
    float reach [128];            // the largest weight that is not clipped; -1 after the last position
    float anchor[TRIT_N_ANCHORS]; // divided by 1024
    float code_max;
    int   search_depth;           // how many positions below its clipping point a group's scale is searched
};

void trit_init_lattice(struct trit_lattice * lat, int depth);

// the scales of 16 blocks, a tile [NG_TRIT]
void trit_group_scales(const struct trit_lattice * lat, uint8_t k[TRIT_TILE][NG_TRIT], float * scale);

struct ggml_trit_gptq_columns; // see ggml-trit-gptq.h

struct trit_kernels {
    const char * name;

    // Scale indexes of 16 blocks: x and weight are tiles [QK_TRIT]; weight may be NULL. found[r] is false for a block
    // that is not finite or lies above the range; its indexes are undefined.
    void (*search)(const struct trit_lattice * lat, const float * x, const float * weight, uint8_t k[TRIT_TILE][NG_TRIT], bool found[TRIT_TILE]);

    // the column loop of ggml_trit_gptq_quantize: aim and value are tiles [QK_TRIT], scale is a tile [NG_TRIT]
    void (*feed_back)(const struct trit_lattice * lat, const float * feedback, const float * aim, const float * scale, float * value);

    // ggml_trit_gptq_descend: value and gradient are tiles [QK_TRIT], scale is a tile [NG_TRIT]; all are changed
    void (*descend)(const struct trit_lattice * lat, const struct ggml_trit_gptq_columns * columns, float * value, float * gradient, float * scale, uint8_t k[TRIT_TILE][NG_TRIT], bool search);
};

// the best kernels for this CPU
const struct trit_kernels * trit_kernels(void);

// For tests: from now on trit_kernels are those of this name ("avx512", "avx2", "plain"), or the best for NULL.
// False if they do not run here.
GGML_API bool ggml_trit_use_kernels(const char * name);
