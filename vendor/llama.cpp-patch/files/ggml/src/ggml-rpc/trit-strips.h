#pragma once

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-impl.h"

#include <cstring>
#include <map>
#include <utility>
#include <vector>

// TRIT matrices of a server with their rows interleaved, as ggml-cpu's buffer type CPU_TRIT has them.
//
// A server's memory is plain, so a matrix arrives with its rows as in the file. The first graph that multiplies by it
// interleaves them, in the same memory. ggml-cpu knows such a matrix by the type of its buffer, so for the time of a graph
// its tensor gets a buffer of that type, which holds nothing. Whatever else reads or writes the memory finds plain rows.
class trit_strips {
public:
    explicit trit_strips(const std::vector<ggml_backend_t> & backends) {
        for (ggml_backend_t backend : backends) {
            ggml_backend_dev_t dev = ggml_backend_get_device(backend);
            if (ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU) {
                continue;
            }
            auto get_types = (ggml_backend_dev_get_extra_bufts_t)
                ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
            for (auto * type = get_types ? get_types(dev) : nullptr; type && *type; ++type) {
                if (strcmp(ggml_backend_buft_name(*type), "CPU_TRIT") == 0) {
                    cpu = dev;
                    interleaved.reset(ggml_backend_buft_alloc_buffer(*type, ggml_backend_buft_get_alignment(*type)));
                }
            }
        }
    }

    // Interleaves the matrices of a graph. While it lives, their tensors have the buffer that says so.
    class in_graph {
    public:
        in_graph(trit_strips & strips, ggml_backend_t backend, ggml_cgraph * graph) {
            if (strips.interleaved && ggml_backend_get_device(backend) == strips.cpu) {
                strips.use(graph, lent);
            }
        }

        ~in_graph() {
            for (auto & [tensor, buffer] : lent) {
                tensor->buffer = buffer;
            }
        }

        in_graph(const in_graph &) = delete;
        in_graph & operator=(const in_graph &) = delete;

    private:
        friend trit_strips;
        std::vector<std::pair<ggml_tensor *, ggml_backend_buffer_t>> lent; // and their own buffers
    };

    // to be called before anything but a graph reads or writes memory
    void restore(const void * data, size_t size) {
        const char * first = (const char *) data;
        for (auto it = matrices.begin(); it != matrices.end() && it->first < first + size;) {
            if (it->first + ggml_nbytes(&it->second) > first) {
                permute(it->second, true);
                it = matrices.erase(it);
            } else {
                ++it;
            }
        }
    }

    // to be called before a buffer is cleared or freed
    void forget(ggml_backend_buffer_t buffer) {
        for (auto it = matrices.begin(); it != matrices.end();) {
            it = it->second.buffer == buffer ? matrices.erase(it) : std::next(it);
        }
    }

private:
    static constexpr int64_t ROWS = 16; // of a strip

    ggml_backend_dev_t                  cpu = nullptr;
    ggml_backend_buffer_ptr             interleaved; // null where the CPU has no such type
    std::map<const char *, ggml_tensor> matrices;    // that are interleaved, by their address

    static bool is_trit(const ggml_tensor * t) {
        return t->type >= GGML_TYPE_TRIT1 && t->type <= GGML_TYPE_TRIT4;
    }

    // whether the node multiplies by a matrix that can be interleaved
    bool is_product(ggml_tensor * node) const {
        ggml_tensor * x = node->src[0];
        if ((node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID) || !node->src[1] || x->op != GGML_OP_NONE ||
            x->view_src || !x->buffer || x->buffer->buft != ggml_backend_cpu_buffer_type()) {
            return false;
        }
        const ggml_backend_buffer_t own = x->buffer;
        x->buffer = interleaved.get();
        const bool result = ggml_backend_dev_supports_op(cpu, node);
        x->buffer = own;
        return result;
    }

    void use(ggml_cgraph * graph, std::vector<std::pair<ggml_tensor *, ggml_backend_buffer_t>> & lent) {
        std::vector<ggml_tensor *> factors;
        std::vector<ggml_tensor *> others;
        for (int i = 0; i < graph->n_nodes; ++i) {
            ggml_tensor * node = graph->nodes[i];
            for (int j = 0; node && j < GGML_MAX_SRC; ++j) {
                if (node->src[j] && is_trit(node->src[j])) {
                    (j == 0 && is_product(node) ? factors : others).push_back(node->src[j]);
                }
            }
            if (node && is_trit(node)) {
                others.push_back(node);
            }
        }
        for (const ggml_tensor * t : others) {
            restore(t->data, ggml_nbytes(t));
        }
        for (ggml_tensor * t : factors) {
            bool skip = t->buffer == interleaved.get(); // done, for another node
            for (const ggml_tensor * other : others) {
                const char * a = (const char *) t->data;
                const char * b = (const char *) other->data;
                skip = skip || (a < b + ggml_nbytes(other) && b < a + ggml_nbytes(t));
            }
            if (skip) {
                continue;
            }
            const auto found = matrices.find((const char *) t->data);
            if (found == matrices.end() || found->second.type != t->type || !ggml_are_same_shape(&found->second, t)) {
                restore(t->data, ggml_nbytes(t));
                permute(*t, false);
                matrices.emplace((const char *) t->data, *t);
            }
            lent.emplace_back(t, t->buffer);
            t->buffer = interleaved.get();
        }
    }

    // writes a strip as ggml-cpu has it
    void interleave(ggml_tensor strip, const char * rows, char * data) const {
        strip.buffer = interleaved.get();
        strip.data   = data;
        ggml_backend_tensor_set(&strip, rows, 0, ggml_nbytes(&strip));
    }

    // interleaves the rows of a matrix, or puts them back
    void permute(const ggml_tensor & t, bool back) const {
        ggml_tensor strip = t;
        strip.ne[1] = ROWS;
        strip.ne[2] = strip.ne[3] = 1;
        const size_t size = ggml_nbytes(&strip);

        std::vector<char> copy(size);
        std::vector<size_t> from(back ? size : 0); // where a byte comes from; only ggml-cpu knows, so numbers are interleaved
        for (size_t shift = 0; back && shift < 32; shift += 8) {
            std::vector<char> number(size);
            for (size_t i = 0; i < size; ++i) {
                number[i] = (char) (i >> shift);
            }
            interleave(strip, number.data(), copy.data());
            for (size_t i = 0; i < size; ++i) {
                from[i] |= (size_t) (uint8_t) copy[i] << shift;
            }
        }
        for (int64_t row = 0; row < ggml_nrows(&t); row += ROWS) {
            char * data = (char *) t.data + row*t.nb[1];
            memcpy(copy.data(), data, size);
            if (back) {
                for (size_t i = 0; i < size; ++i) {
                    data[from[i]] = copy[i];
                }
            } else {
                interleave(strip, copy.data(), data);
            }
        }
    }
};
