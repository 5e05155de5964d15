// Threads as fibers, and what upstream's ggml-metal-device.m does on a Mac: pipelines, encoders, the device.

#include "emulator.h"
#include "device.h"

#include "ggml-impl.h"
#include "ggml-metal-device.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

namespace emulator {

guarded_memory::guarded_memory(size_t size) {
    const size_t page = sysconf(_SC_PAGESIZE);
    mapped = (size + page - 1)/page*page + page;
    base   = (char *) mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    GGML_ASSERT(base != MAP_FAILED && mprotect(base + mapped - page, page, PROT_NONE) == 0);
    data = base + mapped - page - size;
}

guarded_memory::~guarded_memory() {
    munmap(base, mapped);
}

//
// fibers
//

namespace {

constexpr size_t STACK_SIZE = 1 << 16;

enum fiber_state { READY, AT_SIMDGROUP_BARRIER, AT_SIMD_EXCHANGE, AT_THREADGROUP_BARRIER, ENDED };

struct fiber {
    ucontext_t        context;
    std::vector<char> stack = std::vector<char>(STACK_SIZE);
    thread_state      thread;
    fiber_state       state;
    int               n_exchanges;
};

struct simdgroup {
    // a thread that is ahead writes into the other one
    uint64_t values[2][SIMD_WIDTH];
};

std::vector<fiber>     fibers;
std::vector<simdgroup> simdgroups;
ucontext_t             scheduler;
fiber *                current;
kernel_t               current_kernel;

void run_fiber() {
    current_kernel(current->thread);
    current->state = ENDED;
    swapcontext(&current->context, &scheduler);
}

void wait(fiber_state state) {
    fiber * self = current;
    self->state = state;
    swapcontext(&self->context, &scheduler);
}

// Threads first to last wait for the same thing: let them go on. Something else is an error unless others can run.
bool release(int first, int last, fiber_state state) {
    for (int i = first; i < last; ++i) {
        if (fibers[i].state != state) {
            return false;
        }
    }
    for (int i = first; i < last; ++i) {
        fibers[i].state = READY;
    }
    return true;
}

void run_threadgroup(const std::string & name, int n_threads, bool reverse) {
    for (;;) {
        bool progress = false;
        int  n_ended  = 0;
        for (int i = 0; i < n_threads; ++i) {
            fiber & f = fibers[reverse ? n_threads - 1 - i : i];
            if (f.state == READY) {
                current = &f;
                swapcontext(&scheduler, &f.context);
                progress = true;
            }
            n_ended += f.state == ENDED;
        }
        if (n_ended == n_threads) {
            return;
        }
        for (int first = 0; first < n_threads; first += SIMD_WIDTH) {
            const int last = std::min(first + SIMD_WIDTH, n_threads);
            progress = release(first, last, AT_SIMDGROUP_BARRIER) || progress;
            progress = release(first, last, AT_SIMD_EXCHANGE)     || progress;
        }
        progress = release(0, n_threads, AT_THREADGROUP_BARRIER) || progress;
        if (!progress) {
            GGML_ABORT("%s: threads wait for different things", name.c_str());
        }
    }
}

} // namespace

void threadgroup_barrier() {
    wait(AT_THREADGROUP_BARRIER);
}

void simdgroup_barrier() {
    wait(AT_SIMDGROUP_BARRIER);
}

const uint64_t * simd_exchange(uint64_t value) {
    uint64_t * values = simdgroups[current->thread.simdgroup_index_in_threadgroup].values[current->n_exchanges++%2];
    values[current->thread.thread_index_in_simdgroup] = value;
    wait(AT_SIMD_EXCHANGE);
    return values;
}

int thread_index_in_simdgroup() {
    return current->thread.thread_index_in_simdgroup;
}

int thread_index_in_threadgroup() {
    return current->thread.thread_index_in_threadgroup;
}

//
// kernels
//

namespace {

struct function_constant {
    bool    * as_bool;
    int16_t * as_int16;
};

std::map<std::string, kernel_t> & kernels() {
    static std::map<std::string, kernel_t> result;
    return result;
}

// several files may have the same one
std::multimap<int, function_constant> & function_constants() {
    static std::multimap<int, function_constant> result;
    return result;
}

} // namespace

kernel_registration::kernel_registration(const char * name, kernel_t kernel) {
    GGML_ASSERT(kernels().emplace(name, kernel).second);
}

function_constant_registration::function_constant_registration(int index, bool * value) {
    function_constants().insert({ index, { value, nullptr } });
}

function_constant_registration::function_constant_registration(int index, int16_t * value) {
    function_constants().insert({ index, { nullptr, value } });
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> result;
    for (const auto & it : kernels()) {
        result.push_back(it.first);
    }
    return result;
}

bool                     reverse_order = false;
std::vector<std::string> dispatched;

} // namespace emulator

//
// ggml-metal-device.h
//

struct ggml_metal_cv {
    std::map<int, int> values;
};

ggml_metal_cv_t ggml_metal_cv_init(void) {
    return new ggml_metal_cv;
}

void ggml_metal_cv_free(ggml_metal_cv_t cv) {
    delete cv;
}

void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t idx) { cv->values[idx] = value; }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t idx) { cv->values[idx] = value; }
void ggml_metal_cv_set_bool (ggml_metal_cv_t cv, bool    value, int32_t idx) { cv->values[idx] = value; }

struct ggml_metal_pipeline {
    std::string        base;
    std::map<int, int> constants;
};

ggml_metal_pipeline_t ggml_metal_pipeline_init(void) {
    return new ggml_metal_pipeline;
}

void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) {
    delete pipeline;
}

int ggml_metal_pipeline_max_theads_per_threadgroup(struct ggml_metal_pipeline_with_params) {
    return 1024;
}

struct ggml_metal_library {
    ggml_metal_pipelines_t pipelines = ggml_metal_pipelines_init();
};

static ggml_metal_library library;

static struct ggml_metal_pipeline_with_params no_pipeline() {
    return { nullptr, 0, 0, 0, 0, false, false };
}

struct ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    struct ggml_metal_pipeline_with_params res = no_pipeline();
    res.pipeline = ggml_metal_pipelines_get(lib->pipelines, name);
    return res;
}

struct ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    if (emulator::kernels().find(base) == emulator::kernels().end()) {
        GGML_ABORT("there is no kernel %s", base);
    }
    struct ggml_metal_pipeline_with_params res = no_pipeline();
    res.pipeline = ggml_metal_pipeline_init();
    res.pipeline->base = base;
    if (cv) {
        res.pipeline->constants = cv->values;
    }
    ggml_metal_pipelines_add(lib->pipelines, name, res.pipeline);
    return res;
}

// Runs a kernel as soon as it is dispatched.
struct ggml_metal_encoder {
    ggml_metal_pipeline_t pipeline = nullptr;
    std::vector<void *>   buffers  = std::vector<void *>(31);
    std::vector<char>     bytes;
    size_t                threadgroup_memory = 0;
};

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) {
    return new ggml_metal_encoder;
}

void ggml_metal_encoder_free(ggml_metal_encoder_t encoder) {
    delete encoder;
}

void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop (ggml_metal_encoder_t) {}
void ggml_metal_encoder_memory_barrier  (ggml_metal_encoder_t) {}
void ggml_metal_encoder_end_encoding    (ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, struct ggml_metal_pipeline_with_params pipeline) {
    encoder->pipeline = pipeline.pipeline;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void * data, size_t size, int idx) {
    encoder->bytes.assign((char *) data, (char *) data + size);
    encoder->buffers[idx] = encoder->bytes.data();
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, struct ggml_metal_buffer_id buffer, int idx) {
    encoder->buffers[idx] = (char *) buffer.metal + buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t size, int) {
    GGML_ASSERT(size % 16 == 0);
    encoder->threadgroup_memory = size;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t encoder, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    using namespace emulator;

    for (const auto & c : function_constants()) {
        const auto given = encoder->pipeline->constants.find(c.first);
        const int  value = given != encoder->pipeline->constants.end() ? given->second : 0;
        if (c.second.as_bool) {
            *c.second.as_bool = value != 0;
        } else {
            *c.second.as_int16 = (int16_t) value;
        }
    }

    current_kernel = kernels().at(encoder->pipeline->base);
    dispatched.push_back(encoder->pipeline->base);

    const int n_threads = tptg0*tptg1*tptg2;
    if (fibers.size() < (size_t) n_threads) {
        fibers.resize(n_threads);
    }
    simdgroups.resize((n_threads + SIMD_WIDTH - 1)/SIMD_WIDTH);

    const guarded_memory threadgroup_memory(encoder->threadgroup_memory);

    for (int tg = 0; tg < tg0*tg1*tg2; ++tg) {
        memset(threadgroup_memory.data, 0xa5, encoder->threadgroup_memory);
        for (int i = 0; i < n_threads; ++i) {
            fiber & f = fibers[i];
            f.state       = READY;
            f.n_exchanges = 0;
            f.thread.buffers            = encoder->buffers.data();
            f.thread.threadgroup_memory = threadgroup_memory.data;
            f.thread.threadgroup_position_in_grid  = { tg%tg0, tg/tg0%tg1, tg/(tg0*tg1) };
            f.thread.thread_position_in_threadgroup = { i%tptg0, i/tptg0%tptg1, i/(tptg0*tptg1) };
            f.thread.threads_per_threadgroup        = { tptg0, tptg1, tptg2 };
            f.thread.thread_index_in_threadgroup    = i;
            f.thread.thread_index_in_simdgroup      = i%SIMD_WIDTH;
            f.thread.simdgroup_index_in_threadgroup = i/SIMD_WIDTH;

            getcontext(&f.context);
            f.context.uc_stack.ss_sp   = f.stack.data();
            f.context.uc_stack.ss_size = f.stack.size();
            f.context.uc_link          = nullptr;
            makecontext(&f.context, run_fiber, 0);
        }
        run_threadgroup(encoder->pipeline->base, n_threads, reverse_order);
    }
}

const struct ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) {
    return &dev->props;
}

ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t) {
    return &library;
}

ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t) {
    return emulator::device();
}

struct ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const struct ggml_tensor * t) {
    return { t->data, 0 };
}

ggml_metal_device_t emulator::device() {
    static ggml_metal_device dev = [] {
        ggml_metal_device d = {};
        d.props.max_theadgroup_memory_size = 32768;
        d.props.has_simdgroup_reduction    = true;
        d.props.has_simdgroup_mm           = true;
        return d;
    }();
    return &dev;
}

// declared for ggml_metal_device_get, which nothing here calls
ggml_metal_device_t ggml_metal_device_init(int, int) { return emulator::device(); }
void                ggml_metal_device_free(ggml_metal_device_t) {}

#if defined(__x86_64__) && __clang_major__ < 15
// what older Clang calls to convert its type of half precision, and has in a library of its own
extern "C" uint16_t __gnu_f2h_ieee(float x)    { return ggml_fp32_to_fp16(x); }
extern "C" float    __gnu_h2f_ieee(uint16_t x) { return ggml_fp16_to_fp32(x); }
#endif
