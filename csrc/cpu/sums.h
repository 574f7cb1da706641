// Sums of kept values, each times its weight: what ends attention.
//
// A place has a row of whole vectors, its weight is float32. Where pairs of bf16 are multiplied
// (QUICK), two places share a row of words, the first in the lower halves, and weights are bf16. A
// sum goes on place after place, or pair after pair, whatever other rows stand beside it.
#pragma once

#include "product.h"
#include "weights.h"

namespace reasonrl {
namespace {

// (ROWS, VECS * LANES) sums go on by n weights of each row times as many rows of values, `apart`
// numbers wide: of the first's, or each of its own (OWN).
template <int DTYPE, int ROWS, int VECS, bool OWN>
void add_values(const void* const* weight, const void* const* value, int64_t at, int64_t n,
                int64_t apart, float* out) {
    Vec sum[ROWS][VECS], x[VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) sum[r][v] = load(out + r * apart + at + v * LANES);
    }
    for (int64_t j = 0; j < n; j++) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            for (int v = 0; v < VECS && (OWN || r == 0); v++) {
                x[v] = load_as<DTYPE>(value[r], j * apart + at + v * LANES);
            }
            for (int v = 0; v < VECS; v++) sum[r][v] += x[v] * ((const float*)weight[r])[j];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) store(out + r * apart + at + v * LANES, sum[r][v]);
    }
}

#ifdef __AVX512F__
// The same of pairs. Own places have zeros behind their last one, the shared ones anything.
template <int ROWS, int VECS, bool OWN>
__attribute__((target("avx512f,avx512bf16"))) void add_pairs(const void* const* weight,
                                                             const void* const* value, int64_t at,
                                                             int64_t n, int64_t apart, float* out) {
    Vec sum[ROWS][VECS];
    VecU x[VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) sum[r][v] = load(out + r * apart + at + v * LANES);
    }
    for (int64_t j = 0; j < n; j += 2) {
        const uint32_t seen = j + 1 < n ? 0xffffffffu : 0xffffu;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            for (int v = 0; v < VECS && (OWN || r == 0); v++) {
                x[v] = load_words((const uint32_t*)value[r] + j / 2 * apart + at + v * LANES);
                if (!OWN) x[v] &= seen;
            }
            const int both = (int)word_of((const uint16_t*)weight[r] + j);
            const __m512bh w = (__m512bh)_mm512_set1_epi32(both);
            for (int v = 0; v < VECS; v++) {
                sum[r][v] = (Vec)_mm512_dpbf16_ps((__m512)sum[r][v], w, (__m512bh)x[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) store(out + r * apart + at + v * LANES, sum[r][v]);
    }
}

// `count` numbers of bf16 into their halves of words; if `alone`, with zeros in the others.
INLINE void pair_up(const void* from, int64_t count, bool second, bool alone, void* to) {
    const __mmask32 mine = second ? 0xaaaaaaaau : alone ? 0xffffffffu : 0x55555555u;
    for (int64_t k = 0; k < count; k += LANES) {
        const VecU x = (VecU)load_bf16((const uint16_t*)from + k) >> (second ? 0 : 16);
        _mm512_mask_storeu_epi16((uint32_t*)to + k, mine, (__m512i)x);
    }
}
#else
INLINE void pair_up(const void*, int64_t, bool, bool, void*) {}
#endif

using AddValues = void (*)(const void* const* weight, const void* const* value, int64_t at,
                           int64_t n, int64_t apart, float* out);

// Of so many rows, at most FEW if OWN.
template <int DTYPE, int ROWS, int VECS, bool OWN>
constexpr AddValues adding() {
#ifdef __AVX512F__
    if (DTYPE == QUICK) return add_pairs<ROWS, VECS, OWN>;
#endif
    constexpr int KIND = DTYPE == QUICK ? BF16 : DTYPE;
    return add_values<KIND, ROWS, VECS, OWN>;
}

template <int DTYPE, int VECS, bool OWN>
AddValues add_values_of(int64_t rows) {
    static constexpr AddValues few[FEW] = {
        adding<DTYPE, 1, VECS, OWN>(), adding<DTYPE, 2, VECS, OWN>(), adding<DTYPE, 3, VECS, OWN>(),
        adding<DTYPE, 4, VECS, OWN>()};
    static constexpr AddValues more[4] = {
        adding<DTYPE, 5, VECS, false>(), adding<DTYPE, 6, VECS, false>(),
        adding<DTYPE, 7, VECS, false>(), adding<DTYPE, 8, VECS, false>()};
    return rows <= FEW ? few[rows - 1] : more[rows - 5];
}

}  // namespace
}  // namespace reasonrl
