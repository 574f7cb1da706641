// R_t = worth_t + gamma R_next over unmasked tokens of one completion, worth = scale * x + shift.
//
// Compiled once per instruction set: include it inside of a namespace of its own.
#pragma once

#include <stdint.h>
#include <string.h>

namespace reasonrl {
namespace {

// x where it counts, 0 elsewhere: by its bits, without a branch, whatever it holds
inline double counted(double x, bool on) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    bits &= 0ull - (uint64_t)on;
    memcpy(&x, &bits, 8);
    return x;
}

struct Worth {
    double scale, shift;  // of a token's own reward
    double more;          // added to every unmasked token, outside of the return
};

typedef double Four __attribute__((vector_size(32)));
typedef float FourF __attribute__((vector_size(16)));
typedef int64_t FourI __attribute__((vector_size(32)));

#ifdef __clang__
#define REASONRL_LANES(x, a, b, c, d) __builtin_shufflevector(x, Four{}, a, b, c, d)
#else
#define REASONRL_LANES(x, a, b, c, d) __builtin_shuffle(x, Four{}, FourI{a, b, c, d})
#endif

// What four neighbours are to each other: each takes in those that the scan meets before it.
template <int BY>
inline Four within(Four x, double gamma) {
    const double square = gamma * gamma;
    if (BY < 0) {  // from the highest lane down; 4 and above are zeros
        x += gamma * REASONRL_LANES(x, 1, 2, 3, 4);
        return x + square * REASONRL_LANES(x, 2, 3, 4, 5);
    }
    x += gamma * REASONRL_LANES(x, 4, 0, 1, 2);
    return x + square * REASONRL_LANES(x, 4, 5, 0, 1);
}

// Sixteen tokens at a time where every token discounts alike: four scans of four side by side, then
// one short chain of carries. Reads and writes n tokens from `first` on.
template <int BY, bool MASKED>
double scan_even(const float* in, const uint8_t* mask, int64_t first, int64_t n, double gamma,
                 const Worth& worth, double carry, float* out) {
    constexpr int GROUPS = 4, TILE = 4 * GROUPS;
    const double g2 = gamma * gamma, g4 = g2 * g2;
    const Four powers = BY < 0 ? Four{g4, g2 * gamma, g2, gamma} : Four{gamma, g2, g2 * gamma, g4};
    int64_t at = 0;
    for (; at + TILE <= n; at += TILE) {
        Four x[GROUPS], entering[GROUPS];
        FourI on[GROUPS];
        for (int k = 0; k < GROUPS; k++) {
            const int64_t i = first + BY * (at + 4 * k) - (BY < 0 ? 3 : 0);
            FourF raw;
            memcpy(&raw, in + i, sizeof raw);
            x[k] = __builtin_convertvector(raw, Four) * worth.scale + worth.shift;
            if (MASKED) {
                on[k] = FourI{mask[i], mask[i + 1], mask[i + 2], mask[i + 3]} != 0;
                x[k] = (Four)((FourI)x[k] & on[k]);
            }
            x[k] = within<BY>(x[k], gamma);
        }
        Four c = {carry, carry, carry, carry};
        for (int k = 0; k < GROUPS; k++) {
            entering[k] = c;
            const Four last =
                BY < 0 ? REASONRL_LANES(x[k], 0, 0, 0, 0) : REASONRL_LANES(x[k], 3, 3, 3, 3);
            c = last + g4 * c;
        }
        carry = c[0];
        for (int k = 0; k < GROUPS; k++) {
            const int64_t i = first + BY * (at + 4 * k) - (BY < 0 ? 3 : 0);
            Four y = x[k] + powers * entering[k] + worth.more;
            if (MASKED) y = (Four)((FourI)y & on[k]);
            const FourF done = __builtin_convertvector(y, FourF);
            memcpy(out + i, &done, sizeof done);
        }
    }
    for (; at < n; at++) {
        const int64_t i = first + BY * at;
        const bool on = !MASKED || mask[i];
        carry = counted(worth.scale * in[i] + worth.shift, on) + gamma * carry;
        out[i] = (float)counted(carry + worth.more, on);
    }
    return carry;
}

// The same where masked tokens pass the return on undiscounted. A tile is LANES runs of RUN tokens
// side by side: as many independent chains hide the latency of one. The first sweep finds what each
// run does (R -> a R + b), the second has every run's carry.
template <int BY>
double scan_uneven(const float* in, const uint8_t* mask, int64_t first, int64_t n, double gamma,
                   const Worth& worth, double carry, float* out) {
    constexpr int LANES = 8, RUN = 32, TILE = LANES * RUN;
    const double by[2] = {1.0, gamma};
    const double scale = worth.scale, shift = worth.shift, more = worth.more;
    int64_t at = 0;
    for (; at + TILE <= n; at += TILE) {
        const int64_t base = first + BY * at;
        double a[LANES], b[LANES], entering[LANES];
        for (int lane = 0; lane < LANES; lane++) a[lane] = 1.0, b[lane] = 0.0;
        for (int k = 0; k < RUN; k++) {
            for (int lane = 0; lane < LANES; lane++) {
                const int64_t i = base + BY * (lane * RUN + k);
                const bool on = mask[i] != 0;
                b[lane] = counted(scale * in[i] + shift, on) + by[on] * b[lane];
                a[lane] *= by[on];
            }
        }
        for (int lane = 0; lane < LANES; lane++) {
            entering[lane] = carry;
            carry = a[lane] * carry + b[lane];
        }
        for (int k = 0; k < RUN; k++) {
            for (int lane = 0; lane < LANES; lane++) {
                const int64_t i = base + BY * (lane * RUN + k);
                const bool on = mask[i] != 0;
                entering[lane] = counted(scale * in[i] + shift, on) + by[on] * entering[lane];
                out[i] = (float)counted(entering[lane] + more, on);
            }
        }
        carry = entering[LANES - 1];
    }
    for (; at < n; at++) {
        const int64_t i = first + BY * at;
        const bool on = mask[i] != 0;
        carry = counted(scale * in[i] + shift, on) + by[on] * carry;
        out[i] = (float)counted(carry + more, on);
    }
    return carry;
}

// From the end (BY = -1), or from the start (BY = 1), which is the gradient of the former; entered
// by `carry`, returns the next one. `mask` may be null.
template <int BY>
double scan(const float* in, const uint8_t* mask, int64_t first, int64_t n, double gamma,
            const Worth& worth, double carry, float* out) {
    if (!mask) return scan_even<BY, false>(in, mask, first, n, gamma, worth, carry, out);
    if (gamma == 1.0) return scan_even<BY, true>(in, mask, first, n, gamma, worth, carry, out);
    return scan_uneven<BY>(in, mask, first, n, gamma, worth, carry, out);
}

}  // namespace
}  // namespace reasonrl
