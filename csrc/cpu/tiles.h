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
    INLINE uint32_t operator()(int64_t i, int64_t k) const { return row(i)[k]; }
    INLINE Words from(int64_t k) const { return {at + k, apart}; }
};

// At most LANES rows side by side, a word followed by the next row's: columns need no turning.
struct Lying {
    const uint32_t* at;

    INLINE uint32_t operator()(int64_t i, int64_t k) const { return at[k * LANES + i]; }
    INLINE Lying from(int64_t k) const { return {at + k * LANES}; }
};

// So many numbers are read or written before long: lines that another core or nobody's cache has
// come meanwhile.
template <class T>
INLINE void soon(const T* from, int64_t count) {
    const char *at = (const char*)from, *end = (const char*)(from + count);
    for (; at < end; at += 64) __builtin_prefetch(at);
    __builtin_prefetch(end - 1);
}

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
            const uint32_t word = a(r, k);                                           \
            for (int v = first; v < V; v++) sum[r][v] = step(sum[r][v], word, w[v]); \
        }                                                                            \
    }                                                                                \
    end = end + STAIR < last ? end + STAIR : last;

// (HIGH, V vectors) of C from `end` words of A; later vectors go on to `last`. Each sum goes by
// put(row, vector, sum), from a register: a result that has ended is stored once.
#define REASONRL_TILE(where, name, each, step)                                             \
    template <int V, class A, class Put>                                                   \
    where void name(A a, Words b, int64_t end, int64_t last, Words c, bool add, Put put) { \
        constexpr int64_t STAIR = LANES / each;                                            \
        Vec sum[HIGH][V];                                                                  \
        _Pragma("GCC unroll 8") for (int r = 0; r < HIGH; r++) {                           \
            for (int v = 0; v < V; v++) {                                                  \
                sum[r][v] = add ? load(c.floats(r) + v * LANES) : Vec{};                   \
            }                                                                              \
        }                                                                                  \
        int64_t k = 0;                                                                     \
        REASONRL_STEPS(0, step)                                                            \
        REASONRL_STEPS(1, step)                                                            \
        REASONRL_STEPS(2, step)                                                            \
        _Pragma("GCC unroll 8") for (int r = 0; r < HIGH; r++) {                           \
            for (int v = 0; v < V; v++) put(r, v, sum[r][v]);                              \
        }                                                                                  \
    }

#define REASONRL_PAIRS __attribute__((target("avx512f,avx512bf16")))
#define REASONRL_STEP(sum, word, w) (sum + from_bits(word) * (Vec)w)
#define REASONRL_DOTS(sum, word, w) \
    (Vec) _mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)word), (__m512bh)w)

REASONRL_TILE(, tile_of_floats, 1, REASONRL_STEP)
#ifdef __AVX512F__
REASONRL_TILE(REASONRL_PAIRS, tile_of_pairs, 2, REASONRL_DOTS)
#endif

template <bool DOTS, int V, class A, class Put>
INLINE void tile(A a, Words b, int64_t steps, int64_t last, Words c, bool add, Put put) {
#ifdef __AVX512F__
    if (DOTS) return tile_of_pairs<V>(a, b, steps, last, c, add, put);
#endif
    tile_of_floats<V>(a, b, steps, last, c, add, put);
}

// The same of one to three vectors.
template <bool DOTS, class A, class Put>
INLINE void tile_of(int64_t wide, A a, Words b, int64_t steps, int64_t last, Words c, bool add,
                    Put put) {
    if (wide >= 3) tile<DOTS, 3>(a, b, steps, last, c, add, put);
    if (wide == 2) tile<DOTS, 2>(a, b, steps, last, c, add, put);
    if (wide == 1) tile<DOTS, 1>(a, b, steps, last, c, add, put);
}

template <bool DOTS, class A>
INLINE void tile_of(int64_t wide, A a, Words b, int64_t steps, int64_t last, Words c, bool add) {
    const auto put = [=](int r, int v, Vec x) INLINE_BODY { store(c.floats(r) + v * LANES, x); };
    tile_of<DOTS>(wide, a, b, steps, last, c, add, put);
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
            tile_of<DOTS>(left, x, from, here, last, y, add);
        }
    }
}

// A square of LANES words, take(row), its sides exchanged.
template <class Take>
INLINE void turn_square(Take take, Words to) {
#ifdef __AVX512F__
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = (__m512i)take(i);
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
        const VecU row = take(i);
        for (int j = 0; j < LANES; j++) to.row(j)[i] = row[j];
    }
#endif
}

INLINE void turn_square(Words from, Words to) {
    turn_square([=](int r) INLINE_BODY { return load_words(from.row(r)); }, to);
}

// Rows of words become columns; both counts are taken up to whole vectors.
inline void turn_words(Words from, int64_t rows, int64_t columns, Words to) {
    for (int64_t i = 0; i < rows; i += LANES) {
        for (int64_t j = 0; j < columns; j += LANES) {
            turn_square(Words{from.row(i) + j, from.apart}, {to.row(j) + i, to.apart});
        }
    }
}

#ifdef __AVX512F__
// Halves of a vector by turns.
INLINE VecU by_turns(__m512i both) {
    typedef uint16_t Halves __attribute__((vector_size(4 * LANES)));
    constexpr Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (VecU)_mm512_permutexvar_epi16((__m512i)order, both);
}

INLINE VecU by_turns(__m256i a, __m256i b) {
    return by_turns(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

// x, then y, rounded to bf16 as QUICK has it.
INLINE __m512i quick(Vec x, Vec y) {
    __m512i both;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(y), "v"(x));
    return both;
}

// The first `left` of LANES bf16.
INLINE __m256i some_halves(const uint16_t* from, int64_t left) {
    if (left >= LANES) return _mm256_loadu_si256((const __m256i*)from);
    return _mm256_maskz_loadu_epi16((__mmask16)((1u << left) - 1), from);
}
#endif

// What B has of rows that A has: a word a column, of one row or (DOTS) of two. `rows` is even.
template <bool DOTS>
void pair_rows(Words from, int64_t rows, int64_t columns, Words to) {
    for (int64_t i = 0; i < rows / EACH<DOTS>; i++) {
        for (int64_t j = 0; j < columns; j += LANES) {
            VecU word;
#ifdef __AVX512F__
            if (DOTS) {
                const uint16_t *a = (const uint16_t*)from.row(2 * i), *b = a + 2 * from.apart;
                word = by_turns(some_halves(a + j, LANES), some_halves(b + j, LANES));
            }
#endif
            if (!DOTS) word = load_words(from.row(i) + j);
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
