// A matrix of TRIT1..TRIT4 times few vectors: a thread multiplies a block. GLSL and C++, as trit.glsl is.
//
// With TRIT_Q8_1 the vectors are blocks of Q8_1, and four codes are multiplied by one integer dot product. Otherwise vectors
// are floats, and so are codes.

#include "trit.glsl"

#define TRIT_N_PAIRS (TRIT_N_WORDS/2)

#if defined(TRIT_Q8_1)
#define TRIT_T     uint
#define TRIT_T2    uvec2
#define TRIT_T4    uvec4
#define TRIT_CODES int   // packed bytes
#define TRIT_SUM   ivec4 // one for each group
#define TRIT_FRACTIONS(pair)     trit_words(pair)
#define TRIT_TAKE_CODE(x, n)     trit_take(x, uint(n))
#define TRIT_TAKE_INDEX(x, n)    trit_take(x, uint(n))
#define TRIT_FINISH(codes)       trit_signed_bytes(uint(TRIT_DEPTH), trit_pack(codes))
#define TRIT_DOT(codes, b, sum)  ((sum) + dotPacked4x8EXT(codes, b))
#else
#define TRIT_T     float
#define TRIT_T2    vec2
#define TRIT_T4    vec4
#define TRIT_CODES vec4
#define TRIT_SUM   vec4
#define TRIT_FRACTIONS(pair)     trit_fractions(pair)
#define TRIT_TAKE_CODE(x, n)     trit_take(x, float(n), float((n)/2))
#define TRIT_TAKE_INDEX(x, n)    trit_take(x, float(n), 0.0f)
#define TRIT_FINISH(codes)       codes
#define TRIT_DOT(codes, b, sum)  fma(codes.x, b.x, fma(codes.y, b.y, fma(codes.z, b.z, fma(codes.w, b.w, sum))))
#endif

FLOAT_TYPE temp[NUM_COLS][NUM_ROWS];

uint       pairs[NUM_ROWS][TRIT_N_PAIRS + 1];
TRIT_CODES codes[NUM_ROWS];
TRIT_T4    rest[NUM_ROWS];
TRIT_T4    indexes[NUM_ROWS];
TRIT_SUM   sums[NUM_COLS][NUM_ROWS];

// Pair i of a row is words 2i and 2i + 1 of its block. Reads every word once, and nothing behind the block.
void load_pairs(const uint n, const uint ib) {
#if TRIT_N_WORDS % 2 == 0
    [[unroll]] for (uint i = 0; i < TRIT_N_PAIRS; ++i) {
        pairs[n][i] = data_a_packed32[ib*TRIT_N_PAIRS + i];
    }
#else
    // every other block begins in the middle of 32 bits, behind the end of another block
    const uint odd   = ib%2;
    const uint first = ib*TRIT_N_WORDS/2;
    uint aligned[TRIT_N_PAIRS + 1];
    [[unroll]] for (uint i = 0; i < TRIT_N_PAIRS; ++i) {
        aligned[i] = data_a_packed32[first + i];
    }
    aligned[TRIT_N_PAIRS] = data_a_packed32[first + TRIT_N_PAIRS - 1 + odd];
    [[unroll]] for (uint i = 0; i < TRIT_N_PAIRS; ++i) {
        pairs[n][i] = odd != 0 ? (aligned[i] >> 16u) | (aligned[i + 1] << 16u) : aligned[i];
    }
    pairs[n][TRIT_N_PAIRS] = uint(data_a[ib*TRIT_N_WORDS + TRIT_N_WORDS - 1]);
#endif
}

// the codes of column c of a block, of all rows, times the four activations of each vector
void add_column(const uint y_idx, const uint c) {
    [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
#if defined(TRIT_Q8_1)
        const uint iy = j*p.batch_stride_b + y_idx;
        const int  b  = data_b[iy/128].qs[iy%128/4 + c];
#else
        const vec4 b = vec4(data_b_v4[(j*p.batch_stride_b + y_idx)/4 + c]);
#endif
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            sums[j][n][c/4] = TRIT_DOT(codes[n], b, sums[j][n][c/4]);
        }
    }
}

// what the quads and the last words hold besides whole codes: the scale indexes, and the last columns
void take_rest(const uint y_idx) {
#if TRIT_DEPTH == 2
    [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
        TRIT_T2 x = TRIT_FRACTIONS(pairs[n][6]);
        const TRIT_T2 c0 = TRIT_TAKE_CODE(x, 9);
        const TRIT_T2 c1 = TRIT_TAKE_CODE(x, 9);
        const TRIT_T2 k0 = TRIT_TAKE_INDEX(x, 27);
        const TRIT_T2 k1 = TRIT_TAKE_INDEX(x, 27);
        codes[n] = TRIT_FINISH(TRIT_T4(c0.x, c1.x, c0.y, c1.y));
        indexes[n] = TRIT_T4(k0.x, k1.x, k0.y, k1.y);
    }
    add_column(y_idx, 15);
#elif TRIT_DEPTH == 3
    [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
        TRIT_T x = TRIT_FRACTIONS(pairs[n][TRIT_N_PAIRS]).x;
        const TRIT_T c0 = TRIT_TAKE_CODE(x, 9);
        const TRIT_T c1 = TRIT_TAKE_CODE(x, 9);
        const TRIT_T c2 = TRIT_TAKE_CODE(x, 9);
        const TRIT_T c3 = TRIT_TAKE_CODE(x, 9);
        codes[n] = TRIT_FINISH(TRIT_T(3)*TRIT_T4(c0, c1, c2, c3) + rest[n]);
    }
    add_column(y_idx, 15);
#elif TRIT_DEPTH == 4
    [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
        TRIT_T2 x = TRIT_FRACTIONS(pairs[n][12]);
        TRIT_T  z = TRIT_FRACTIONS(pairs[n][TRIT_N_PAIRS]).x;
        const TRIT_T2 c0 = TRIT_TAKE_CODE(x, 81);
        const TRIT_T2 k0 = TRIT_TAKE_INDEX(x, 27);
        const TRIT_T2 k1 = TRIT_TAKE_INDEX(x, 27);
        const TRIT_T  c1 = TRIT_TAKE_CODE(z, 81);
        const TRIT_T  c3 = TRIT_TAKE_CODE(z, 81);
        codes[n] = TRIT_FINISH(TRIT_T4(c0.x, c1, c0.y, c3));
        indexes[n] = TRIT_T4(k0.x, k1.x, k0.y, k1.y);
    }
    add_column(y_idx, 15);
#endif
}

// Adds block i of each row, times its activations, to temp. Rows behind the last one are that one again: with a number of rows
// that is no constant, arrays would have no registers. Sums of integers are below 2 * 16 * 40 * 128 * 4598 < 2^30.
void calc_block(const uint a_offset, const uint b_offset, const uint i, const uint num_blocks_per_row, const uint first_row, const uint last_row) {
    const uint y_idx = b_offset + i*QUANT_K;

    [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
        load_pairs(n, a_offset + min(first_row + n, last_row)*num_blocks_per_row + i);
        indexes[n] = TRIT_T4(0);

        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            sums[j][n] = TRIT_SUM(0);
        }
    }

    [[unroll]] for (uint q = 0; q < TRIT_QUADS(TRIT_DEPTH); ++q) {
        TRIT_T4 x[NUM_ROWS];
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            x[n] = TRIT_T4(TRIT_FRACTIONS(pairs[n][2*q]), TRIT_FRACTIONS(pairs[n][2*q + 1]));
        }

        [[unroll]] for (uint f = 0; f < TRIT_CODES_PER_WORD(TRIT_DEPTH); ++f) {
            [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
                codes[n] = TRIT_FINISH(TRIT_TAKE_CODE(x[n], TRIT_LEVELS(TRIT_DEPTH)));
            }
            add_column(y_idx, TRIT_CODES_PER_WORD(TRIT_DEPTH)*q + f);
        }

        // the trits that are left
#if TRIT_DEPTH == 1
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            if (q == 0) {
                indexes[n] = TRIT_T(3)*TRIT_TAKE_INDEX(x[n], 9);
            } else {
                indexes[n] += TRIT_TAKE_INDEX(x[n], 3);
            }
        }
#elif TRIT_DEPTH == 3
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            if (q < 3) {
                indexes[n] = TRIT_T(3)*indexes[n] + TRIT_TAKE_INDEX(x[n], 3);
            } else if (q == 3) {
                rest[n] = TRIT_TAKE_CODE(x[n], 3);
            }
        }
#elif TRIT_DEPTH == 4
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            if (q%2 == 0) {
                rest[n] = TRIT_T(9)*TRIT_TAKE_CODE(x[n], 9);
            } else {
                codes[n] = TRIT_FINISH(rest[n] + TRIT_TAKE_CODE(x[n], 9));
            }
        }
        if (q%2 == 1) {
            add_column(y_idx, 12 + q/2);
        }
#endif
    }

    take_rest(y_idx);

    [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
        const uvec4 k      = uvec4(indexes[n]);
        const float anchor = trit_anchor(uint(TRIT_DEPTH), k);
        const TRIT_SUM ratios = TRIT_SUM(trit_ratios_of(k));

        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
#if defined(TRIT_Q8_1)
            const uint  iy = (j*p.batch_stride_b + y_idx)/32;
            const ivec4 s  = ratios*sums[j][n];
            temp[j][n] += anchor*(float(data_b[iy/4].ds[iy%4].x)*float(s.x + s.y) + float(data_b[iy/4].ds[iy%4 + 1].x)*float(s.z + s.w));
#else
            temp[j][n] += anchor*dot(ratios, sums[j][n]);
#endif
        }
    }
}
