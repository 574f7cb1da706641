// Heads of packed tokens that are normed before they are turned, and the gradient of that norm:
//
//   q, k = turn(w n),  n = x / sqrt(mean(x^2) + eps) in the heads' type;  v as it is
//   dx = r (w g - n mean(w g n)),  dw = sum over tokens and heads of g n,  r = 1 / rms
//
// Tokens are divided into SHARES of which each has a sum of its own, whatever the threads.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "rotary.h"
#include "share.h"

namespace reasonrl {
namespace ISA {
namespace {

// What one thread needs for a head.
struct Head {
    const HeadsTask& t;
    std::vector<float> x, n, rounded;

    explicit Head(const HeadsTask& task) : t(task), x(task.size), n(x), rounded(x) {}

    const float* weight(int64_t head) const { return head < t.heads ? t.q_norm : t.k_norm; }

    // n of a head; gives 1 / rms.
    float norm(int64_t at) {
        read_any(t.dtype, t.from, at, t.size, x.data());
        float square = 0.0f;
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < t.size; j++) square += x[j] * x[j];
        const float scale = 1.0f / sqrtf(square / (float)t.size + t.eps);
        for (int64_t j = 0; j < t.size; j++) n[j] = x[j] * scale;
        write_any(t.dtype, rounded.data(), 0, t.size, n.data());
        read_any(t.dtype, rounded.data(), 0, t.size, n.data());
        return scale;
    }
};

}  // namespace

void norm_heads(const HeadsTask& t, int threads) {
    const int64_t normed = t.heads + t.key_heads, all = normed + t.key_heads;
    const int64_t item = t.dtype == F32 ? 4 : 2;
#pragma omp parallel num_threads(threads)
    {
        Head head(t);
        Angles angle(t.size);
        const Share mine = share_of(t.tokens);
        for (int64_t token = mine.begin; token < mine.end; token++) {
            angle.read(t.angle_dtype, t.cos, t.sin, token);
            for (int64_t h = 0; h < normed; h++) {
                const int64_t at = (token * all + h) * t.size;
                head.norm(at);
                const float* w = head.weight(h);
                for (int64_t j = 0; j < t.size; j++) head.n[j] *= w[j];
                turn<false>(head.n.data(), angle);
                write_any(t.dtype, t.out, at, t.size, head.n.data());
            }
            const int64_t at = (token * all + normed) * t.size * item;
            memcpy((char*)t.out + at, (const char*)t.from + at, t.key_heads * t.size * item);
        }
    }
}

void norm_heads_grad(const HeadsTask& t, float* by_norms, int64_t shares, int threads) {
    const int64_t normed = t.heads + t.key_heads, all = normed + t.key_heads;
#pragma omp parallel num_threads(threads)
    {
        Head head(t);
        std::vector<float> g(t.size);
#pragma omp for schedule(static)
        for (int64_t share = 0; share < shares; share++) {
            float* sums = by_norms + share * 2 * t.size;
            std::fill(sums, sums + 2 * t.size, 0.0f);
            const Share mine = share_of(t.tokens, share, shares);
            for (int64_t i = mine.begin * normed; i < mine.end * normed; i++) {
                const int64_t h = i % normed, at = (i / normed * all + h) * t.size;
                const float scale = head.norm(at), *w = head.weight(h), *n = head.n.data();
                float *sum = sums + (h < t.heads ? 0 : t.size), mean = 0.0f;
                read_any(t.dtype, t.out, at, t.size, g.data());
                for (int64_t j = 0; j < t.size; j++) sum[j] += g[j] * n[j];
                for (int64_t j = 0; j < t.size; j++) g[j] *= w[j];
#pragma omp simd reduction(+ : mean)
                for (int64_t j = 0; j < t.size; j++) mean += g[j] * n[j];
                mean /= (float)t.size;
                for (int64_t j = 0; j < t.size; j++) g[j] = scale * (g[j] - n[j] * mean);
                write_any(t.dtype, t.out, at, t.size, g.data());
            }
        }
    }
}

}  // namespace ISA
}  // namespace reasonrl
