// Fuzz target for libFuzzer: whatever bytes a file holds as TRIT blocks, the reference reads them within bounds, judges
// them as a round trip does, and makes finite weights of them.
//
// The first byte of the input picks the depth, the others are blocks.

#include "ggml-trit.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_WORDS 27

// only the encoder calls it
size_t ggml_row_size(enum ggml_type type, int64_t n) {
    (void) type;
    (void) n;
    abort();
}

static void require(int condition) {
    if (!condition) {
        abort();
    }
}

static void dequantize(int depth, const void * blocks, float * weights, int64_t n_weights) {
    switch (depth) {
        case 1: dequantize_row_trit1(blocks, weights, n_weights); break;
        case 2: dequantize_row_trit2(blocks, weights, n_weights); break;
        case 3: dequantize_row_trit3(blocks, weights, n_weights); break;
        default: dequantize_row_trit4(blocks, weights, n_weights);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size == 0) {
        return 0;
    }
    const int depth = 1 + data[0] % 4;
    const int n_words = ggml_trit_n_words(depth);
    const size_t block_size = n_words*sizeof(uint16_t);
    const size_t n_blocks = (size - 1)/block_size;

    // the memory ends where the blocks end
    uint16_t * words = malloc(n_blocks*block_size + (n_blocks == 0));
    float * weights = malloc(n_blocks*QK_TRIT*sizeof(float) + (n_blocks == 0));
    require(words != NULL && weights != NULL);
    memcpy(words, data + 1, n_blocks*block_size);

    int all_valid = 1;
    for (size_t i = 0; i < n_blocks; ++i) {
        const uint16_t * block_words = words + i*n_words;
        struct ggml_trit_block block;
        ggml_trit_unpack(depth, block_words, &block);
        const int most = depth == 1 ? 1 : depth == 2 ? 4 : depth == 3 ? 13 : 40;
        for (int j = 0; j < QK_TRIT; ++j) {
            require(abs(block.code[j]) <= most);
        }
        for (int g = 0; g < NG_TRIT; ++g) {
            require(block.k[g] < TRIT_N_SCALES);
        }

        uint16_t repacked[MAX_WORDS];
        ggml_trit_pack(depth, &block, repacked);
        require(ggml_trit_validate_row(depth, repacked, 1));
        const int valid = memcmp(repacked, block_words, block_size) == 0;
        require(ggml_trit_validate_row(depth, block_words, 1) == valid);
        all_valid &= valid;
    }
    require(ggml_trit_validate_row(depth, words, n_blocks) == all_valid);

    dequantize(depth, words, weights, n_blocks*QK_TRIT);
    for (size_t i = 0; i < n_blocks*QK_TRIT; ++i) {
        require(isfinite(weights[i]));
    }
    free(weights);
    free(words);
    return 0;
}
