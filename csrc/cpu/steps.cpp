// Runs of neighbouring tokens of one step, with their sum or product: what is reduced of them is
// added up by segments.cpp. Compiled once per instruction set.
#include "scan.h"

namespace reasonrl {
namespace ISA {
namespace {

// Bit k: lane k is not 0.
INLINE uint64_t lanes_set(WideI x) {
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)x, (__m512i)x);
#elif defined(__AVX2__)
    return (uint64_t)_mm256_movemask_pd((__m256d)(x != 0));
#else
    uint64_t bits = 0;
    for (int k = 0; k < WIDE; k++) bits |= (uint64_t)(x[k] != 0) << k;
    return bits;
#endif
}

INLINE WideI load_steps(const int64_t* from) {
    WideI x;
    memcpy(&x, from, sizeof x);
    return x;
}

// Bit k: the token at + k is the last of its run. Of up to 64 tokens; n: of those before `stop`.
INLINE uint64_t last_bits(const int64_t* step, int64_t at, int64_t n, int64_t stop) {
    uint64_t bits = 0;
    int64_t k = 0;
    for (; k + WIDE <= n && at + k + WIDE < stop; k += WIDE) {
        bits |= lanes_set(load_steps(step + at + k) ^ load_steps(step + at + k + 1)) << k;
    }
    for (; k < n; k++) {
        const bool last = at + k + 1 == stop || step[at + k] != step[at + k + 1];
        bits |= (uint64_t)last << k;
    }
    return bits;
}

template <bool PRODUCT, int BY>
INLINE Wide folded(Wide x) {
    const Wide y = moved<BY>(x, Wide{} + (PRODUCT ? 1.0 : 0.0));
    return PRODUCT ? x * y : x + y;
}

template <int... K>
INLINE WideI numbered(std::integer_sequence<int, K...>) {
    return WideI{K...};
}

// Sum or product of n values, of which `room` may be read.
template <bool PRODUCT>
INLINE double together(const float* value, int64_t n, int64_t room) {
    const WideI number = numbered(std::make_integer_sequence<int, WIDE>());
    const Wide nothing = Wide{} + (PRODUCT ? 1.0 : 0.0);
    Wide all = nothing;
    double rest = nothing[0];
    int64_t k = 0;
    for (; k + WIDE <= n; k += WIDE) {
        const Wide x = load_wide(value + k);
        all = PRODUCT ? all * x : all + x;
    }
    if (k < n && k + WIDE <= room) {
        const Wide x = number < n - k ? load_wide(value + k) : nothing;
        all = PRODUCT ? all * x : all + x;
        k = n;
    }
    for (; k < n; k++) rest = PRODUCT ? rest * value[k] : rest + value[k];
    if (WIDE == 8) all = folded<PRODUCT, 4>(all);
    all = folded<PRODUCT, 1>(folded<PRODUCT, 2>(all));
    return PRODUCT ? all[0] * rest : all[0] + rest;
}

template <int WHAT>
int64_t list(const float* value, const int64_t* step, int64_t start, int64_t stop, Run* out,
             bool* ascending) {
    int64_t count = 0, before = -1, first = start;
    bool rises = true;
    for (int64_t at = start; at < stop; at += 64) {
        const int64_t n = stop - at < 64 ? stop - at : 64;
        for (uint64_t bits = last_bits(step, at, n, stop); bits; bits &= bits - 1) {
            const int64_t end = at + __builtin_ctzll(bits) + 1, own = step[first];
            Run& run = out[count];
            run.step = own, run.tokens = end - first, run.end = end;
            if (WHAT != RUN_ENDS) {
                run.value = together<WHAT == RUN_PRODUCT>(value + first, end - first, stop - first);
            }
            first = end;
            if (own < 0) continue;
            rises = rises & (own > before);
            before = own;
            count++;
        }
    }
    *ascending = rises;
    return count;
}

}  // namespace

// How many there are; `ascending`: their steps ascend, so no step has two.
int64_t list_runs(const float* value, const int64_t* step, int64_t start, int64_t stop, int what,
                  Run* out, bool* ascending) {
    if (what == RUN_PRODUCT) return list<RUN_PRODUCT>(value, step, start, stop, out, ascending);
    if (what == RUN_ENDS) return list<RUN_ENDS>(value, step, start, stop, out, ascending);
    return list<RUN_SUM>(value, step, start, stop, out, ascending);
}

}  // namespace ISA
}  // namespace reasonrl
