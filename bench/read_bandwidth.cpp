// How fast threads read memory: each sums the words of its share of an array that no cache holds.
// `bandwidth.py` builds and runs it.
//
// usage: read_bandwidth THREADS PASSES BYTES
//
// Prints bytes per second of each pass, a line each. All threads begin a pass together, and it ends with the last.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

namespace {

// Waits, without the help of the system, until all threads are here; may be used again at once.
class barrier {
    const int        n_;
    std::atomic<int> arrived_{ 0 };
    std::atomic<int> phase_{ 0 };

  public:
    explicit barrier(int n) : n_(n) {}

    void wait() {
        const int phase = phase_.load();
        if (arrived_.fetch_add(1) + 1 == n_) {
            arrived_ = 0;
            phase_   = phase + 1;
        } else {
            while (phase_.load() == phase) {
            }
        }
    }
};

// several sums, so that additions do not wait for one another
uint64_t sum(const uint64_t * x, size_t n) {
    constexpr size_t WIDTH = 64;
    uint64_t sums[WIDTH] = {};
    for (size_t i = 0; i + WIDTH <= n; i += WIDTH) {
        for (size_t j = 0; j < WIDTH; j++) {
            sums[j] += x[i + j];
        }
    }
    uint64_t total = 0;
    for (uint64_t one : sums) {
        total += one;
    }
    return total;
}

}  // namespace

int main(int count, char ** words) {
    const int    n_threads = count == 4 ? atoi(words[1]) : 0;
    const int    n_passes  = count == 4 ? atoi(words[2]) : 0;
    const size_t n         = count == 4 ? strtoull(words[3], nullptr, 10)/sizeof(uint64_t)/(n_threads > 0 ? n_threads : 1) : 0;
    if (n_threads < 1 || n_passes < 1 || n == 0) {
        fprintf(stderr, "usage: read_bandwidth THREADS PASSES BYTES\n");
        return 2;
    }
    barrier               all(n_threads);
    std::atomic<uint64_t> result{ 0 };
    std::vector<double>   seconds;

    const auto work = [&](bool is_first) {
        const std::vector<uint64_t> x(n, 1);  // each thread's own, near its core
        for (int pass = 0; pass < n_passes; pass++) {
            all.wait();
            const auto start = std::chrono::steady_clock::now();
            result += sum(x.data(), n);
            all.wait();
            if (is_first) {
                seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
            }
        }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < n_threads; i++) {
        others.emplace_back(work, false);
    }
    work(true);
    for (std::thread & one : others) {
        one.join();
    }
    if (result != uint64_t(n_passes)*n_threads*(n - n%64)) {
        fprintf(stderr, "read_bandwidth: a wrong sum\n");
        return 1;
    }
    for (const double one : seconds) {
        printf("%.0f\n", n_threads*n*sizeof(uint64_t)/one);
    }
    return 0;
}
