// The maths of every loss family, once, for C++ and CUDA alike (and for the .cu sources run on a
// CPU).
//
// d = logp - old (or its mean over the completion), rho = exp(d), A the advantage, r = ref - logp.
// A "term" is one token's loss and its derivative, before the mask and the normaliser. F is one
// number, or on the CPU a vector of them, a token in each lane (cpu/vector.h).
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

template <class F>
struct Term {
    F loss;
    F grad;  // dloss / dd, or dloss / dlogp where no ratio is differentiated
    F ratio;
    F low, high, cut;  // 1 where the token counts as clipped so
};

constexpr float EXPONENT_LIMIT = 20.0f;

// What F < F gives, and integers of as many bits.
template <class F>
using Mask = decltype(F{} < F{});
template <class F>
struct Bits {
    using type = Mask<F>;
};
template <>
struct Bits<float> {
    using type = uint32_t;
};

template <class M, class F>
MATH F select(M m, F a, F b) {
    return m ? a : b;
}
template <class F>
MATH F all_of(float x) {
    return F{} + x;
}
template <class M, class F>
MATH F one_where(M m, F like) {
    return select(m, all_of<F>(1.0f), F{});
}
template <class F>
MATH F min_of(F a, F b) {
    return a < b ? a : b;
}
template <class F>
MATH F max_of(F a, F b) {
    return a > b ? a : b;
}
template <class F>
MATH F clamp_to(F x, float low, float high) {
    return min_of(max_of(x, all_of<F>(low)), all_of<F>(high));
}
MATH bool is_finite(float x) {
    return fabsf(x) <= 3.402823466e38f;
}

// e^x for |x| <= 87, one rounding away from exact (e^0 is 1 to the bit), with e^x - 1 and
// e^x - 1 - x, which do not cancel near 0.
template <class F>
struct Exponential {
    F e, less_one, beyond;
};

template <class F>
MATH Exponential<F> exponential(F x) {
    Exponential<F> out;
#ifdef DEVICE_MATH
    const F x2 = x * x;
    const F high = (1.0f / 5040.0f * x + 1.0f / 720.0f) * x2 + (1.0f / 120.0f * x + 1.0f / 24.0f);
    const F rest = (high * x2 + (1.0f / 6.0f * x + 0.5f)) * x2;
    const bool near = fabsf(x) < 0.3f;
    out.e = expf(x);
    out.less_one = near ? x + rest : out.e - 1.0f;
    out.beyond = near ? rest : out.e - x - 1.0f;
#else
    const float magic = 12582912.0f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
    const F shifted = x * 1.44269504f + magic;
    const F n = shifted - magic;
    const F f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    // Estrin's order: half the latency of Horner's
    const F f2 = f * f;
    const F high =
        (1.9875691500e-4f * f + 1.3981999507e-3f) * f2 + (8.3334519073e-3f * f + 4.1665795894e-2f);
    const F rest = (high * f2 + (1.6666665459e-1f * f + 5.0000001201e-1f)) * f2;
    const F low = rest + f, y = low + 1.0f;
    typename Bits<F>::type exponent, bits;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&bits, &y, sizeof bits);
    bits += exponent << 23;  // y 2^n
    memcpy(&out.e, &bits, sizeof bits);
    const auto near = n == 0.0f;
    out.less_one = select(near, low, out.e - 1.0f);
    out.beyond = select(near, rest, out.less_one - x);
#endif
    return out;
}

template <class F>
MATH F exp_of(F x) {
#ifdef DEVICE_MATH
    return expf(x);
#else
    return exponential(x).e;
#endif
}

template <class F>
MATH F sigmoid(F x) {
    const F e = exp_of(-min_of(max_of(x, -x), all_of<F>(80.0f)));
    const F tail = e / (1.0f + e);
    return select(x >= 0.0f, 1.0f - tail, tail);
}

// A KL term of r = ref - logp, and its derivative by logp.
template <class F>
MATH F kl_term(int kl, F r, F* grad) {
    const F x = clamp_to(r, -EXPONENT_LIMIT, EXPONENT_LIMIT), one = all_of<F>(1.0f);
    const Exponential<F> by = exponential(x);
    const F k3_grad = select(x == r, -by.less_one, one);
    *grad = kl == K1 ? one : (kl == K2 ? -r : k3_grad);
    return kl == K1 ? -r : (kl == K2 ? 0.5f * r * r : by.beyond + (x - r));
}

// -min(min(rho, delta) A, clip(rho) A), at most dual |A| where A < 0; ties take the first branch.
// Where the value used is rho itself, the gradient is the loss; delta is not below `high`.
template <class F>
MATH Term<F> clip_term(const Loss& s, F d, F advantage) {
    const F x = clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const F rho = exp_of(x);
    const F capped = min_of(rho, all_of<F>(s.delta));
    const F clipped = clamp_to(rho, s.low, s.high);
    const F lower = min_of(capped, clipped), upper = max_of(capped, clipped);
    const auto up = advantage > 0.0f, down = advantage < 0.0f;
    const F used = select(down, min_of(upper, all_of<F>(s.dual)), lower);
    Term<F> t;
    t.loss = -used * advantage;
    t.grad = select((used == rho) & (x == d), t.loss, F{});
    t.ratio = rho;
    t.low = one_where(down & (rho < s.low), rho);
    t.high = one_where(up & (rho > s.high), rho);
    t.cut = one_where(down & ((upper > s.dual) | (rho > s.delta)), rho);
    return t;
}

// -sg(min(rho, 1 + clip_high)) A logp
template <class F>
MATH Term<F> cispo_term(const Loss& s, F d, F logp, F advantage) {
    const F rho = exp_of(clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT));
    Term<F> t;
    t.grad = -min_of(rho, all_of<F>(s.high)) * advantage;
    t.loss = t.grad * logp;
    t.ratio = rho;
    t.low = t.cut = F{};
    t.high = one_where((advantage > 0.0f) & (rho > s.high), rho);
    return t;
}

// -(4/t) sigmoid(t (rho - 1)) A
template <class F>
MATH Term<F> sapo_term(const Loss& s, F d, F advantage) {
    const F x = clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const F rho = exp_of(x);
    const F slope = select(advantage > 0.0f, all_of<F>(s.sapo_pos), all_of<F>(s.sapo_neg));
    const F z = slope * (rho - 1.0f);
    const F up = sigmoid(z), down = sigmoid(-z);
    Term<F> t;
    t.loss = -4.0f / slope * up * advantage;
    t.grad = select(x == d, -4.0f * up * down * rho * advantage, F{});
    t.ratio = rho;
    t.low = t.high = t.cut = F{};
    return t;
}

// -A logp; the ratio is reported only
template <class F>
MATH Term<F> reinforce_term(F d, F logp, F advantage) {
    Term<F> t;
    t.grad = -advantage;
    t.loss = t.grad * logp;
    t.ratio = exp_of(clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT));
    t.low = t.high = t.cut = F{};
    return t;
}

// One token of gmpo: `loss` holds l_t, `grad` whether d_t is inside its bound (and A_t is not 0).
template <class F>
MATH Term<F> gmpo_term(const Loss& s, F d, F advantage) {
    const F clipped = clamp_to(d, s.low, s.high);
    const auto up = advantage > 0.0f, down = advantage < 0.0f;
    const auto first = (up & (d <= clipped)) | (down & (d >= clipped));
    Term<F> t;
    t.loss = select(first, d, select(up | down, clipped, F{}));
    t.grad = one_where(first, d);
    t.ratio = t.cut = F{};
    t.low = one_where(down & (d < s.low), d);
    t.high = one_where(up & (d > s.high), d);
    return t;
}

template <class F>
MATH Term<F> surrogate_term(const Loss& s, int surrogate, F d, F logp, F advantage) {
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
    if (a.m == b.m) return {a.m, a.s + b.s, a.q + b.q};
    LogSumExp out;
    out.m = max_of(a.m, b.m);
    const double shift_a = (double)a.m - out.m, shift_b = (double)b.m - out.m;
    const double scale_a = exp(shift_a), scale_b = exp(shift_b);
    out.s = a.s * scale_a + b.s * scale_b;
    out.q = (a.q + shift_a * a.s) * scale_a + (b.q + shift_b * b.s) * scale_b;
    return out;
}

}  // namespace reasonrl
