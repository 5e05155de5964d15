#include "trit-repack.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "trit.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#ifdef GGML_TRIT_GEMM

namespace ggml::cpu::trit {

// Nothing here may be visible outside: all variants of ggml-cpu are loaded into one process to choose from.
namespace {

int type_depth(ggml_type type) {
    switch (type) {
        case GGML_TYPE_TRIT1: return 1;
        case GGML_TYPE_TRIT2: return 2;
        case GGML_TYPE_TRIT3: return 3;
        case GGML_TYPE_TRIT4: return 4;
        default:              return 0;
    }
}

bool is_strips(const ggml_tensor * t) {
    return t->buffer && t->buffer->buft == ggml_backend_cpu_trit_buffer_type();
}

// columns that are multiplied in one go
constexpr int64_t MAX_COLUMNS = 512;

struct columns {
    int64_t                  n;
    const trit_activations * y[MAX_COLUMNS];
    float *                  s[MAX_COLUMNS]; // where their results for row 0 go
};

// a matrix of n_rows x n_blocks blocks, in rows or in strips
struct matrix {
    int          depth;
    bool         strips;
    const char * data;
    size_t       row_size;
    int64_t      n_rows;
    int64_t      n_blocks;

    explicit matrix(const ggml_tensor * t) :
        depth(type_depth(t->type)), strips(is_strips(t)), data((const char *) t->data), row_size(t->nb[1]),
        n_rows(t->ne[1]), n_blocks(t->ne[0]/QK_TRIT) {}

    int64_t n_strips() const { return (n_rows + TRIT_STRIP - 1)/TRIT_STRIP; }

    // blocks [block0, block0 + n) of a strip times columns
    void multiply(int64_t strip, int64_t block0, int64_t n, int64_t n_cols, const trit_activations * const * y, float * const * s, int64_t row0) const {
        const size_t block_size = row_size/n_blocks;
        const char * x = data + strip*TRIT_STRIP*row_size;
        if (strips) {
            ggml_trit_gemm_strip(depth, n, x + block0*TRIT_STRIP*block_size, n_cols, y, block0, s, row0, block0 > 0);
            return;
        }
        const int rows = (int) std::min<int64_t>(TRIT_STRIP, n_rows - strip*TRIT_STRIP);
        ggml_trit_gemm_rows(depth, n, rows, x + block0*block_size, row_size, n_cols, y, block0, s, row0, block0 > 0);
    }

    // a strip with fewer rows than the kernels write
    void multiply_partial(int64_t strip, const columns & cols) const {
        const int64_t rows = n_rows - strip*TRIT_STRIP;
        for (int64_t c = 0; c < cols.n; c += TRIT_FEW_COLUMNS) {
            const int64_t n = std::min<int64_t>(TRIT_FEW_COLUMNS, cols.n - c);
            float   sums[TRIT_FEW_COLUMNS][TRIT_STRIP];
            float * s[TRIT_FEW_COLUMNS];
            for (int64_t i = 0; i < n; ++i) {
                s[i] = sums[i];
            }
            multiply(strip, 0, n_blocks, n, cols.y + c, s, 0);
            for (int64_t i = 0; i < n; ++i) {
                memcpy(cols.s[c + i] + strip*TRIT_STRIP, sums[i], rows*sizeof(float));
            }
        }
    }

    void multiply_strips(int64_t strip0, int64_t strip1, const columns & cols) const {
        if (strip1*TRIT_STRIP > n_rows) {
            multiply_partial(--strip1, cols);
        }
        // few columns go through the whole row at once, many through a part that is unpacked first: parts of equal size
        const int64_t n_parts = cols.n <= TRIT_FEW_COLUMNS ? 1 : (n_blocks + TRIT_TILE_BLOCKS - 1)/TRIT_TILE_BLOCKS;
        for (int64_t part = 0; part < n_parts; ++part) {
            const int64_t block0 = part*n_blocks/n_parts;
            const int64_t block1 = (part + 1)*n_blocks/n_parts;
            for (int64_t strip = strip0; strip < strip1; ++strip) {
                multiply(strip, block0, block1 - block0, cols.n, cols.y, cols.s, strip*TRIT_STRIP);
            }
        }
    }
};

// the rows of src1 as activations, in params->wdata; every thread does its part of each row
void prepare_activations(const ggml_compute_params * params, int depth, const ggml_tensor * src1) {
    const int64_t n_blocks = src1->ne[0]/QK_TRIT;
    const int64_t block0   = params->ith*n_blocks/params->nth;
    const int64_t block1   = (params->ith + 1)*n_blocks/params->nth;

    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float;

    auto * y = (trit_activations *) params->wdata;
    for (int64_t i3 = 0; i3 < src1->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < src1->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < src1->ne[1]; ++i1, y += n_blocks) {
                const auto * x = (const float *) ((const char *) src1->data + i1*src1->nb[1] + i2*src1->nb[2] + i3*src1->nb[3]);
                constexpr int64_t step = 16;
                for (int64_t ib = block0; ib < block1; ib += step) {
                    block_q8_0 q[2*step];
                    const int64_t n = std::min(step, block1 - ib);
                    from_float(x + ib*QK_TRIT, q, n*QK_TRIT);
                    ggml_trit_prepare_activations(depth, n, q, y + ib);
                }
            }
        }
    }
}

// Calls work(matrix, strip0, strip1) for parts of n_matrices matrices of n_strips each, until all threads have done all.
// The chunk counter has been set to the number of threads before the last barrier.
template <typename F> void share_strips(const ggml_compute_params * params, int64_t n_matrices, int64_t n_strips, F && work) {
    const int64_t n_parts = std::min<int64_t>(n_strips, 8*params->nth);
    for (int64_t i = params->ith; i < n_matrices*n_parts; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t part = i%n_parts;
        work(i/n_parts, part*n_strips/n_parts, (part + 1)*n_strips/n_parts);
    }
}

void start_sharing(const ggml_compute_params * params) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
}

size_t activations_size(const ggml_tensor * src1) {
    return ggml_nelements(src1)/QK_TRIT*sizeof(trit_activations);
}

class traits : public tensor_traits {
    bool work_size(int /* n_threads */, const ggml_tensor * op, size_t & size) override {
        size = activations_size(op->src[1]);
        if (op->op == GGML_OP_MUL_MAT_ID) {
            size += experts_size(op);
        }
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (params->use_ref && !is_strips(op->src[0])) {
            return false;
        }
        if (op->op == GGML_OP_MUL_MAT) {
            mul_mat(params, op);
        } else {
            mul_mat_id(params, op);
        }
        return true;
    }

    static void mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
        const ggml_tensor * src0 = dst->src[0];
        const ggml_tensor * src1 = dst->src[1];

        GGML_TENSOR_BINARY_OP_LOCALS

        GGML_ASSERT(nb0 == sizeof(float));

        const matrix all(src0);
        prepare_activations(params, all.depth, src1);
        start_sharing(params);

        const auto * y = (const trit_activations *) params->wdata;

        share_strips(params, ne12*ne13, all.n_strips(), [&](int64_t plane, int64_t strip0, int64_t strip1) {
            const int64_t i12 = plane%ne12;
            const int64_t i13 = plane/ne12;

            matrix x = all;
            x.data += i12/(ne12/ne02)*nb02 + i13/(ne13/ne03)*nb03;

            for (int64_t c0 = 0; c0 < ne11; c0 += MAX_COLUMNS) {
                columns cols;
                cols.n = std::min(MAX_COLUMNS, ne11 - c0);
                for (int64_t c = 0; c < cols.n; ++c) {
                    cols.y[c] = y + (plane*ne11 + c0 + c)*x.n_blocks;
                    cols.s[c] = (float *) ((char *) dst->data + (c0 + c)*nb1 + i12*nb2 + i13*nb3);
                }
                x.multiply_strips(strip0, strip1, cols);
            }
        });
    }

    // per expert: how many rows it gets, and which
    struct expert_row {
        int32_t slot;
        int32_t token;
    };

    // Where the reference is wanted, ggml-cpu's own product uses the memory instead: it has a counter besides for each
    // expert, on a cache line of its own, and aligns its parts.
    static size_t experts_size(const ggml_tensor * op) {
        const ggml_tensor * ids = op->src[2];
        const int64_t n_experts = op->src[0]->ne[2];
        return n_experts*(sizeof(int64_t) + ggml_nelements(ids)*sizeof(expert_row)) + (n_experts + 3)*CACHE_LINE_SIZE;
    }

    static void mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst) {
        const ggml_tensor * src0 = dst->src[0];
        const ggml_tensor * src1 = dst->src[1];
        const ggml_tensor * ids  = dst->src[2];

        GGML_TENSOR_BINARY_OP_LOCALS

        GGML_ASSERT(nb0 == sizeof(float));
        GGML_ASSERT(ne03 == 1 && ne13 == 1 && ne3 == 1);

        const matrix all(src0);
        prepare_activations(params, all.depth, src1);

        auto * counts = (int64_t *) ((char *) params->wdata + activations_size(src1)); // [n_experts]
        auto * rows   = (expert_row *) (counts + ne02);                               // [n_experts][n_ids]
        const int64_t n_ids = ggml_nelements(ids);

        if (params->ith == 0) {
            memset(counts, 0, ne02*sizeof(*counts));
            for (int32_t token = 0; token < ids->ne[1]; ++token) {
                for (int32_t slot = 0; slot < ids->ne[0]; ++slot) {
                    const int32_t expert = *(const int32_t *) ((const char *) ids->data + token*ids->nb[1] + slot*ids->nb[0]);
                    GGML_ASSERT(expert >= 0 && expert < ne02);
                    rows[expert*n_ids + counts[expert]++] = { slot, token };
                }
            }
        }
        start_sharing(params);

        const auto * y = (const trit_activations *) params->wdata;

        share_strips(params, ne02, all.n_strips(), [&](int64_t expert, int64_t strip0, int64_t strip1) {
            matrix x = all;
            x.data += expert*nb02;

            for (int64_t c0 = 0; c0 < counts[expert]; c0 += MAX_COLUMNS) {
                columns cols;
                cols.n = std::min(MAX_COLUMNS, counts[expert] - c0);
                for (int64_t c = 0; c < cols.n; ++c) {
                    const expert_row row = rows[expert*n_ids + c0 + c];
                    cols.y[c] = y + (row.token*ne11 + row.slot%ne11)*x.n_blocks;
                    cols.s[c] = (float *) ((char *) dst->data + row.slot*nb1 + row.token*nb2);
                }
                x.multiply_strips(strip0, strip1, cols);
            }
        });
    }
};

// true if the matrix can be stored as strips
bool can_interleave(const ggml_tensor * t) {
    return type_depth(t->type) > 0 && ggml_is_contiguous(t) && t->ne[1]%TRIT_STRIP == 0;
}

bool is_product(const ggml_tensor * op) {
    return (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID) && op->src[1]->type == GGML_TYPE_F32 &&
           op->src[1]->nb[0] == sizeof(float);
}

class buffer_type : public extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        return is_product(op) && is_strips(op->src[0]) && can_interleave(op->src[0]) &&
               (!op->src[1]->buffer || ggml_backend_buft_is_host(op->src[1]->buffer->buft));
    }

    tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static traits instance;
        if (!is_product(op) || type_depth(op->src[0]->type) == 0) {
            return nullptr;
        }
        // the other place for a TRIT matrix is a plain buffer, or memory without one
        const ggml_backend_buffer_t buffer = op->src[0]->buffer;
        return is_strips(op->src[0]) || !buffer || ggml_backend_buffer_is_host(buffer) ? &instance : nullptr;
    }
};

void set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(t));

    const matrix x(t);
    for (int64_t i = 0; i < ggml_nrows(t); i += TRIT_STRIP) {
        ggml_trit_interleave(x.depth, x.n_blocks, TRIT_STRIP, (const char *) data + i*x.row_size, x.row_size, (char *) t->data + i*x.row_size);
    }
}

const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_TRIT";
}

// A token reads all weights once. With pages of 4 KB it would wait for the address of a page every few hundred cycles.
void ask_for_huge_pages(void * data, size_t size) {
#if defined(__linux__)
    const uintptr_t page  = sysconf(_SC_PAGESIZE);
    const uintptr_t first = ((uintptr_t) data + page - 1)/page*page;
    const uintptr_t end   = ((uintptr_t) data + size)/page*page;
    if (first < end) {
        madvise((void *) first, end - first, MADV_HUGEPAGE); // the system may have none
    }
#else
    (void) data;
    (void) size;
#endif
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer == nullptr) {
        return nullptr;
    }
    ask_for_huge_pages(ggml_backend_buffer_get_base(buffer), size);
    buffer->buft             = buft;
    buffer->iface.set_tensor = set_tensor;
    buffer->iface.get_tensor = nullptr;
    buffer->iface.cpy_tensor = nullptr;
    return buffer;
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

}  // namespace

}  // namespace ggml::cpu::trit

ggml_backend_buffer_type_t ggml_backend_cpu_trit_buffer_type(void) {
    static ggml_backend_buffer_type type = {
        /* .iface    = */ {
                           /* .get_name         = */ ggml::cpu::trit::get_name,
                           /* .alloc_buffer     = */ ggml::cpu::trit::alloc_buffer,
                           /* .get_alignment    = */ ggml::cpu::trit::get_alignment,
                           /* .get_max_size     = */ nullptr,  // defaults to SIZE_MAX
                           /* .get_alloc_size   = */ nullptr,  // defaults to ggml_nbytes
                           /* .is_host          = */ nullptr,
                           },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ new ggml::cpu::trit::buffer_type(),
    };
    return &type;
}

#else

ggml_backend_buffer_type_t ggml_backend_cpu_trit_buffer_type(void) {
    return nullptr;
}

#endif
