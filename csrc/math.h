// The maths of every loss family, once, for C++ and CUDA alike (and for the .cu sources run on a
// CPU).
//
// d = logp - old (or its mean over the completion), rho = exp(d), A the advantage, r = ref - logp.
// A "term" is one token's loss and its derivative, before the mask and the normaliser.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define MATH __host__ __device__ inline
#define DEVICE_MATH 1
#else
#define MATH static inline __attribute__((always_inline))
#endif

namespace reasonrl {

enum Ratio { TOKEN, SEQUENCE, SEQUENCE_TOKEN };
enum Surrogate { CLIP, CISPO, SAPO, GMPO, REINFORCE };
enum Kl { K1, K2, K3 };

// The numbers of a LossSpec. An option that is off holds a value that never acts.
struct Loss {
    int ratio;
    int surrogate;
    int kl;
    float low, high;    // bounds: 1 - clip_low, 1 + clip_high; gmpo: -clip_low, clip_high on d
    float delta, dual;  // infinity where off
    float kl_coef, entropy_coef;
    float sapo_pos, sapo_neg;
};

// Sums over unmasked tokens, from which the loss and all metrics follow.
enum Sum {
    SUM_LOSS,
    SUM_LOW,
    SUM_HIGH,
    SUM_CUT,
    SUM_KL,
    SUM_RATIO,
    SUM_RATIO_MAX,
    SUM_TOKENS,
    SUM_NONFINITE,
    SUM_ACTIVE,
    SUM_COUNT
};

struct Term {
    float loss;
    float grad;  // dloss / dd, or dloss / dlogp where no ratio is differentiated
    float ratio;
    float low, high, cut;  // 1 where the token counts as clipped so
};

constexpr float EXPONENT_LIMIT = 20.0f;

MATH float min_of(float a, float b) {
    return a < b ? a : b;
}
MATH float max_of(float a, float b) {
    return a > b ? a : b;
}
MATH float clamp_to(float x, float low, float high) {
    return min_of(max_of(x, low), high);
}
MATH bool is_finite(float x) {
    return fabsf(x) <= 3.402823466e38f;
}

// exp for |x| <= 87, one rounding away from exact; exp(0) is 1 to the bit. Vectorises on the CPU.
MATH float exp_of(float x) {
#ifdef DEVICE_MATH
    return expf(x);
#else
    x = clamp_to(x, -87.0f, 87.0f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    // Estrin's order: half the latency of Horner's
    const float r2 = r * r;
    const float high =
        (1.9875691500e-4f * r + 1.3981999507e-3f) * r2 + (8.3334519073e-3f * r + 4.1665795894e-2f);
    const float p = high * r2 + (1.6666665459e-1f * r + 5.0000001201e-1f);
    const float y = (p * r2 + r) + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4b400000 + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return y * scale;
#endif
}

MATH float sigmoid(float x) {
    const float e = exp_of(-min_of(fabsf(x), 80.0f));
    const float tail = e / (1.0f + e);
    return x >= 0.0f ? 1.0f - tail : tail;
}

// k3 and its derivative by logp. exp(r) - r - 1 cancels near 0, where the series takes over.
MATH float kl_term(int kl, float r, float* grad) {
    const float x = clamp_to(r, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const float e = exp_of(x);
    const float r2 = r * r;
    const float high =
        (1.0f / 5040.0f * r + 1.0f / 720.0f) * r2 + (1.0f / 120.0f * r + 1.0f / 24.0f);
    const float series = (high * r2 + (1.0f / 6.0f * r + 0.5f)) * r2;
    const bool near = fabsf(r) < 0.3f;
    const float k3 = near ? series : e - r - 1.0f;
    const float far_grad = x == r ? 1.0f - e : 1.0f;
    const float k3_grad = near ? -(r + series) : far_grad;
    *grad = kl == K1 ? 1.0f : (kl == K2 ? -r : k3_grad);
    return kl == K1 ? -r : (kl == K2 ? 0.5f * r * r : k3);
}

// -min(min(rho, delta) A, clip(rho) A), at most dual |A| where A < 0; ties take the first branch.
MATH Term clip_term(const Loss& s, float d, float advantage) {
    const float x = clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const float rho = exp_of(x);
    const float capped = min_of(rho, s.delta);
    const float clipped = clamp_to(rho, s.low, s.high);
    const bool up = advantage > 0.0f, down = advantage < 0.0f;
    const bool first = (up & (capped <= clipped)) | (down & (capped >= clipped)) | !(up | down);
    const float used = first ? capped : clipped;
    const bool dual = down & (used > s.dual);
    const bool over = rho > s.delta;
    const bool live = first & !dual & !over & (x == d);
    Term t;
    t.loss = -(dual ? s.dual : used) * advantage;
    t.grad = live ? -rho * advantage : 0.0f;
    t.ratio = rho;
    t.low = down & (rho < s.low) ? 1.0f : 0.0f;
    t.high = up & (rho > s.high) ? 1.0f : 0.0f;
    t.cut = dual | (down & over) ? 1.0f : 0.0f;
    return t;
}

// -sg(min(rho, 1 + clip_high)) A logp
MATH Term cispo_term(const Loss& s, float d, float logp, float advantage) {
    const float rho = exp_of(clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT));
    Term t;
    t.grad = -min_of(rho, s.high) * advantage;
    t.loss = t.grad * logp;
    t.ratio = rho;
    t.low = t.cut = 0.0f;
    t.high = (advantage > 0.0f) & (rho > s.high) ? 1.0f : 0.0f;
    return t;
}

// -(4/t) sigmoid(t (rho - 1)) A
MATH Term sapo_term(const Loss& s, float d, float advantage) {
    const float x = clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const float rho = exp_of(x);
    const float slope = advantage > 0.0f ? s.sapo_pos : s.sapo_neg;
    const float z = slope * (rho - 1.0f);
    const float up = sigmoid(z), down = sigmoid(-z);
    Term t;
    t.loss = -4.0f / slope * up * advantage;
    t.grad = x == d ? -4.0f * up * down * rho * advantage : 0.0f;
    t.ratio = rho;
    t.low = t.high = t.cut = 0.0f;
    return t;
}

// -A logp; the ratio is reported only
MATH Term reinforce_term(float d, float logp, float advantage) {
    Term t;
    t.grad = -advantage;
    t.loss = t.grad * logp;
    t.ratio = exp_of(clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT));
    t.low = t.high = t.cut = 0.0f;
    return t;
}

// One token of gmpo: `loss` holds l_t, `grad` whether d_t is inside its bound (and A_t is not 0).
MATH Term gmpo_term(const Loss& s, float d, float advantage) {
    const float clipped = clamp_to(d, s.low, s.high);
    const bool up = advantage > 0.0f, down = advantage < 0.0f;
    const bool first = (up & (d <= clipped)) | (down & (d >= clipped));
    Term t;
    t.loss = first ? d : (up | down ? clipped : 0.0f);
    t.grad = first ? 1.0f : 0.0f;
    t.ratio = t.cut = 0.0f;
    t.low = down & (d < s.low) ? 1.0f : 0.0f;
    t.high = up & (d > s.high) ? 1.0f : 0.0f;
    return t;
}

MATH Term surrogate_term(const Loss& s, int surrogate, float d, float logp, float advantage) {
    if (surrogate == CISPO) return cispo_term(s, d, logp, advantage);
    if (surrogate == SAPO) return sapo_term(s, d, advantage);
    if (surrogate == REINFORCE) return reinforce_term(d, logp, advantage);
    return clip_term(s, d, advantage);
}

// Online log-sum-exp: m the maximum, s = sum e^(x - m), q = sum e^(x - m) (x - m).
struct LogSumExp {
    float m;
    double s, q;
};

MATH LogSumExp merge(LogSumExp a, LogSumExp b) {
    if (b.s == 0.0) return a;
    if (a.s == 0.0) return b;
    LogSumExp out;
    out.m = max_of(a.m, b.m);
    const double shift_a = (double)a.m - out.m, shift_b = (double)b.m - out.m;
    const double scale_a = exp(shift_a), scale_b = exp(shift_b);
    out.s = a.s * scale_a + b.s * scale_b;
    out.q = (a.q + shift_a * a.s) * scale_a + (b.q + shift_b * b.s) * scale_b;
    return out;
}

}  // namespace reasonrl
