// R_t = worth_t + gamma R_next over unmasked tokens of one completion, worth = scale * x + shift.
//
// Neighbouring tokens lie in the lanes of a vector of doubles: a vector is scanned in log2(lanes)
// steps, and one number goes on to the next. Compiled once per instruction set.
#pragma once

#include "vector.h"

namespace reasonrl {
namespace {

struct Worth {
    double scale, shift;  // of a token's own reward
    double more;          // added to every unmasked token, outside of the return
};

constexpr int WIDE = LANES == 16 ? 8 : 4;
typedef double Wide __attribute__((vector_size(8 * WIDE)));
typedef float Narrow __attribute__((vector_size(4 * WIDE)));
typedef int64_t WideI __attribute__((vector_size(8 * WIDE)));

template <int BY, int... K>
INLINE Wide moved(Wide x, Wide outside, std::integer_sequence<int, K...>) {
    return REASONRL_SHUFFLE(WideI, x, outside,
                            (K + BY >= 0 && K + BY < WIDE ? K + BY : WIDE + K)...);
}

// Lane k of the result is lane k + BY of x, or where there is none lane k of `outside`.
template <int BY>
INLINE Wide moved(Wide x, Wide outside) {
    return moved<BY>(x, outside, std::make_integer_sequence<int, WIDE>());
}

INLINE double last_of(Wide x, int by) {
    return by < 0 ? x[0] : x[WIDE - 1];
}

// Takes in what each lane's neighbour STEP lanes before it (as the scan goes) has gathered.
template <int BY, int STEP>
INLINE void gather(Wide& x, Wide& factor) {
    x += factor * moved<-BY * STEP>(x, Wide{});
    factor *= moved<-BY * STEP>(factor, Wide{} + 1.0);
}

template <int BY>
INLINE void gather_all(Wide& x, Wide& factor) {
    gather<BY, 1>(x, factor);
    gather<BY, 2>(x, factor);
    if (WIDE == 8) gather<BY, 4>(x, factor);
}

// By name: some compilers convert eight numbers in two halves.
INLINE Wide widened(Narrow x) {
#if defined(__AVX512F__)
    return (Wide)_mm512_cvtps_pd((__m256)x);
#else
    return __builtin_convertvector(x, Wide);
#endif
}

INLINE Narrow narrowed(Wide x) {
#if defined(__AVX512F__)
    return (Narrow)_mm512_cvtpd_ps((__m512d)x);
#else
    return __builtin_convertvector(x, Narrow);
#endif
}

INLINE Wide load_wide(const float* from) {
    Narrow x;
    memcpy(&x, from, sizeof x);
    return widened(x);
}

INLINE Wide load_wide(const double* from) {
    Wide x;
    memcpy(&x, from, sizeof x);
    return x;
}

// All bits of a lane whose byte is not 0.
INLINE WideI load_wide_mask(const uint8_t* from) {
    uint64_t bytes = 0;
    memcpy(&bytes, from, WIDE);
    WideI x = WideI{} + (int64_t)bytes;
    for (int k = 0; k < WIDE; k++) x[k] &= (int64_t)(0xffull << 8 * k);
    return x != 0;
}

// One token: the return before it is `carry`.
template <class X>
INLINE double one_token(const X* in, bool on, int64_t i, double gamma, const Worth& worth,
                        double carry, float* out) {
    if (on) carry = worth.scale * in[i] + worth.shift + gamma * carry;
    out[i] = on ? (float)(carry + worth.more) : 0.0f;
    return carry;
}

// From the end (BY = -1), or from the start (BY = 1), which is the gradient of the former: n tokens
// from `first` on, entered by `carry`; returns the next one. Masked tokens pass it on undiscounted.
template <int BY, bool MASKED, class X>
double scan_of(const X* in, const uint8_t* mask, int64_t first, int64_t n, double gamma,
               const Worth& worth, double carry, float* out) {
    const Wide one = Wide{} + 1.0, discount = Wide{} + gamma;
    Wide unused = {}, powers = discount;
    gather_all<BY>(unused, powers);  // what the carry is worth in each lane where none is masked
    const double g2 = gamma * gamma, g4 = g2 * g2;
    int64_t at = 0;
    for (; at + WIDE <= n; at += WIDE) {
        const int64_t i = first + BY * at - (BY < 0 ? WIDE - 1 : 0);
        Wide x = load_wide(in + i) * worth.scale + worth.shift, factor = powers;
        WideI on;
        if (MASKED) {
            on = load_wide_mask(mask + i);
            x = (Wide)((WideI)x & on);
            factor = on ? discount : one;
            gather_all<BY>(x, factor);
        } else {
            x += gamma * moved<-BY>(x, Wide{});
            x += g2 * moved<-2 * BY>(x, Wide{});
            if (WIDE == 8) x += g4 * moved<-4 * BY>(x, Wide{});
        }
        Wide y = x + factor * carry;
        carry = last_of(x, BY) + last_of(factor, BY) * carry;
        y += worth.more;
        if (MASKED) y = (Wide)((WideI)y & on);
        const Narrow done = narrowed(y);
        memcpy(out + i, &done, sizeof done);
    }
    for (; at < n; at++) {
        const int64_t i = first + BY * at;
        carry = one_token(in, !MASKED || mask[i], i, gamma, worth, carry, out);
    }
    return carry;
}

template <int BY, class X>
double scan(const X* in, const uint8_t* mask, int64_t first, int64_t n, double gamma,
            const Worth& worth, double carry, float* out) {
    if (mask) return scan_of<BY, true>(in, mask, first, n, gamma, worth, carry, out);
    return scan_of<BY, false>(in, mask, first, n, gamma, worth, carry, out);
}

}  // namespace
}  // namespace reasonrl
