// Runs ggml's operations on TRIT types through upstream's Metal backend, on the emulated GPU, and compares the results to
// arithmetic that anyone can read. The weights that this starts from are those of the CPU reference, ggml-trit.c.
//
// Built by `metal_host.py`. All memory ends where nothing can be read, so that an access behind it ends the program. Nothing is
// printed but what is wrong.

#include "device.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"
#include "ggml-trit.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

static constexpr int    N_WORDS     = 65536; // valid ones, 3^10, and all others
static constexpr double TOLERANCE   = 1e-5;  // of a sum, in parts of the sum of absolute terms
static constexpr int    MAX_PRINTED = 3;     // failures of a kernel

static std::map<std::string, int> n_failures;

__attribute__((format(printf, 2, 3))) static void fail(const std::string & name, const char * format, ...) {
    if (++n_failures[name] > MAX_PRINTED) {
        return;
    }
    printf("%s: ", name.c_str());
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
}

static std::set<std::string> kernels_run;

static std::mt19937 random_bits;

static int random_below(int n) {
    return (int) (random_bits()%(uint32_t) n);
}

//
// tensors and the backend
//

struct context {
    ggml_context * ggml = ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*.no_alloc =*/ true });

    std::vector<std::unique_ptr<emulator::guarded_memory>> memory;
    ggml_backend_buffer_type buffer_type = {};
    ggml_backend_buffer      buffer      = {};

    context() {
        buffer.buft = &buffer_type;
    }

    ~context() {
        ggml_free(ggml);
    }

    void alloc(ggml_tensor * t, size_t size) {
        memory.emplace_back(new emulator::guarded_memory(size));
        t->data   = memory.back()->data;
        t->buffer = &buffer;
        memset(t->data, 0xa5, size); // negative numbers, near zero in F32
    }

    ggml_tensor * tensor(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2 = 1, int64_t ne3 = 1) {
        ggml_tensor * t = ggml_new_tensor_4d(ggml, type, ne0, ne1, ne2, ne3);
        alloc(t, ggml_nbytes(t));
        return t;
    }

    // returns the kernels that were run
    std::vector<std::string> compute(ggml_tensor * op) {
        size_t size = ggml_nbytes(op);
        if (op->op == GGML_OP_MUL_MAT_ID) { // see get_alloc_size in ggml-metal.cpp
            size += ggml_metal_op_mul_mat_id_extra_tpe(op) + ggml_metal_op_mul_mat_id_extra_ids(op) + ggml_metal_op_mul_mat_id_extra_amax(op);
        }
        alloc(op, size);

        // results must not depend on the order of the threads
        emulator::reverse_order = !emulator::reverse_order;
        emulator::dispatched.clear();

        static ggml_metal_fusion_info * fusion = ggml_metal_fusion_info_init(true, 0);
        ggml_cgraph * graph = ggml_new_graph_custom(ggml, 8, false);
        ggml_build_forward_expand(graph, op);
        ggml_metal_op_t ops = ggml_metal_op_init(emulator::device(), nullptr, graph, fusion, 0, ggml_graph_n_nodes(graph), false, false, 0);
        for (int i = 0; i < ggml_metal_op_n_nodes(ops);) {
            i += ggml_metal_op_encode(ops, i);
        }
        ggml_metal_op_free(ops);
        kernels_run.insert(emulator::dispatched.begin(), emulator::dispatched.end());
        return emulator::dispatched;
    }
};

static ggml_type trit_type(int depth) {
    return (ggml_type) (GGML_TYPE_TRIT1 + depth - 1);
}

// the CPU reference
static std::vector<float> dequantize(const ggml_tensor * t) {
    std::vector<float> weights(ggml_nelements(t));
    ggml_get_type_traits(t->type)->to_float(t->data, weights.data(), (int64_t) weights.size());
    return weights;
}

static float rounded_to_half(float x) {
    return ggml_fp16_to_fp32(ggml_fp32_to_fp16(x));
}

static void set_word(const ggml_tensor * t, size_t i, int word) {
    ((uint16_t *) t->data)[i] = (uint16_t) word;
}

static void set_random_words(const ggml_tensor * t) {
    for (size_t i = 0; i < ggml_nbytes(t)/sizeof(uint16_t); ++i) {
        set_word(t, i, random_below(N_WORDS));
    }
}

//
// activations
//

enum kind {
    RANDOM,
    UNIT, // a single one in each row: the result is a weight
    N_KINDS,
};

static void set_activations(const ggml_tensor * t, enum kind kind, float scale) {
    const int64_t k = t->ne[0];
    for (int64_t i = 0; i < ggml_nelements(t); ++i) {
        const int64_t row = i/k;
        const float value = kind == UNIT ? (float) (i%k == 37*row%k) : scale*((float) random_bits()/4294967296.0f - 0.5f);
        if (t->type == GGML_TYPE_F16) {
            ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16(value);
        } else {
            ((float *) t->data)[i] = value;
        }
    }
}

static float activation(const ggml_tensor * t, int64_t i) {
    return t->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(((const ggml_fp16_t *) t->data)[i]) : ((const float *) t->data)[i];
}

// what a kernel rounds to F16 before it multiplies
enum rounded {
    NOTHING,
    WEIGHTS,
    BOTH,
};

// a row of weights times a row of activations
static void check_sum(const std::string & name, const float * w, const ggml_tensor * y, int64_t y0, float got, enum rounded rounded) {
    double exact     = 0.0;
    double magnitude = 0.0; // of the sum, were nothing to cancel out
    for (int64_t i = 0; i < y->ne[0]; ++i) {
        const float a = activation(y, y0 + i);
        const double term = (double) (rounded == NOTHING ? w[i] : rounded_to_half(w[i]))*(rounded == BOTH ? rounded_to_half(a) : a);
        exact     += term;
        magnitude += fabs(term);
    }
    if (!(fabs(got - exact) <= TOLERANCE*magnitude)) {
        fail(name, "%d weights, row of activations at %d: %a, not %a", (int) y->ne[0], (int) y0, got, exact);
    }
}

static void check_kernels(const std::vector<std::string> & got, const std::vector<std::string> & expected) {
    if (got != expected) {
        fail(expected.back(), "not run, but %s", got.empty() ? "nothing" : got.back().c_str());
    }
}

//
// operations
//

// bit for bit
static void check_rows(context & c, ggml_tensor * matrices, const ggml_tensor * ids) {
    ggml_tensor * op = ggml_get_rows(c.ggml, matrices, const_cast<ggml_tensor *>(ids));
    const std::string name = std::string("kernel_get_rows_") + ggml_type_name(matrices->type);
    check_kernels(c.compute(op), { name });

    const std::vector<float> weights = dequantize(matrices);
    const int64_t k = matrices->ne[0];
    for (int64_t i = 0; i < ggml_nelements(ids); ++i) {
        const int64_t row = i/ids->ne[0]*matrices->ne[1] + ((const int32_t *) ids->data)[i];
        for (int64_t j = 0; j < k; ++j) {
            const float expected = weights[row*k + j];
            const float got      = ((const float *) op->data)[i*k + j];
            if (memcmp(&expected, &got, sizeof(float)) != 0) {
                fail(name, "%d weights, weight %d of row %d: %a, not %a", (int) k, (int) j, (int) row, got, expected);
            }
        }
    }
}

static void check_get_rows(int depth) {
    for (int k : { 64, 128, 192, 576, 64*257 }) { // the last one takes more threads than a threadgroup has
        context c;
        ggml_tensor * matrices = c.tensor(trit_type(depth), k, 7, 3);
        set_random_words(matrices);
        ggml_tensor * ids = c.tensor(GGML_TYPE_I32, 5, 3);
        for (int i = 0; i < 15; ++i) {
            ((int32_t *) ids->data)[i] = random_below(7);
        }
        check_rows(c, matrices, ids);
    }
}

// Every word in each place of a block: the kernels that take a group at a time, and those that take a lane.
static void check_every_word(int depth) {
    const int n_words = ggml_trit_n_words(depth);
    context c;
    ggml_tensor * matrix = c.tensor(trit_type(depth), QK_TRIT, N_WORDS);
    ggml_tensor * ids    = c.tensor(GGML_TYPE_I32, N_WORDS, 1);
    for (int i = 0; i < N_WORDS; ++i) {
        ((int32_t *) ids->data)[i] = i;
        for (int l = 0; l < n_words; ++l) {
            set_word(matrix, (size_t) i*n_words + l, i + 1009*l);
        }
    }
    check_rows(c, matrix, ids);

    ggml_tensor * y = c.tensor(GGML_TYPE_F32, QK_TRIT, 1);
    set_activations(y, RANDOM, 1.0f);
    ggml_tensor * op = ggml_mul_mat(c.ggml, matrix, y);
    const std::string name = std::string("kernel_mul_mv_") + ggml_type_name(matrix->type) + "_f32";
    check_kernels(c.compute(op), { name });

    const std::vector<float> weights = dequantize(matrix);
    for (int i = 0; i < N_WORDS; ++i) {
        check_sum(name, &weights[(size_t) QK_TRIT*i], y, 0, ((const float *) op->data)[i], NOTHING);
    }
}

// `kernel` stands for the name: mul_mv, mul_mv_ext or mul_mm.
static void check_product(enum kind kind, int depth, ggml_type y_type, int k, int m, int n, bool batch, const std::string & kernel) {
    const bool has_tensor = emulator::device()->props.has_tensor;
    if (has_tensor && kernel != "mul_mm") {
        return;
    }

    context c;
    // a matrix of weights serves two of activations, in either dimension
    ggml_tensor * w = batch ? c.tensor(trit_type(depth), k, m, 2, 1) : c.tensor(trit_type(depth), k, m);
    ggml_tensor * y = batch ? c.tensor(y_type, k, n, 4, 2)           : c.tensor(y_type, k, n);
    set_random_words(w);
    set_activations(y, kind, 1.0f);

    ggml_tensor * op = ggml_mul_mat(c.ggml, w, y);
    std::string name = "kernel_" + kernel + "_" + ggml_type_name(w->type) + "_" + ggml_type_name(y_type);
    if (kernel == "mul_mv_ext") {
        const int columns[] = { 2, 3, 4, 5, 3, 4, 4 };
        name += "_r1_" + std::to_string(columns[n - 2]);
    }
    check_kernels(c.compute(op), { name });

    const std::vector<float> weights = dequantize(w);
    for (int64_t i = 0; i < ggml_nelements(op); ++i) {
        const int64_t row    = i%m;
        const int64_t column = i/m;
        const int64_t matrix = column/n%y->ne[2]/(y->ne[2]/w->ne[2]);
        check_sum(name, &weights[(matrix*m + row)*k], y, column*k, ((const float *) op->data)[i], kernel != "mul_mm" ? NOTHING : has_tensor ? WEIGHTS : BOTH);
    }
}

static void check_products(int depth) {
    for (int k : { 64, 128, 192, 256, 576 }) {
        for (int m : { 1, 7, 64, 67 }) {
            for (int n : { 1, 2, 3, 4, 5, 6, 7, 8, 9, 32, 33 }) {
                const enum kind kind = (enum kind) random_below(N_KINDS);
                check_product(kind, depth, GGML_TYPE_F32, k, m, n, false, n == 1 ? "mul_mv" : n <= 8 ? "mul_mv_ext" : "mul_mm");
            }
        }
        check_product(RANDOM, depth, GGML_TYPE_F32, k, 9, 1, true, "mul_mv");
        check_product(RANDOM, depth, GGML_TYPE_F32, k, 9, 5, true, "mul_mv_ext");
        check_product(RANDOM, depth, GGML_TYPE_F32, k, 9, 9, true, "mul_mm");
        for (enum kind kind : { RANDOM, UNIT }) {
            check_product(kind, depth, GGML_TYPE_F16, k, 67, 33, false, "mul_mm");
        }

        // every weight alone, and a GPU without operations on matrices
        bool & has_simdgroup_mm = emulator::device()->props.has_simdgroup_mm;
        has_simdgroup_mm = false;
        check_product(UNIT, depth, GGML_TYPE_F32, k, 9, k, false, "mul_mv");
        has_simdgroup_mm = true;
    }
}

static void check_experts(int depth, enum kind kind, ggml_type y_type, int k, int m, int n_tokens, int n_used, bool broadcast, float scale, bool prec_f32) {
    const int  n_experts = 5;
    const bool mm        = n_tokens >= 32;
    if (emulator::device()->props.has_tensor && !mm) {
        return;
    }

    context c;
    ggml_tensor * w   = c.tensor(trit_type(depth), k, m, n_experts);
    ggml_tensor * y   = c.tensor(y_type, k, broadcast ? 1 : n_used, n_tokens);
    ggml_tensor * ids = c.tensor(GGML_TYPE_I32, n_used, n_tokens);
    set_random_words(w);
    set_activations(y, kind, scale);
    for (int t = 0; t < n_tokens; ++t) { // different ones for a token
        std::vector<int32_t> experts = { 0, 1, 2, 3, 4 };
        std::shuffle(experts.begin(), experts.end(), random_bits);
        std::copy(experts.begin(), experts.begin() + n_used, (int32_t *) ids->data + (size_t) t*n_used);
    }

    ggml_tensor * op = ggml_mul_mat_id(c.ggml, w, y, ids);
    if (prec_f32) {
        ggml_prec_set_src(op, GGML_PREC_F32, 1);
    }
    const std::string name = std::string(mm ? "kernel_mul_mm_id_" : "kernel_mul_mv_id_") + ggml_type_name(w->type) + "_" + ggml_type_name(y_type);
    std::vector<std::string> kernels = { name };
    if (mm) {
        kernels = { "kernel_mul_mm_id_map0_ne20_" + std::to_string(n_used), name };
        if (prec_f32) {
            kernels = { "kernel_mul_mm_id_amax_part_f32", kernels[0], "kernel_mul_mm_id_amax_f32", name };
        }
    }
    check_kernels(c.compute(op), kernels);

    const std::vector<float> weights = dequantize(w);
    for (int64_t i = 0; i < ggml_nelements(op); ++i) {
        const int64_t row    = i%m;
        const int64_t slot   = i/m; // of all tokens
        const int64_t expert = ((const int32_t *) ids->data)[slot];
        const int64_t column = broadcast ? slot/n_used : slot;
        check_sum(name, &weights[(expert*m + row)*k], y, column*k, ((const float *) op->data)[i], mm ? BOTH : NOTHING);
    }
}

static void check_all_experts(int depth) {
    for (int k : { 64, 128, 192, 576 }) {
        for (bool broadcast : { false, true }) {
            for (int n_used : { 1, 2, 4 }) {
                for (int n_tokens : { 1, 3, 9, 32, 70 }) {
                    check_experts(depth, (enum kind) random_below(N_KINDS), GGML_TYPE_F32, k, 7 + 60*(n_used == 2), n_tokens, n_used, broadcast, 1.0f, false);
                }
            }
        }
        check_experts(depth, RANDOM, GGML_TYPE_F16, k, 67, 40, 2, false, 1.0f, false);
        // rescaled on the way, by a power of two
        check_experts(depth, RANDOM, GGML_TYPE_F32, k, 67, 40, 2, false, 1000.0f, true);
    }
}

// what the backend takes, and what it must leave to the CPU
static void check_support(int depth) {
    context c;
    ggml_tensor * w   = c.tensor(trit_type(depth), 192, 8);
    ggml_tensor * y   = c.tensor(GGML_TYPE_F32, 192, 8);
    ggml_tensor * y16 = c.tensor(GGML_TYPE_F16, 192, 8);
    ggml_tensor * y2  = c.tensor(GGML_TYPE_F16, 192, 9);
    ggml_tensor * ids = c.tensor(GGML_TYPE_I32, 8, 1);
    ggml_tensor * i64 = c.tensor(GGML_TYPE_I64, 8, 1);

    const struct { const char * name; ggml_tensor * op; bool supported; } cases[] = {
        { "MUL_MAT",               ggml_mul_mat (c.ggml, w, y),         true },
        { "MUL_MAT of F16",        ggml_mul_mat (c.ggml, w, y2),        true },
        { "MUL_MAT of little F16", ggml_mul_mat (c.ggml, w, y16),       false },
        { "GET_ROWS",              ggml_get_rows(c.ggml, w, ids),       true },
        { "SET_ROWS",              ggml_set_rows(c.ggml, w, y, i64),    false },
        { "CPY from TRIT",         ggml_cpy     (c.ggml, w, y),         false },
        { "CPY to TRIT",           ggml_cpy     (c.ggml, y, w),         false },
    };
    for (const auto & it : cases) {
        if (ggml_metal_device_supports_op(emulator::device(), it.op) != it.supported) {
            fail(it.name, "%s", it.supported ? "not supported" : "supported, without a kernel");
        }
    }
}

// `tensor` is for a program with the kernels for GPUs with tensor units, of which there are only those of matrix tiles.
int main(int argc, char ** argv) {
    const int  depth      = argc >= 2 ? atoi(argv[1]) : 0;
    const bool has_tensor = argc == 3 && strcmp(argv[2], "tensor") == 0;
    if (depth < 1 || depth > 4 || argc > 2 + has_tensor) {
        fprintf(stderr, "usage: check DEPTH [tensor]\n");
        return 2;
    }
    emulator::device()->props.has_tensor = has_tensor;
    if (!has_tensor) {
        check_support(depth);
        check_get_rows(depth);
        check_every_word(depth);
    }
    check_products(depth);
    check_all_experts(depth);
    for (const std::string & name : emulator::kernel_names()) {
        if (name.find(ggml_type_name(trit_type(depth))) != std::string::npos && kernels_run.count(name) == 0) {
            fail(name, "never run");
        }
    }
    for (const auto & it : n_failures) {
        printf("%s: %d failures\n", it.first.c_str(), it.second);
    }
    return !n_failures.empty();
}
