// Products of tensors on the matrix units of newer GPUs, as far as the kernels of matrix products use them.
#pragma once

#include <metal_tensor>

namespace mpp::tensor_ops {

struct matmul2d_descriptor {
    enum class mode { multiply, multiply_accumulate };

    int m, n, k;

    // Only the right one is ever transposed, and all accumulate.
    constexpr matmul2d_descriptor(int m, int n, int k, bool, bool, bool, mode) : m(m), n(n), k(k) {}
};

// m x n sums, the same number in each thread
template <int m, int n, int n_threads> struct cooperative_tensor {
    static constexpr int n_mine = m*n/n_threads;

    float element[n_mine] = {};

    static int first() { return n_mine*emulator::thread_index_in_threadgroup(); }

    template <typename tensor_t> void store(const tensor_t & t) const {
        for (int i = 0; i < n_mine; ++i) {
            const int row    = (first() + i)/n;
            const int column = (first() + i)%n;
            if (column < t.extent[0] && row < t.extent[1]) {
                t.at(column, row) = element[i];
            }
        }
    }
};

template <matmul2d_descriptor descriptor, typename scope> struct matmul2d {
    typedef cooperative_tensor<descriptor.m, descriptor.n, scope::n_threads> destination_t;

    template <typename left_t, typename right_t, typename T> destination_t get_destination_cooperative_tensor() const {
        return {};
    }

    // what lies outside of a tensor counts as zero
    template <typename left_t, typename right_t> void run(const left_t & left, const right_t & right, destination_t & sums) const {
        for (int i = 0; i < destination_t::n_mine; ++i) {
            const int row    = (destination_t::first() + i)/descriptor.n;
            const int column = (destination_t::first() + i)%descriptor.n;
            if (row < left.extent[1] && column < right.extent[1]) {
                for (int k = 0; k < left.extent[0]; ++k) {
                    sums.element[i] += (float) left.at(k, row)*(float) right.at(k, column);
                }
            }
        }
    }
};

} // namespace mpp::tensor_ops
