// AdamW (Loshchilov and Hutter 2019, algorithm 2) of gradients whose norm, over all of them, is at
// most a limit, in one pass over the parameters:
//
//   g' = g min(1, limit / (norm + 1e-6)),  m = b1 m + (1 - b1) g',  v = b2 v + (1 - b2) g'^2
//   w = w (1 - rate decay) - rate m' / (sqrt(v') + eps),  m' = m / (1 - b1^t),  v' = v / (1 - b2^t)
//
// A norm that is not finite changes nothing. Squares are summed in float32 by chunks that the sizes
// alone decide, chunks in double and in their order.
#include <math.h>

#include <algorithm>
#include <vector>

#include "vector.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t CHUNK = 4096;

// Neighbouring numbers of a parameter.
struct Chunk {
    const Learned* of;
    int64_t at, count;
};

double square_of(const float* x, int64_t n) {
    Vec sum[4] = {};
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) {
        for (int k = 0; k < 4; k++) {
            const Vec v = load(x + j + k * LANES);
            sum[k] += v * v;
        }
    }
    double rest = 0.0;
    for (; j < n; j++) rest += (double)x[j] * x[j];
    return (double)total_of((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

void descend(const Chunk& c, const AdamW& how, float scale) {
    const double t = *c.of->step + 1.0;
    const float rate = (float)(how.rate / (1.0 - pow(how.beta1, t)));
    const float root = (float)(1.0 / sqrt(1.0 - pow(how.beta2, t))), eps = (float)how.eps;
    const float keep = (float)(1.0 - how.rate * how.decay);
    const float b1 = (float)how.beta1, b2 = (float)how.beta2;
    const float a1 = (float)(1.0 - how.beta1), a2 = (float)(1.0 - how.beta2);
    const float* grad = c.of->grad + c.at;
    float* __restrict w = c.of->weight + c.at, * __restrict m = c.of->mean + c.at, * __restrict v = c.of->square + c.at;
#pragma omp simd
    for (int64_t j = 0; j < c.count; j++) {
        const float g = grad[j] * scale;
        m[j] = b1 * m[j] + a1 * g;
        v[j] = b2 * v[j] + a2 * g * g;
        w[j] = keep * w[j] - rate * m[j] / (sqrtf(v[j]) * root + eps);
    }
}

}  // namespace

double adamw(const Learned* all, int64_t count, const AdamW& how, int threads) {
    std::vector<Chunk> chunks;
    for (int64_t p = 0; p < count; p++) {
        for (int64_t at = 0; at < all[p].count; at += CHUNK) {
            chunks.push_back({&all[p], at, std::min(CHUNK, all[p].count - at)});
        }
    }
    const int64_t size = (int64_t)chunks.size();
    std::vector<double> square(size);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < size; c++) {
        square[c] = square_of(chunks[c].of->grad + chunks[c].at, chunks[c].count);
    }
    double sum = 0.0;
    for (const double part : square) sum += part;
    const double norm = sqrt(sum);
    if (!how.usable || !isfinite(norm)) return norm;
    const float scale = (float)std::min(1.0, how.limit / (norm + 1e-6));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < size; c++) descend(chunks[c], how, scale);
    for (int64_t p = 0; p < count; p++) *all[p].step += 1.0f;
    return norm;
}

}  // namespace ISA
}  // namespace reasonrl
