// The kernels of ggml-trit-tile.h, for one instruction set. ggml-trit-tile.c includes this file once for each, with
// V (a float for each row of the tile), M (a truth value for each), the operations v_* and
//   TRIT_FN(name)  the name of a function of this variant
//   TRIT_TARGET    the attributes of its functions
//   TRIT_INLINE    those of functions that are inlined
// It is written as if V were a float. Sums run in a fixed order, without fused multiply-add.

TRIT_INLINE V TRIT_FN(round_to_code)(V x, V code_max) {
    const V magic = v_set1(0x1.8p23f);
    x = v_max(v_sub(v_set1(0.0f), code_max), x);
    x = v_min(code_max, x);
    return v_sub(v_add(x, magic), magic); // to the nearest integer, ties to even
}

TRIT_INLINE V TRIT_FN(squared_error)(const float * x, const float * weight, int i, V scale, V inv, V code_max) {
    const V xi   = v_load(x + i*TRIT_TILE);
    const V diff = v_sub(xi, v_mul(TRIT_FN(round_to_code)(v_mul(xi, inv), code_max), scale));
    return v_mul(v_mul(diff, diff), v_load(weight + i*TRIT_TILE));
}

// The sum of the squared errors of a group, as a tree: the order of group_error in ggml-trit.c.
TRIT_INLINE V TRIT_FN(group_error)(const float * x, const float * weight, V scale, V inv, V code_max) {
#define E16(i) TRIT_FN(squared_error)(x, weight, i, scale, inv, code_max)
#define E8(i)  v_add(E16(i), E16((i) + 8))
#define E4(i)  v_add(E8(i), E8((i) + 4))
#define E2(i)  v_add(E4(i), E4((i) + 2))
    return v_add(E2(0), E2(1));
#undef E16
#undef E8
#undef E4
#undef E2
}

// The best candidates of the groups 1..3 in each class: candidate t is in class t modulo 3. Of equal ones it is the first.
struct TRIT_FN(classes) {
    V error[NG_TRIT][3];
    V step [NG_TRIT][3];
};

TRIT_INLINE void TRIT_FN(clear_class)(struct TRIT_FN(classes) * classes, int c) {
    for (int g = 1; g < NG_TRIT; ++g) {
        classes->error[g][c] = v_set1(INFINITY);
        classes->step [g][c] = v_set1(0.0f);
    }
}

TRIT_INLINE void TRIT_FN(add_to_class)(struct TRIT_FN(classes) * classes, const float * error, int t) {
    const int c = t % 3;
    for (int g = 1; g < NG_TRIT; ++g) {
        const V e = v_load(error + (t*NG_TRIT + g)*TRIT_TILE);
        const M less = v_lt(e, classes->error[g][c]);
        classes->error[g][c] = v_select(less, e, classes->error[g][c]);
        classes->step [g][c] = v_select(less, v_set1((float) t), classes->step[g][c]);
    }
}

// y[i] = x[(i + by) % 3], by = 0, 1 or 2 in each lane
TRIT_INLINE void TRIT_FN(rotate)(V y[3], const V x[3], V by) {
    const M none = v_lt(by, v_set1(0.5f));
    const M one  = v_lt(by, v_set1(1.5f));
    y[0] = v_select(none, x[0], v_select(one, x[1], x[2]));
    y[1] = v_select(none, x[1], v_select(one, x[2], x[0]));
    y[2] = v_select(none, x[2], v_select(one, x[0], x[1]));
}

// As search_scales of ggml-trit.c, which says more: this does the same with 16 blocks. Candidates are numbered from the first of
// each block on: candidate t is at position first + t.
TRIT_TARGET void TRIT_FN(search_pass)(const struct trit_lattice * lat, const float * x, const float * weight, uint8_t k[TRIT_TILE][NG_TRIT], bool found[TRIT_TILE]) {
    const V zero      = v_set1(0.0f);
    const V one       = v_set1(1.0f);
    const V positions = v_set1((float) TRIT_N_POS);
    const V code_max  = v_set1(lat->code_max);

    V top_min = positions;
    V top_max = v_set1(-1.0f);
    V refused = zero;
    V finite  = zero; // or NaN
    for (int g = 0; g < NG_TRIT; ++g) {
        V x_max = zero;
        for (int i = 0; i < QG_TRIT; ++i) {
            const V xi = v_load(x + (g*QG_TRIT + i)*TRIT_TILE);
            x_max  = v_max(x_max, v_max(xi, v_sub(zero, xi)));
            finite = v_add(finite, v_mul(xi, zero));
        }
        V count = zero; // of positions that do not clip, by bisection
        for (int step = 64; step > 0; step /= 2) {
            const V more = v_add(count, v_set1((float) step));
            count = v_select(v_lt(v_lookup(lat->reach, v_sub(more, one)), x_max), count, more);
        }
        const M zeros = v_lt(x_max, v_set1(TRIT_ZERO));
        const V top   = v_select(zeros, positions, v_sub(count, one));
        refused = v_select(v_lt(top, v_set1(g == 0 ? (float) TRIT_POS_ANCHOR : 0.0f)), one, refused);
        top_min = v_min(top_min, top);
        top_max = v_select(zeros, top_max, v_max(top_max, top));
    }
    refused = v_select(v_lt(finite, one), refused, one);

    const V first = v_min(v_max(v_sub(top_min, one), zero), v_set1((float) (TRIT_POS_LAST - 5)));
    const V last  = v_max(v_min(v_add(top_max, v_set1((float) lat->search_depth)), v_set1((float) (TRIT_N_POS - 1))), v_set1((float) TRIT_POS_ANCHOR));
    const M plain = v_lt(refused, v_min(one, v_sub(positions, top_min))); // neither refused nor zeros
    const V steps = v_select(plain, v_add(v_sub(last, first), one), zero);

    TRIT_ALIGNED float first_of  [TRIT_TILE];
    TRIT_ALIGNED float steps_of  [TRIT_TILE];
    TRIT_ALIGNED float refused_of[TRIT_TILE];
    v_store(first_of, first);
    v_store(steps_of, steps);
    v_store(refused_of, refused);
    int n_steps = 0;
    for (int r = 0; r < TRIT_TILE; ++r) {
        n_steps = MAX(n_steps, (int) steps_of[r]);
    }

    TRIT_ALIGNED float error[TRIT_N_POS*NG_TRIT*TRIT_TILE];
    for (int t = 0; t < n_steps; ++t) {
        const V at    = v_set1((float) t);
        const V p     = v_min(v_add(first, at), v_set1((float) (TRIT_N_POS - 1)));
        const V scale = v_lookup(lat->scale, p);
        const V inv   = v_lookup(lat->inv, p);
        const M inside = v_lt(at, steps);
        const M anchor = v_lt(v_set1(TRIT_POS_ANCHOR - 0.5f), v_select(v_lt(p, v_set1(TRIT_POS_LAST + 0.5f)), p, zero));
        for (int g = 0; g < NG_TRIT; ++g) {
            V e = TRIT_FN(group_error)(x + g*QG_TRIT*TRIT_TILE, weight + g*QG_TRIT*TRIT_TILE, scale, inv, code_max);
            e = v_select(inside, e, v_set1(INFINITY));
            if (g == 0) {
                e = v_select(anchor, e, v_set1(INFINITY));
            }
            v_store(error + (t*NG_TRIT + g)*TRIT_TILE, e);
        }
    }

    TRIT_ALIGNED float rotation_of[TRIT_TILE];
    for (int r = 0; r < TRIT_TILE; ++r) {
        rotation_of[r] = (float) ((int) first_of[r] % 3);
    }
    const V rotation = v_load(rotation_of);

    // an anchor at candidate t0 leaves the other groups the candidates t0 - 13 .. t0 + 13
    struct TRIT_FN(classes) classes;
    for (int c = 0; c < 3; ++c) {
        TRIT_FN(clear_class)(&classes, c);
    }
    for (int t = 0; t < MIN(TRIT_POS_ANCHOR, n_steps); ++t) {
        TRIT_FN(add_to_class)(&classes, error, t);
    }
    V best       = v_set1(INFINITY);
    V best_first = zero;
    V best_steps = zero; // of the other groups: t1 + 128*t2 + 128*128*t3
    for (int t0 = 0; t0 < n_steps; ++t0) {
        if (t0 > TRIT_POS_ANCHOR) {
            const int lost = t0 - TRIT_POS_ANCHOR - 1;
            TRIT_FN(clear_class)(&classes, lost % 3);
            for (int t = lost + 3; t < MIN(t0 + TRIT_POS_ANCHOR, n_steps); t += 3) {
                TRIT_FN(add_to_class)(&classes, error, t);
            }
        }
        if (t0 + TRIT_POS_ANCHOR < n_steps) {
            TRIT_FN(add_to_class)(&classes, error, t0 + TRIT_POS_ANCHOR);
        }
        V error3[3]; // so that the class of group 3 is the same in all lanes, too
        V step3 [3];
        TRIT_FN(rotate)(error3, classes.error[3], rotation);
        TRIT_FN(rotate)(step3,  classes.step [3], rotation);
        const V e0 = v_load(error + t0*NG_TRIT*TRIT_TILE);
        for (int r1 = 0; r1 < 3; ++r1) {
            const int c1 = (r1 + t0 + 2) % 3;
            const V   e1 = v_add(e0, classes.error[1][c1]);
            for (int r2 = 0; r2 < 3; ++r2) {
                const int c2 = (r2 + t0 + 2) % 3;
                const int c3 = (2*t0 + 7 - r1 - r2) % 3;
                const V e    = v_add(v_add(e1, classes.error[2][c2]), error3[c3]);
                const M less = v_lt(e, best);
                const V others = v_add(v_add(classes.step[1][c1], v_mul(classes.step[2][c2], v_set1(128.0f))), v_mul(step3[c3], v_set1(16384.0f)));
                best       = v_select(less, e, best);
                best_first = v_select(less, v_set1((float) t0), best_first);
                best_steps = v_select(less, others, best_steps);
            }
        }
    }

    TRIT_ALIGNED float best_of  [TRIT_TILE];
    TRIT_ALIGNED float choice_of[TRIT_TILE];
    TRIT_ALIGNED float others_of[TRIT_TILE];
    v_store(best_of, best);
    v_store(choice_of, best_first);
    v_store(others_of, best_steps);
    for (int r = 0; r < TRIT_TILE; ++r) {
        if (steps_of[r] == 0.0f) {
            found[r] = refused_of[r] == 0.0f;
            memset(k[r], TRIT_N_SCALES/2, NG_TRIT); // zeros
            continue;
        }
        const int t0     = (int) choice_of[r];
        const int others = (int) others_of[r];
        found[r] = best_of[r] < INFINITY;
        k[r][0] = (uint8_t) (((int) first_of[r] + t0 - TRIT_POS_ANCHOR)/3);
        k[r][1] = (uint8_t) (others % 128       - t0 + TRIT_POS_ANCHOR);
        k[r][2] = (uint8_t) (others / 128 % 128 - t0 + TRIT_POS_ANCHOR);
        k[r][3] = (uint8_t) (others / 16384     - t0 + TRIT_POS_ANCHOR);
    }
}

TRIT_TARGET void TRIT_FN(search)(const struct trit_lattice * lat, const float * x, const float * weight, uint8_t k[TRIT_TILE][NG_TRIT], bool found[TRIT_TILE]) {
    bool all = false;
    if (weight) {
        TRIT_FN(search_pass)(lat, x, weight, k, found);
        all = true;
        for (int r = 0; r < TRIT_TILE; ++r) {
            all &= found[r];
        }
    } else {
        memset(found, 0, TRIT_TILE*sizeof(found[0]));
    }
    if (all) {
        return;
    }
    // weights that are not finite, or so great that the sums are not, say nothing
    TRIT_ALIGNED float ones[QK_TRIT*TRIT_TILE];
    for (int i = 0; i < QK_TRIT*TRIT_TILE; i += TRIT_TILE) {
        v_store(ones + i, v_set1(1.0f));
    }
    uint8_t k_ones[TRIT_TILE][NG_TRIT];
    bool found_ones[TRIT_TILE];
    TRIT_FN(search_pass)(lat, x, ones, k_ones, found_ones);
    for (int r = 0; r < TRIT_TILE; ++r) {
        if (!found[r]) {
            found[r] = found_ones[r];
            memcpy(k[r], k_ones[r], NG_TRIT);
        }
    }
}

// sums[c] += matrix(i, column + c) * x[i], c < 4, for i from first to last - 1 in turn
TRIT_INLINE void TRIT_FN(add_products)(V sums[4], const float * matrix, int column, const float * x, int first, int last) {
    V a = sums[0];
    V b = sums[1];
    V c = sums[2];
    V d = sums[3];
    for (int i = first; i < last; ++i) {
        const float * m = matrix + i*QK_TRIT + column;
        const V xi = v_load(x + i*TRIT_TILE);
        a = v_add(a, v_mul(v_set1(m[0]), xi));
        b = v_add(b, v_mul(v_set1(m[1]), xi));
        c = v_add(c, v_mul(v_set1(m[2]), xi));
        d = v_add(d, v_mul(v_set1(m[3]), xi));
    }
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}

// y = matrix * x, for a symmetric matrix
TRIT_INLINE void TRIT_FN(multiply)(const float * matrix, const float * x, float * y) {
    for (int j = 0; j < QK_TRIT; j += 4) {
        V sums[4] = { v_set1(0.0f), v_set1(0.0f), v_set1(0.0f), v_set1(0.0f) };
        TRIT_FN(add_products)(sums, matrix, j, x, 0, QK_TRIT);
        for (int c = 0; c < 4; ++c) {
            v_store(y + (j + c)*TRIT_TILE, sums[c]);
        }
    }
}

TRIT_TARGET void TRIT_FN(feed_back)(const struct trit_lattice * lat, const float * feedback, const float * aim, const float * scale, float * value) {
    TRIT_ALIGNED float error[QK_TRIT*TRIT_TILE];
    const V code_max = v_set1(lat->code_max);
    for (int j = 0; j < QK_TRIT; j += 4) {
        const V s   = v_load(scale + j/QG_TRIT*TRIT_TILE);
        const V inv = v_div(v_set1(1.0f), s);
        V now[4];
        for (int c = 0; c < 4; ++c) {
            now[c] = v_load(aim + (j + c)*TRIT_TILE);
        }
        TRIT_FN(add_products)(now, feedback, j, error, 0, j);
        for (int c = 0; c < 4; ++c) {
            const V rounded = v_mul(TRIT_FN(round_to_code)(v_mul(now[c], inv), code_max), s);
            const V e       = v_sub(v_load(aim + (j + c)*TRIT_TILE), rounded);
            v_store(value + (j + c)*TRIT_TILE, rounded);
            v_store(error + (j + c)*TRIT_TILE, e);
            for (int later = c + 1; later < 4; ++later) {
                now[later] = v_add(now[later], v_mul(v_set1(feedback[(j + c)*QK_TRIT + j + later]), e));
            }
        }
    }
}

// one descent over the columns
TRIT_INLINE void TRIT_FN(descend_once)(const struct trit_lattice * lat, const float * hessian, float * value, float * gradient, const float * scale) {
    TRIT_ALIGNED float change[QK_TRIT*TRIT_TILE];
    const V code_max = v_set1(lat->code_max);
    for (int j = 0; j < QK_TRIT; j += 4) {
        const V s   = v_load(scale + j/QG_TRIT*TRIT_TILE);
        const V inv = v_div(v_set1(1.0f), s);
        V slope[4];
        for (int c = 0; c < 4; ++c) {
            slope[c] = v_load(gradient + (j + c)*TRIT_TILE);
        }
        TRIT_FN(add_products)(slope, hessian, j, change, 0, j);
        for (int c = 0; c < 4; ++c) {
            const float * h = hessian + (j + c)*QK_TRIT + j;
            const V old     = v_load(value + (j + c)*TRIT_TILE);
            const V ideal   = v_sub(old, v_mul(slope[c], v_set1(1.0f/h[c])));
            const V rounded = v_mul(TRIT_FN(round_to_code)(v_mul(ideal, inv), code_max), s);
            const V moved   = v_sub(rounded, old);
            v_store(value  + (j + c)*TRIT_TILE, rounded);
            v_store(change + (j + c)*TRIT_TILE, moved);
            for (int other = 0; other < 4; ++other) {
                slope[other] = v_add(slope[other], v_mul(v_set1(h[other]), moved));
            }
        }
        for (int c = 0; c < 4; ++c) {
            v_store(gradient + (j + c)*TRIT_TILE, slope[c]);
        }
    }
    for (int j = 0; j < QK_TRIT; j += 4) {
        V slope[4];
        for (int c = 0; c < 4; ++c) {
            slope[c] = v_load(gradient + (j + c)*TRIT_TILE);
        }
        TRIT_FN(add_products)(slope, hessian, j, change, j + 4, QK_TRIT);
        for (int c = 0; c < 4; ++c) {
            v_store(gradient + (j + c)*TRIT_TILE, slope[c]);
        }
    }
}

// the sum of (value - best)*gradient: the squared error of the products, up to what values cannot change
TRIT_INLINE V TRIT_FN(excess)(const float * value, const float * best, const float * gradient) {
    V sum = v_set1(0.0f);
    for (int j = 0; j < QK_TRIT; ++j) {
        const V off = v_sub(v_load(value + j*TRIT_TILE), v_load(best + j*TRIT_TILE));
        sum = v_add(sum, v_mul(off, v_load(gradient + j*TRIT_TILE)));
    }
    return sum;
}

TRIT_TARGET void TRIT_FN(descend)(const struct trit_lattice * lat, const struct ggml_trit_gptq_columns * columns, float * value, float * gradient, float * scale, uint8_t k[TRIT_TILE][NG_TRIT], bool search) {
    TRIT_FN(descend_once)(lat, columns->hessian, value, gradient, scale);
    if (!search) {
        return;
    }

    TRIT_ALIGNED float best  [QK_TRIT*TRIT_TILE]; // without rounding
    TRIT_ALIGNED float other [QK_TRIT*TRIT_TILE]; // values with other scales
    TRIT_ALIGNED float slope [QK_TRIT*TRIT_TILE]; // their gradient
    TRIT_ALIGNED float buffer[QK_TRIT*TRIT_TILE];
    TRIT_FN(multiply)(columns->inverse, gradient, buffer);
    for (int j = 0; j < QK_TRIT*TRIT_TILE; j += TRIT_TILE) {
        v_store(best + j, v_sub(v_load(value + j), v_load(buffer + j)));
    }

    for (int j = 0; j < QK_TRIT; ++j) {
        v_store(buffer + j*TRIT_TILE, v_set1(columns->importance[j]));
    }
    uint8_t other_k[TRIT_TILE][NG_TRIT];
    bool found[TRIT_TILE];
    TRIT_FN(search)(lat, best, buffer, other_k, found);
    for (int r = 0; r < TRIT_TILE; ++r) {
        if (!found[r]) {
            memcpy(other_k[r], k[r], NG_TRIT);
        }
    }
    TRIT_ALIGNED float other_scale[NG_TRIT*TRIT_TILE];
    trit_group_scales(lat, other_k, other_scale);

    TRIT_FN(feed_back)(lat, columns->feedback, best, other_scale, other);
    for (int j = 0; j < QK_TRIT*TRIT_TILE; j += TRIT_TILE) {
        v_store(buffer + j, v_sub(v_load(other + j), v_load(best + j)));
    }
    TRIT_FN(multiply)(columns->hessian, buffer, slope);
    TRIT_FN(descend_once)(lat, columns->hessian, other, slope, other_scale);

    const M better = v_lt(TRIT_FN(excess)(other, best, slope), TRIT_FN(excess)(value, best, gradient));
    TRIT_ALIGNED float better_of[TRIT_TILE];
    v_store(better_of, v_select(better, v_set1(1.0f), v_set1(0.0f)));
    for (int r = 0; r < TRIT_TILE; ++r) {
        if (better_of[r] != 0.0f) {
            memcpy(k[r], other_k[r], NG_TRIT);
        }
    }
    for (int j = 0; j < QK_TRIT*TRIT_TILE; j += TRIT_TILE) {
        v_store(value + j, v_select(better, v_load(other + j), v_load(value + j)));
    }
    for (int g = 0; g < NG_TRIT*TRIT_TILE; g += TRIT_TILE) {
        v_store(scale + g, v_select(better, v_load(other_scale + g), v_load(scale + g)));
    }
}

static const struct trit_kernels TRIT_FN(kernels) = {
    /* .name      = */ TRIT_NAME,
    /* .search    = */ TRIT_FN(search),
    /* .feed_back = */ TRIT_FN(feed_back),
    /* .descend   = */ TRIT_FN(descend),
};
