// Whitening: (x - mean) / sqrt(unbiased var + eps) over the unmasked values, summed by chunks in a
// fixed order, in double.
#include <math.h>

#include <algorithm>
#include <vector>

#include "../ops.h"

namespace reasonrl {
namespace {

constexpr int64_t CHUNK = 4096;

// Sum of f(i) over [0, n), by chunks, for any number of threads.
template <typename F>
double chunked_sum(int64_t n, int threads, F f) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    std::vector<double> part(chunks, 0.0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        double total = 0.0;
        for (int64_t i = c * CHUNK; i < std::min(n, (c + 1) * CHUNK); i++) total += f(i);
        part[c] = total;
    }
    double total = 0.0;
    for (const double x : part) total += x;
    return total;
}

}  // namespace

void whiten(const float* value, const uint8_t* mask, int64_t n, double eps, float* out,
            int threads) {
    const auto on = [mask](int64_t i) { return !mask || mask[i]; };
    const double count = chunked_sum(n, threads, [&](int64_t i) { return on(i) ? 1.0 : 0.0; });
    const double sum =
        chunked_sum(n, threads, [&](int64_t i) { return on(i) ? (double)value[i] : 0.0; });
    const double mean = count > 0.0 ? sum / count : 0.0;
    const double square = chunked_sum(n, threads, [&](int64_t i) {
        const double x = on(i) ? value[i] - mean : 0.0;
        return x * x;
    });
    const double scale = 1.0 / sqrt(square / std::max(count - 1.0, 1.0) + eps);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const double x = on(i) ? value[i] - mean : 0.0;
        out[i] = x == 0.0 ? 0.0f : (float)(x * scale);
    }
}

}  // namespace reasonrl
