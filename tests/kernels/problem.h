#pragma once

// Blocks, activations and matrices that the kernels are tried on, and what their sums must be; for C and C++.

#include "ggml-impl.h"
#include "ggml-trit.h"
#include "simd-mappings.h"
#include "trit.h"

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_COLS   17
#define MAX_BLOCKS 40
#define MAX_PRINTED 20
#define N_WORDS    65536 // valid ones, 3^10, and all others

// what the kernels need from the rest of ggml
float ggml_table_f32_f16[1 << 16];

size_t ggml_row_size(enum ggml_type type, int64_t ne) {
    static const size_t block_size[4] = { sizeof(block_trit1), sizeof(block_trit2), sizeof(block_trit3), sizeof(block_trit4) };
    return block_size[type - GGML_TYPE_TRIT1]*(ne/QK_TRIT);
}

static void init_ggml(void) {
    for (int i = 0; i < 1 << 16; ++i) {
        ggml_table_f32_f16[i] = GGML_FP16_TO_FP32((ggml_fp16_t) i);
    }
}

static int n_failures = 0;

__attribute__((format(printf, 1, 2))) static void fail(const char * format, ...) {
    if (++n_failures > MAX_PRINTED) {
        return;
    }
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
}

// the exit status
static int report(void) {
    if (n_failures > MAX_PRINTED) {
        printf("and %d more\n", n_failures - MAX_PRINTED);
    }
    return n_failures > 0;
}

//
// memory with nothing readable behind it
//

struct memory {
    char * base;
    char * data;
    size_t mapped;
};

static struct memory memory_alloc(size_t size) {
    const size_t page = sysconf(_SC_PAGESIZE);
    struct memory m;
    m.mapped = (size + page - 1)/page*page + page;
    m.base   = (char *) mmap(NULL, m.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m.base == MAP_FAILED || mprotect(m.base + m.mapped - page, page, PROT_NONE) != 0) {
        perror("check: mmap");
        exit(2);
    }
    m.data = m.base + m.mapped - page - size;
    return m;
}

static void memory_free(struct memory m) {
    munmap(m.base, m.mapped);
}

//
// weights and activations
//

enum kind {
    RANDOM,
    EXTREME,     // only the greatest codes, activations and ratios of either sign, and the ends of the scale indexes
    ADVERSARIAL, // all products of a row have the same sign: the greatest sums there are
    EVERY_WORD,  // words in turn, invalid ones too, a different one in each place
    N_KINDS,
};

static uint64_t state = 1;

static uint32_t random_below(uint32_t n) {
    state = state*6364136223846793005u + 1442695040888963407u;
    return (uint32_t) (((state >> 32)*n) >> 32);
}

static int random_sign(void) {
    return random_below(2) ? 1 : -1;
}

static int code_max(int depth) {
    return depth == 1 ? 1 : depth == 2 ? 4 : depth == 3 ? 13 : 40;
}

static struct ggml_trit_block random_block(enum kind kind, int depth, int sign) {
    struct ggml_trit_block block;
    const int top = code_max(depth);
    for (int i = 0; i < QK_TRIT; ++i) {
        block.code[i] = kind == RANDOM ? (int) random_below(2*top + 1) - top : kind == EXTREME ? random_sign()*top : sign*top;
    }
    for (int g = 0; g < NG_TRIT; ++g) {
        block.k[g] = kind == RANDOM ? random_below(TRIT_N_SCALES) : kind == EXTREME ? random_below(2)*(TRIT_N_SCALES - 1) : 0;
    }
    return block;
}

static block_q8_0 random_activations(enum kind kind) {
    block_q8_0 y;
    y.d = 0x1000 + random_below(0x3000); // a finite half, positive and normal
    for (int i = 0; i < QK8_0; ++i) {
        y.qs[i] = kind == EXTREME ? 127*random_sign() : kind == ADVERSARIAL ? 127 : (int) random_below(255) - 127;
    }
    return y;
}

// a matrix of TRIT_STRIP rows, or fewer, and columns to multiply it with
struct problem {
    int depth;
    int n_rows;
    int n_blocks;
    int n_cols;
    struct ggml_trit_block (*block)[MAX_BLOCKS]; // [n_rows]
    struct memory rows;
    struct memory cols[MAX_COLS];
};

static const block_q8_0 * column(const struct problem * p, int c) {
    return (const block_q8_0 *) p->cols[c].data;
}

static struct problem make_problem(enum kind kind, int depth, int n_rows, int n_blocks, int n_cols) {
    static struct ggml_trit_block blocks[TRIT_STRIP][MAX_BLOCKS];
    static uint32_t next_word = 0;

    struct problem p = { depth, n_rows, n_blocks, n_cols, blocks, { NULL, NULL, 0 }, { { NULL, NULL, 0 } } };
    const int n_words = ggml_trit_n_words(depth);
    p.rows = memory_alloc((size_t) n_rows*n_blocks*n_words*sizeof(uint16_t));
    uint16_t * words = (uint16_t *) p.rows.data;
    for (int r = 0; r < n_rows; ++r) {
        const int sign = random_sign();
        for (int ib = 0; ib < n_blocks; ++ib, words += n_words) {
            if (kind == EVERY_WORD) {
                for (int l = 0; l < n_words; ++l) {
                    words[l] = (uint16_t) (next_word + 1009*l);
                }
                ++next_word;
                ggml_trit_unpack(depth, words, &blocks[r][ib]);
            } else {
                blocks[r][ib] = random_block(kind, depth, sign);
                ggml_trit_pack(depth, &blocks[r][ib], words);
            }
        }
    }
    for (int c = 0; c < n_cols; ++c) {
        p.cols[c] = memory_alloc(2*n_blocks*sizeof(block_q8_0));
        for (int i = 0; i < 2*n_blocks; ++i) {
            const block_q8_0 y = random_activations(kind);
            memcpy(p.cols[c].data + i*sizeof(y), &y, sizeof(y));
        }
    }
    return p;
}

static void free_problem(struct problem * p) {
    memory_free(p->rows);
    for (int c = 0; c < p->n_cols; ++c) {
        memory_free(p->cols[c]);
    }
}

// The sum of half a block, as kernels must have it, and that of its absolute terms if asked for. Both fit into 32 bits.
static int32_t integer_sum(const struct ggml_trit_block * x, const int8_t * qs, int half, int32_t * sum_of_absolutes) {
    int32_t sum = 0;
    int32_t absolutes = 0;
    for (int i = 0; i < QK8_0; ++i) {
        const int g = 2*half + i/QG_TRIT;
        const int term = (g == 0 ? TRIT_RATIO_ONE : ggml_trit_ratio[x->k[g]])*x->code[QK8_0*half + i]*qs[i];
        sum       += term;
        absolutes += abs(term);
    }
    if (sum_of_absolutes) {
        *sum_of_absolutes = absolutes;
    }
    return sum;
}
