// Whitening: (x - mean) / sqrt(unbiased var + eps) over the unmasked values, summed by chunks in a
// fixed order, in double.
#include <math.h>

#include <vector>

#include "../ops.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t CHUNK = 4096;

struct Sums {
    double count, sum;
};

// Count and sum of (x - mean)^POWER of every chunk, then of all chunks, for any number of threads.
template <int POWER, bool MASKED>
Sums chunked(const float* x, const uint8_t* mask, int64_t n, double mean, int threads) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    std::vector<Sums> part(chunks);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t end = n < (c + 1) * CHUNK ? n : (c + 1) * CHUNK;
        double sum = 0.0, count = 0.0;
#pragma omp simd reduction(+ : sum, count)
        for (int64_t i = c * CHUNK; i < end; i++) {
            const bool on = !MASKED || mask[i];
            const double d = on ? (double)x[i] - mean : 0.0;
            sum += POWER == 2 ? d * d : d;
            count += on ? 1.0 : 0.0;
        }
        part[c] = {count, sum};
    }
    Sums all = {0.0, 0.0};
    for (const Sums& p : part) all.count += p.count, all.sum += p.sum;
    return all;
}

template <bool MASKED>
void whitened(const float* x, const uint8_t* mask, int64_t n, double eps, float* out, int threads) {
    const Sums all = chunked<1, MASKED>(x, mask, n, 0.0, threads);
    const double mean = all.count > 0.0 ? all.sum / all.count : 0.0;
    const double square = chunked<2, MASKED>(x, mask, n, mean, threads).sum;
    const double scale = 1.0 / sqrt(square / (all.count > 2.0 ? all.count - 1.0 : 1.0) + eps);
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const bool on = !MASKED || mask[i];
        const double d = on ? (double)x[i] - mean : 0.0;
        out[i] = d == 0.0 ? 0.0f : (float)(d * scale);  // 0 / 0 where all are equal and eps is 0
    }
}

}  // namespace

void whiten(const float* value, const uint8_t* mask, int64_t n, double eps, float* out,
            int threads) {
    mask ? whitened<true>(value, mask, n, eps, out, threads)
         : whitened<false>(value, mask, n, eps, out, threads);
}

}  // namespace ISA
}  // namespace reasonrl
