// Softmax over the places that a query sees, in place, and its gradient:
//
//   p = softmax(scaling s where seen),   ds = scaling p (dp - sum p dp)
//
// Rows of one query (a row of `sees`) stand together, so that it is read once for all heads. Sums
// are float32 in an order fixed by the width alone.
#include <vector>

#include "block.h"
#include "vector.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr float LOWEST = -87.0f;  // less is no weight

// Scores (in whole vectors) become weights; a seen one that is not finite makes them NaN.
INLINE void soften(float* row, const int32_t* seen, int64_t padded, float scaling) {
    Vec most = Vec{} - INFINITY, broken = {}, sum = {};
    for (int64_t j = 0; j < padded; j += LANES) {
        const VecI on = load_bits(seen + j);
        const Vec x = where(on, load(row + j) * scaling);
        broken += 0.0f * x;
        most = max_of(most, select(on, x, Vec{} - INFINITY));
        store(row + j, x);
    }
    float top = most[0];
    for (int k = 1; k < LANES; k++) top = max_of(top, most[k]);
    for (int64_t j = 0; j < padded; j += LANES) {
        const Vec x = load(row + j) - top;
        const VecI on = load_bits(seen + j) & (x > LOWEST);
        const Vec e = where(on, exp_of(min_of(max_of(x, Vec{} + LOWEST), Vec{})));
        store(row + j, e);
        sum += e;
    }
    const float share = 1.0f / (total_of(sum) + total_of(broken));
    for (int64_t j = 0; j < padded; j += LANES) store(row + j, load(row + j) * share);
}

template <int DTYPE>
void forward(const SoftmaxTask& t, int threads) {
    const int64_t padded = vectors(t.width), queries = t.batch * t.queries;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(padded);
        std::vector<int32_t> seen(padded);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < queries; i++) {
            const int64_t b = i / t.queries, r = i % t.queries;
            const uint8_t* sees = t.sees + (t.shared ? r : i) * t.width;
            for (int64_t j = 0; j < t.width; j++) seen[j] = sees[j] ? -1 : 0;
            for (int64_t h = 0; h < t.heads; h++) {
                const int64_t at = ((b * t.heads + h) * t.queries + r) * t.width;
                read<DTYPE>(t.weight, at, (int)t.width, row.data());
                soften(row.data(), seen.data(), padded, t.scaling);
                write<DTYPE>(t.weight, at, (int)t.width, row.data());
            }
        }
    }
}

template <int DTYPE>
void backward(const SoftmaxTask& t, const void* grad, void* out, int threads) {
    const int64_t padded = vectors(t.width), rows = t.batch * t.heads * t.queries;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> p(padded), g(padded);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            read<DTYPE>(t.weight, i * t.width, (int)t.width, p.data());
            read<DTYPE>(grad, i * t.width, (int)t.width, g.data());
            Vec sum = {};
            for (int64_t j = 0; j < padded; j += LANES) sum += load(&p[j]) * load(&g[j]);
            const float mean = total_of(sum);
            for (int64_t j = 0; j < padded; j += LANES) {
                store(&g[j], t.scaling * load(&p[j]) * (load(&g[j]) - mean));
            }
            write<DTYPE>(out, i * t.width, (int)t.width, g.data());
        }
    }
}

}  // namespace

void masked_softmax(const SoftmaxTask& task, int threads) {
    if (task.dtype == F32) forward<F32>(task, threads);
    if (task.dtype == BF16) forward<BF16>(task, threads);
    if (task.dtype == F16) forward<F16>(task, threads);
}

void masked_softmax_grad(const SoftmaxTask& task, const void* grad, void* out, int threads) {
    if (task.dtype == F32) backward<F32>(task, grad, out, threads);
    if (task.dtype == BF16) backward<BF16>(task, grad, out, threads);
    if (task.dtype == F16) backward<F16>(task, grad, out, threads);
}

}  // namespace ISA
}  // namespace reasonrl
