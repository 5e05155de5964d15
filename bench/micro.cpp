// Cycles per 32 weights of ggml's dot products and matrix products, on one thread. `micro.py` builds and runs it.
//
// usage: micro BACKENDS ROUNDS MILLISECONDS COLUMNS TYPE...
//
// Prints a line of JSON for each case and round. A case runs for that many milliseconds a round; a round has every
// case once, so that a change of the machine's speed meets all of them. The cases of a type:
//   vec_dot  a row by a column, as ggml_get_type_traits_cpu gives it; activations are quantized beforehand
//   mul_mat  a graph of matrix products with 1 and with 512 columns, activations quantized each time as in a model;
//            weights as they are in the file ("plain"), and in each buffer type that ggml-cpu rearranges them for
// each with a matrix that fits into L2, and with one that does not. Every result is compared with float arithmetic
// before anything is measured.

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <dlfcn.h>
#include <strings.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t SMALL_ROWS = 256;   // 2048 columns of Q8_0 take 544 KiB
constexpr int64_t LARGE_ROWS = 8192;  // 2048 columns of TRIT1 take 4 MiB
constexpr int64_t COLUMN_COUNTS[] = { 1, 512 };
constexpr double  TOLERANCE = 0.03;  // of the product of the norms: quantized activations err by about 0.01

struct deleter {
    void operator()(ggml_context * p) const { ggml_free(p); }
    void operator()(ggml_backend * p) const { ggml_backend_free(p); }
    void operator()(ggml_backend_buffer * p) const { ggml_backend_buffer_free(p); }
};
using context_ptr = std::unique_ptr<ggml_context, deleter>;
using backend_ptr = std::unique_ptr<ggml_backend, deleter>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, deleter>;

struct bench_case {
    std::string           type;
    const char *          kernel;
    std::string           buffer;
    int64_t               rows;
    int64_t               n;      // columns of activations
    double                units;  // 32 weights times a column, in one call of `run`
    std::function<void()> run;
};

// Seconds that this thread has run: what others take from it does not count.
double thread_time() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// The core's clock now, in Hz: additions that depend on one another take a cycle each.
double clock_rate() {
    constexpr int STEPS = 20000, ADDITIONS = 16;
    double best = 0;
    for (int trial = 0; trial < 5; trial++) {
        uint64_t sum = 0, one = 1;
        const double start = thread_time();
        for (int i = 0; i < STEPS; i++) {
#pragma GCC unroll 16
            for (int j = 0; j < ADDITIONS; j++) {
                sum += one;
                // A register that the compiler does not know: an immediate could be added while renaming.
                __asm__ volatile("" : "+r"(sum), "+r"(one));
            }
        }
        best = std::max(best, STEPS * ADDITIONS / (thread_time() - start));
    }
    return best;
}

std::vector<float> gaussian(int64_t count, float deviation, unsigned seed) {
    std::mt19937                    engine(seed);
    std::normal_distribution<float> distribution(0, deviation);
    std::vector<float>              values(count);
    std::generate(values.begin(), values.end(), [&] { return distribution(engine); });
    return values;
}

context_ptr new_context(size_t tensors) {
    return context_ptr(ggml_init({ ggml_tensor_overhead() * tensors + ggml_graph_overhead(), nullptr, true }));
}

// Quantized rows of one type, and the values they stand for.
struct weights {
    std::string          name;
    ggml_type            type;
    int64_t              columns;
    std::vector<uint8_t> data;    // SMALL_ROWS rows
    std::vector<float>   values;  // the same, dequantized

    weights(const std::string & name, ggml_type type, int64_t columns)
        : name(name), type(type), columns(columns), data(ggml_row_size(type, columns) * SMALL_ROWS),
          values(columns * SMALL_ROWS) {
        const std::vector<float> source = gaussian(columns * SMALL_ROWS, 1 / std::sqrt(float(columns)), 1);
        ggml_quantize_chunk(type, source.data(), data.data(), 0, SMALL_ROWS, columns, nullptr);
        ggml_get_type_traits(type)->to_float(data.data(), values.data(), columns * SMALL_ROWS);
    }

    // `rows` rows: these, again and again.
    std::vector<uint8_t> repeated(int64_t rows) const {
        std::vector<uint8_t> all;
        all.reserve(data.size() * (rows / SMALL_ROWS));
        for (int64_t row = 0; row < rows; row += SMALL_ROWS) {
            all.insert(all.end(), data.begin(), data.end());
        }
        return all;
    }

    // Throws where `result`, one figure for each of the first SMALL_ROWS rows, is not their product with x.
    void check(const float * result, const float * x, const std::string & what) const {
        for (int64_t row = 0; row < SMALL_ROWS; row++) {
            double sum = 0, w2 = 0, x2 = 0;
            for (int64_t i = 0; i < columns; i++) {
                const double w = values[row * columns + i];
                sum += w * x[i];
                w2 += w * w;
                x2 += double(x[i]) * x[i];
            }
            if (!(std::fabs(sum - result[row]) <= TOLERANCE * std::sqrt(w2 * x2))) {
                throw std::runtime_error(what + ": row " + std::to_string(row) + " is " + std::to_string(result[row]) +
                                         ", float arithmetic gives " + std::to_string(sum));
            }
        }
    }
};

// The CPU backend, whether it was linked or loaded.
struct cpu {
    ggml_backend_dev_t device;
    ggml_backend_reg_t registry;
    backend_ptr        backend;

    cpu() : device(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {
        if (device == nullptr) {
            throw std::runtime_error("no CPU backend that this machine can run");
        }
        registry = ggml_backend_dev_backend_reg(device);
        backend.reset(ggml_backend_dev_init(device, nullptr));
        function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend.get(), 1);
    }

    template <typename F> F function(const char * name) const {
        return reinterpret_cast<F>(ggml_backend_reg_get_proc_address(registry, name));
    }

    // ggml_get_type_traits_cpu of the variant in use. The registry does not hand it out, its library exports it.
    const ggml_type_traits_cpu * traits(ggml_type type) const {
        Dl_info info;
        void *  known   = ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads");
        void *  library = dladdr(known, &info) ? dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD) : nullptr;
        void *  symbol  = library ? dlsym(library, "ggml_get_type_traits_cpu") : nullptr;
        if (symbol == nullptr) {
            throw std::runtime_error("the CPU backend does not export ggml_get_type_traits_cpu");
        }
        return reinterpret_cast<decltype(&ggml_get_type_traits_cpu)>(symbol)(type);
    }

    // The plain buffer type first, then those that rearrange weights.
    std::vector<ggml_backend_buffer_type_t> buffer_types() const {
        std::vector<ggml_backend_buffer_type_t> types = { ggml_backend_dev_buffer_type(device) };
        const auto extra = function<ggml_backend_dev_get_extra_bufts_t>("ggml_backend_dev_get_extra_bufts");
        for (ggml_backend_buffer_type_t * type = extra ? extra(device) : nullptr; type && *type; type++) {
            types.push_back(*type);
        }
        return types;
    }
};

void add_vec_dot(std::vector<bench_case> & cases, const cpu & cpu, const weights & w, const std::vector<float> & x) {
    const ggml_type_traits_cpu * traits = cpu.traits(w.type);
    if (traits->vec_dot == nullptr) {
        return;
    }
    auto y = std::make_shared<std::vector<uint8_t>>(ggml_row_size(traits->vec_dot_type, w.columns));
    cpu.traits(traits->vec_dot_type)->from_float(x.data(), y->data(), w.columns);
    for (int64_t rows : { SMALL_ROWS, LARGE_ROWS }) {
        auto         data     = std::make_shared<std::vector<uint8_t>>(w.repeated(rows));
        auto         result   = std::make_shared<std::vector<float>>(rows);
        const size_t row_size = ggml_row_size(w.type, w.columns);
        const auto   run      = [=, columns = int(w.columns), vec_dot = traits->vec_dot] {
            for (int64_t row = 0; row < rows; row++) {
                vec_dot(columns, result->data() + row, 0, data->data() + row * row_size, 0, y->data(), 0, 1);
            }
        };
        run();
        w.check(result->data(), x.data(), w.name + " vec_dot");
        cases.push_back({ w.name, "vec_dot", "plain", rows, 1, rows * w.columns / 32.0, run });
    }
}

// A matrix in a buffer of its own, and products with it.
struct product {
    context_ptr   matrix_context, context;
    buffer_ptr    matrix_buffer, buffer;
    ggml_tensor * matrix = nullptr;
    ggml_tensor * result = nullptr;
    ggml_cgraph * graph  = nullptr;
    int           repeat;

    // Nothing but supported() may be called where it returns false: the buffer type has no kernels for this matrix.
    product(const cpu & cpu, const weights & w, ggml_backend_buffer_type_t type, int64_t rows,
            const std::vector<float> & x, int64_t n)
        // many products in a graph: starting one takes a while
        : repeat(std::max<int64_t>(1, (1 << 22) / (rows * w.columns * n))) {
        matrix_context = new_context(1);
        matrix         = ggml_new_tensor_2d(matrix_context.get(), w.type, w.columns, rows);
        matrix_buffer.reset(ggml_backend_buft_alloc_buffer(type, ggml_backend_buft_get_alloc_size(type, matrix)));
        ggml_backend_buffer_set_usage(matrix_buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

        context              = new_context(1 + repeat);
        ggml_tensor * input  = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, w.columns, n);
        graph                = ggml_new_graph(context.get());
        matrix->buffer       = matrix_buffer.get();
        result               = ggml_mul_mat(context.get(), matrix, input);
        if (!ggml_backend_dev_supports_op(cpu.device, result)) {
            graph = nullptr;
            return;
        }
        matrix->buffer = nullptr;
        ggml_backend_tensor_alloc(matrix_buffer.get(), matrix, ggml_backend_buffer_get_base(matrix_buffer.get()));
        const std::vector<uint8_t> data = w.repeated(rows);
        ggml_backend_tensor_set(matrix, data.data(), 0, data.size());

        ggml_build_forward_expand(graph, result);
        for (int i = 1; i < repeat; i++) {
            ggml_build_forward_expand(graph, ggml_mul_mat(context.get(), matrix, input));
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_dev_buffer_type(cpu.device)));
        for (int64_t column = 0; column < n; column++) {
            ggml_backend_tensor_set(input, x.data(), column * input->nb[1], input->nb[1]);
        }
    }

    bool supported() const { return graph != nullptr; }

    void run(ggml_backend_t backend) const {
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("a graph was not computed");
        }
    }
};

void add_mul_mat(std::vector<bench_case> & cases, const cpu & cpu, const weights & w, const std::vector<float> & x) {
    bool plain = true;  // the first one
    for (ggml_backend_buffer_type_t type : cpu.buffer_types()) {
        const std::string buffer = plain ? "plain" : ggml_backend_buft_name(type);
        plain                    = false;
        for (int64_t rows : { SMALL_ROWS, LARGE_ROWS }) {
            for (int64_t n : COLUMN_COUNTS) {
                auto product = std::make_shared<struct product>(cpu, w, type, rows, x, n);
                if (!product->supported()) {
                    continue;
                }
                const auto run = [product, backend = cpu.backend.get()] { product->run(backend); };
                run();
                std::vector<float> result(rows);
                const size_t       last = (n - 1) * product->result->nb[1];
                ggml_backend_tensor_get(product->result, result.data(), last, rows * sizeof(float));
                w.check(result.data(), x.data(), w.name + " mul_mat " + buffer);
                const double units = product->repeat * rows * w.columns / 32.0 * n;
                cases.push_back({ w.name, "mul_mat", buffer, rows, n, units, run });
            }
        }
    }
}

void measure(const bench_case & one, int round, double seconds) {
    one.run();  // brings the matrix into the caches as far as it fits
    const double hertz = clock_rate();
    const double start = thread_time();
    double       spent;
    int64_t      calls = 0;
    do {
        one.run();
        calls++;
        spent = thread_time() - start;
    } while (spent < seconds);
    // the clock may have changed: the mean of before and after
    const double cycles = spent * (hertz + clock_rate()) / 2;
    printf("{\"type\": \"%s\", \"kernel\": \"%s\", \"buffer\": \"%s\", \"rows\": %lld, \"n\": %lld, \"round\": %d, "
           "\"cycles\": %.4f, \"ghz\": %.3f}\n",
           one.type.c_str(), one.kernel, one.buffer.c_str(), (long long) one.rows, (long long) one.n, round,
           cycles / (calls * one.units), hertz * 1e-9);
    fflush(stdout);
}

ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * known = ggml_type_name(ggml_type(i));
        if (known != nullptr && strcasecmp(name.c_str(), known) == 0) {
            return ggml_type(i);
        }
    }
    throw std::runtime_error(name + " is no type of this ggml");
}

void run(int count, char ** words) {
    ggml_backend_load_all_from_path(words[1]);
    const int     rounds  = atoi(words[2]);
    const double  seconds = atof(words[3]) / 1000;
    const int64_t columns = atoll(words[4]);
    const cpu     cpu;

    const std::vector<float> x = gaussian(columns, 1, 2);
    std::vector<bench_case>  cases;
    for (int i = 5; i < count; i++) {
        const ggml_type type = type_of(words[i]);
        if (columns % ggml_blck_size(type) != 0) {
            fprintf(stderr, "%s: left out, %lld columns are not a multiple of its block\n", words[i], (long long) columns);
            continue;
        }
        fprintf(stderr, "%s: quantizing\n", words[i]);
        const weights w(words[i], type, columns);
        add_vec_dot(cases, cpu, w, x);
        add_mul_mat(cases, cpu, w, x);
    }
    for (int round = 0; round < rounds; round++) {
        fprintf(stderr, "round %d of %d\n", round + 1, rounds);
        for (const bench_case & one : cases) {
            measure(one, round, seconds);
        }
    }
}

}  // namespace

int main(int count, char ** words) {
    if (count < 6) {
        fprintf(stderr, "usage: micro BACKENDS ROUNDS MILLISECONDS COLUMNS TYPE...\n");
        return 2;
    }
    try {
        run(count, words);
    } catch (const std::exception & error) {
        fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
