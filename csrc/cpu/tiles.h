// Products of operands that fit a cache, C (+)= A B, out of 32-bit words: a float32 each, or (DOTS)
// two neighbouring bf16 along the inner side, by the instruction that adds the product of a pair.
//
//   A  rows of words, any way apart
//   B  a row for every word of A's, a column for every lane: whole vectors
//
// Each result is summed over the inner side in one order, whatever stands beside it.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "product.h"

namespace reasonrl {
namespace {

constexpr int HIGH = TILE;  // rows of A that share a pass over B
constexpr int WIDE = 3;     // vectors of B that do

// Numbers of the inner side in a word.
template <bool DOTS>
constexpr int64_t EACH = DOTS ? 2 : 1;

struct Words {
    uint32_t* at;
    int64_t apart;  // from row to row

    INLINE uint32_t* row(int64_t i) const { return at + i * apart; }
    INLINE float* floats(int64_t i) const { return (float*)row(i); }
};

// Memory for words, aligned to vectors, with a vector behind it.
class Store {
  public:
    Words words(int64_t rows, int64_t apart) {
        parts_.emplace_back(new uint32_t[rows * apart + 32]);
        const uintptr_t at = (uintptr_t)parts_.back().get();
        return {(uint32_t*)((at + 63) / 64 * 64), apart};
    }

  private:
    std::vector<std::unique_ptr<uint32_t[]>> parts_;
};

// Words of A and B up to `end`, for vectors from `first` on; the next one ends STAIR words later.
#define REASONRL_STEPS(first, step)                                                  \
    for (; k < end; k++) {                                                           \
        VecU w[V];                                                                   \
        for (int v = first; v < V; v++) w[v] = load_words(b.row(k) + v * LANES);     \
        _Pragma("GCC unroll 8") for (int r = 0; r < HIGH; r++) {                     \
            const uint32_t word = a.row(r)[k];                                       \
            for (int v = first; v < V; v++) sum[r][v] = step(sum[r][v], word, w[v]); \
        }                                                                            \
    }                                                                                \
    end = end + STAIR < last ? end + STAIR : last;

// (HIGH, V vectors) of C from `end` words of A; later vectors go on to `last`.
#define REASONRL_TILE(where, name, each, step)                                        \
    template <int V>                                                                  \
    where void name(Words a, Words b, int64_t end, int64_t last, Words c, bool add) { \
        constexpr int64_t STAIR = LANES / each;                                       \
        Vec sum[HIGH][V];                                                             \
        _Pragma("GCC unroll 8") for (int r = 0; r < HIGH; r++) {                      \
            for (int v = 0; v < V; v++) {                                             \
                sum[r][v] = add ? load(c.floats(r) + v * LANES) : Vec{};              \
            }                                                                         \
        }                                                                             \
        int64_t k = 0;                                                                \
        REASONRL_STEPS(0, step)                                                       \
        REASONRL_STEPS(1, step)                                                       \
        REASONRL_STEPS(2, step)                                                       \
        _Pragma("GCC unroll 8") for (int r = 0; r < HIGH; r++) {                      \
            for (int v = 0; v < V; v++) store(c.floats(r) + v * LANES, sum[r][v]);    \
        }                                                                             \
    }

#define REASONRL_PAIRS __attribute__((target("avx512f,avx512bf16")))
#define REASONRL_STEP(sum, word, w) (sum + from_bits(word) * (Vec)w)
#define REASONRL_DOTS(sum, word, w) \
    (Vec) _mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)word), (__m512bh)w)

REASONRL_TILE(, tile_of_floats, 1, REASONRL_STEP)
#ifdef __AVX512F__
REASONRL_TILE(REASONRL_PAIRS, tile_of_pairs, 2, REASONRL_DOTS)
#endif

template <bool DOTS, int V>
INLINE void tile(Words a, Words b, int64_t steps, int64_t last, Words c, bool add) {
#ifdef __AVX512F__
    if (DOTS) return tile_of_pairs<V>(a, b, steps, last, c, add);
#endif
    tile_of_floats<V>(a, b, steps, last, c, add);
}

// C (+)= A B: `rows` and `columns` whole tiles and vectors, `steps` words of A's rows. A column
// takes one number more than the one before it, in whole vectors, until it has `last` words.
template <bool DOTS>
void multiply_small(Words a, Words b, int64_t rows, int64_t columns, int64_t steps, int64_t last,
                    Words c, bool add) {
    for (int64_t j = 0; j < columns; j += WIDE * LANES) {
        const Words from = {b.at + j, b.apart};
        const int64_t left = (columns - j) / LANES;
        const int64_t here = std::min<int64_t>(last, steps + j / EACH<DOTS>);
        for (int64_t i = 0; i < rows; i += HIGH) {
            const Words x = {a.row(i), a.apart}, y = {c.row(i) + j, c.apart};
            if (left >= 3) tile<DOTS, 3>(x, from, here, last, y, add);
            if (left == 2) tile<DOTS, 2>(x, from, here, last, y, add);
            if (left == 1) tile<DOTS, 1>(x, from, here, last, y, add);
        }
    }
}

// A square of LANES words, its sides exchanged.
INLINE void turn_square(Words from, Words to) {
#ifdef __AVX512F__
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(from.row(i));
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int k = 0; k < 2; k++) {
            x[i + 2 * k] = _mm512_unpacklo_epi64(y[i + k], y[i + k + 2]);
            x[i + 2 * k + 1] = _mm512_unpackhi_epi64(y[i + k], y[i + k + 2]);
        }
    }
    for (int i = 0; i < 4; i++) {  // x[4 g + i]: columns i, i + 4, ... of rows 4 g .. 4 g + 3
        const __m512i low = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
        _mm512_storeu_si512(to.row(i), _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(to.row(4 + i), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(to.row(8 + i), _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(to.row(12 + i), _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
#else
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < LANES; j++) to.row(j)[i] = from.row(i)[j];
    }
#endif
}

// Rows of words become columns; both counts are taken up to whole vectors.
inline void turn_words(Words from, int64_t rows, int64_t columns, Words to) {
    for (int64_t i = 0; i < rows; i += LANES) {
        for (int64_t j = 0; j < columns; j += LANES) {
            turn_square({from.row(i) + j, from.apart}, {to.row(j) + i, to.apart});
        }
    }
}

// What B has of rows that A has: a word a column, of one row or (DOTS) of two. `rows` is even.
template <bool DOTS>
void pair_rows(Words from, int64_t rows, int64_t columns, Words to) {
    for (int64_t i = 0; i < rows / EACH<DOTS>; i++) {
        for (int64_t j = 0; j < columns; j += LANES) {
            VecU word;
            if (DOTS) {
                const uint16_t *a = (const uint16_t*)from.row(2 * i), *b = a + 2 * from.apart;
                word = (VecU)load_bf16(a + j) >> 16 | (VecU)load_bf16(b + j);
            } else {
                word = load_words(from.row(i) + j);
            }
            memcpy(to.row(i) + j, &word, sizeof word);
        }
    }
}

// Two rows of numbers as the words that A has of them, `EACH` of a row each, and that B has, a word
// a column; rounded.
template <bool DOTS>
INLINE void give_pair(int dtype, Vec x, Vec y, uint32_t* x_row, uint32_t* y_row, uint32_t* under,
                      int64_t apart) {
    if (DOTS) {
        const VecH a = quick(x), b = quick(y);
        const VecU both = __builtin_convertvector(a, VecU) | __builtin_convertvector(b, VecU) << 16;
        if (x_row) memcpy(x_row, &a, sizeof a), memcpy(y_row, &b, sizeof b);
        if (under) memcpy(under, &both, sizeof both);
        return;
    }
    x = dtype == BF16 ? as<BF16>(x) : dtype == F16 ? as<F16>(x) : x;
    y = dtype == BF16 ? as<BF16>(y) : dtype == F16 ? as<F16>(y) : y;
    if (x_row) store((float*)x_row, x), store((float*)y_row, y);
    if (under) store((float*)under, x), store((float*)under + apart, y);
}

}  // namespace
}  // namespace reasonrl
