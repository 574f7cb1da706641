// log p of the target and the entropy from logits, and their gradient, one row at a time.
//
//   s = softcap tanh(u / softcap) / tau,  L = log sum e^s,  logp = s_y - L,  H = L - sum p s
//   dlogit_v = [c (1[v = y] - p_v) - h p_v (log p_v + H)] (1 - tanh^2) / tau,  c = dlogp, h = dH
//
// Forward reads a row once; backward reads it once and writes it once, in place if asked.
#include "block.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr float LOWEST = -104.0f;  // e^LOWEST is 0 in float32; keeps 0 * -inf out of the sums

// tanh and 1 - tanh^2, both without cancellation
inline float tanh_of(float x, float* slope) {
    const float a = fabsf(x);
    const float e = exp_of(-2.0f * min_of(a, 40.0f));
    const float y = -2.0f * a;
    float series = 1.0f / 5040.0f;
    series = series * y + 1.0f / 720.0f;
    series = series * y + 1.0f / 120.0f;
    series = series * y + 1.0f / 24.0f;
    series = series * y + 1.0f / 6.0f;
    series = series * y + 0.5f;
    series = (series * y + 1.0f) * y;
    const float minus = a < 0.3f ? -series : 1.0f - e;
    const float t = minus / (1.0f + e);
    *slope = 4.0f * e / ((1.0f + e) * (1.0f + e));
    return x != x ? x : (x < 0.0f ? -t : t);
}

// Scores of one block in place; `slope` (may be null) receives ds/du under a softcap: without one
// it is 1 / tau.
inline void score(const Logits& logits, int n, float* __restrict u, float* __restrict slope) {
    const float tau = logits.temperature, cap = logits.softcap;
    if (cap > 0.0f) {
        float unused[BLOCK];
        float* __restrict grad = slope ? slope : unused;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            u[j] = cap * tanh_of(u[j] / cap, &grad[j]) / tau;
            grad[j] /= tau;
        }
        return;
    }
    if (tau != 1.0f) {
#pragma omp simd
        for (int j = 0; j < n; j++) u[j] = u[j] / tau;
    }
}

// The scores of n logits: where they lie, if nothing is to be done to them, else in `u`. The next
// block is called for meanwhile.
template <int DTYPE>
inline const float* scores(const Logits& logits, int64_t at, int n, float* u, float* slope) {
    const int width = DTYPE == F32 ? 4 : 2;
    const char* next = (const char*)logits.data + (at + n) * width;
    for (int k = 0; k < n * width; k += 64) __builtin_prefetch(next + k);
    if (DTYPE == F32 && logits.temperature == 1.0f && !(logits.softcap > 0.0f)) {
        return (const float*)logits.data + at;
    }
    read<DTYPE>(logits.data, at, n, u);
    score(logits, n, u, slope);
    return u;
}

template <int DTYPE>
LogSumExp row_sums(const Logits& logits, int64_t row, bool* broken) {
    LogSumExp total = {-INFINITY, 0.0, 0.0};
    int bad = 0;
    float buffer[BLOCK];
    for (int64_t at = 0; at < logits.vocab; at += BLOCK) {
        const int n = (int)(logits.vocab - at < BLOCK ? logits.vocab - at : BLOCK);
        const float* __restrict u =
            scores<DTYPE>(logits, row * logits.vocab + at, n, buffer, nullptr);
        float top = -INFINITY;
#pragma omp simd reduction(max : top) reduction(+ : bad)
        for (int j = 0; j < n; j++) {
            top = u[j] > top ? u[j] : top;
            bad += u[j] < INFINITY ? 0 : 1;
        }
        if (bad || top == -INFINITY) continue;
        const float m = top > total.m ? top : total.m;
        float s = 0.0f, q = 0.0f;
#pragma omp simd reduction(+ : s, q)
        for (int j = 0; j < n; j++) {
            const float x = max_of(u[j] - m, LOWEST);
            const float e = x < -87.0f ? 0.0f : exp_of(x);
            s += e;
            q += e * x;
        }
        total = merge(total, LogSumExp{m, s, q});
    }
    *broken = bad != 0;
    return total;
}

template <int DTYPE>
float score_at(const Logits& logits, int64_t row, int64_t column, float* slope) {
    float u;
    read<DTYPE>(logits.data, row * logits.vocab + column, 1, &u);
    score(logits, 1, &u, slope);
    return u;
}

template <int DTYPE>
void forward(const Logits& logits, const int64_t* target, float* logp, float* entropy,
             RowStats* stats, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < logits.rows; row++) {
        bool broken;
        const LogSumExp sum = row_sums<DTYPE>(logits, row, &broken);
        const double log_sum = log(sum.s);
        const double h = log_sum - sum.q / sum.s;
        const float taken = score_at<DTYPE>(logits, row, target[row], nullptr);
        const bool lost = broken || sum.s == 0.0;
        logp[row] = lost ? NAN : (float)((double)taken - sum.m - log_sum);
        if (entropy) entropy[row] = lost ? NAN : (float)h;
        if (stats) stats[row] = {lost ? NAN : sum.m, (float)log_sum, (float)h};
    }
}

template <int DTYPE>
void row_grad(const Logits& logits, const RowStats& stats, int64_t row, int64_t target, float c,
              float h, void* out, int64_t out_row) {
    const bool capped = logits.softcap > 0.0f;
    const float flat = capped ? 1.0f : 1.0f / logits.temperature, c1 = c * flat, h1 = h * flat;
    const float top = stats.max, log_sum = stats.log_sum, whole = stats.entropy;
    float buffer[BLOCK], slope[BLOCK], made[BLOCK], target_slope = flat;
    const bool here = target >= 0;  // else its word stands in another part of the vocabulary
    const float target_score = here ? score_at<DTYPE>(logits, row, target, &target_slope) : 0.0f;
    for (int64_t at = 0; at < logits.vocab; at += BLOCK) {
        const int n = (int)(logits.vocab - at < BLOCK ? logits.vocab - at : BLOCK);
        const float* u = scores<DTYPE>(logits, row * logits.vocab + at, n, buffer, slope);
        float* to = DTYPE == F32 ? (float*)out + out_row * logits.vocab + at : made;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            const float x = max_of(u[j] - top, LOWEST) - log_sum;
            const float p = x < -87.0f ? 0.0f : exp_of(x);
            to[j] = -p * (c1 + h1 * (x + whole));
        }
        for (int j = 0; capped && j < n; j++) to[j] *= slope[j];
        if (DTYPE != F32) write<DTYPE>(out, out_row * logits.vocab + at, n, made);
    }
    if (!here) return;
    const double log_p = (double)target_score - stats.max - stats.log_sum;
    const double p = exp(log_p), bonus = p > 0.0 ? h * p * (log_p + stats.entropy) : 0.0;
    const float at_target = (float)((-c * expm1(log_p) - bonus) * target_slope);
    write<DTYPE>(out, out_row * logits.vocab + target, 1, &at_target);
}

template <int DTYPE>
void backward(const Logits& logits, const RowStats* stats, const LogpGrad& grad, int threads) {
    const float nan = NAN;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < grad.out_rows; k++) {
        const int64_t row = grad.source ? grad.source[k] : k;
        const float c = grad.grad_logp ? grad.grad_logp[row] : 0.0f;
        const float h = grad.grad_entropy ? grad.grad_entropy[row] : 0.0f;
        const int width = DTYPE == F32 ? 4 : 2;
        char* out = (char*)grad.out + k * logits.vocab * width;
        if (c == 0.0f && h == 0.0f) {
            memset(out, 0, (size_t)logits.vocab * width);
        } else if (stats[row].max != stats[row].max) {
            for (int64_t v = 0; v < logits.vocab; v++) write<DTYPE>(out, v, 1, &nan);
        } else {
            row_grad<DTYPE>(logits, stats[row], row, grad.target[row], c, h, grad.out, k);
        }
    }
}

}  // namespace

void logp_forward(const Logits& logits, const int64_t* target, float* logp, float* entropy,
                  RowStats* stats, int threads) {
    if (logits.dtype == F32) forward<F32>(logits, target, logp, entropy, stats, threads);
    if (logits.dtype == BF16) forward<BF16>(logits, target, logp, entropy, stats, threads);
    if (logits.dtype == F16) forward<F16>(logits, target, logp, entropy, stats, threads);
}

void logp_backward(const Logits& logits, const RowStats* stats, const LogpGrad& grad, int threads) {
    if (logits.dtype == F32) backward<F32>(logits, stats, grad, threads);
    if (logits.dtype == BF16) backward<BF16>(logits, stats, grad, threads);
    if (logits.dtype == F16) backward<F16>(logits, stats, grad, threads);
}

void add_bf16(float* sum, const uint16_t* part, int64_t n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) sum[i] += from_bf16(part[i]);
}

}  // namespace ISA
}  // namespace reasonrl
