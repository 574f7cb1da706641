// Gradients scaled so that their norm, over all of them, is at most a limit: g limit / (norm +
// 1e-6) where that is less than g. A norm that is not finite changes nothing. Squares are summed in
// float32 by chunks that the sizes alone decide, chunks in double and in their order.
#include <math.h>

#include <algorithm>
#include <vector>

#include "vector.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t CHUNK = 4096;

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

}  // namespace

double clip(const Piece* pieces, int64_t count, double limit, int threads) {
    std::vector<Piece> chunks;
    for (int64_t p = 0; p < count; p++) {
        for (int64_t at = 0; at < pieces[p].count; at += CHUNK) {
            chunks.push_back({pieces[p].at + at, std::min(CHUNK, pieces[p].count - at)});
        }
    }
    const int64_t all = (int64_t)chunks.size();
    std::vector<double> square(all);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < all; c++) square[c] = square_of(chunks[c].at, chunks[c].count);
    double sum = 0.0;
    for (const double part : square) sum += part;
    const double norm = sqrt(sum);
    const float scale = (float)(limit / (norm + 1e-6));
    if (isfinite(norm) && scale < 1.0f) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t c = 0; c < all; c++) {
            for (int64_t j = 0; j < chunks[c].count; j++) chunks[c].at[j] *= scale;
        }
    }
    return norm;
}

}  // namespace ISA
}  // namespace reasonrl
