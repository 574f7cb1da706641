// y = x W^T of a few rows, W packed once.
//
// A panel holds 2 * LANES outputs: of every input (float32), or of every pair of inputs (bf16), one
// 32-bit word each, so that a step of the inner loop reads two whole vectors. Each result is summed
// over its inputs in one order, whatever rows stand beside it. Outputs behind the last one are 0.
#pragma once

#include "lanes.h"
#include "share.h"

namespace reasonrl {
namespace {

constexpr int PANEL = 2 * LANES;           // outputs
constexpr int TILE = LANES == 16 ? 8 : 4;  // rows that share a pass over a panel

// Words that a panel has for each of its outputs.
INLINE int64_t words(int dtype, int64_t inputs) {
    return dtype == BF16 ? (inputs + 1) / 2 : inputs;
}

// The first and the second number of words, as float32.
INLINE Vec even_of(VecU both) {
    return (Vec)(both << 16);
}

INLINE Vec odd_of(VecU both) {
    return (Vec)(both & 0xffff0000u);
}

INLINE VecU load_words(const uint32_t* from) {
    VecU x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE uint32_t word_of(const uint16_t* pair) {
    uint32_t word;
    memcpy(&word, pair, 4);
    return word;
}

// (ROWS, PANEL) sums of rows of x with one panel, or each with a panel of its own (OWN).
template <int ROWS, bool OWN>
void tile_f32(const void* data, int64_t inputs, const uint32_t* const* w, float* out) {
    const float* x = (const float*)data;
    Vec sum[ROWS][2] = {}, a, b;
    for (int64_t k = 0; k < inputs; k++) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            if (OWN || r == 0) {
                a = (Vec)load_words(w[r] + k * PANEL),
                b = (Vec)load_words(w[r] + k * PANEL + LANES);
            }
            sum[r][0] += a * x[r * inputs + k];
            sum[r][1] += b * x[r * inputs + k];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        store(out + r * PANEL, sum[r][0]);
        store(out + r * PANEL + LANES, sum[r][1]);
    }
}

// The input that has no second one beside it.
template <int ROWS, bool OWN>
INLINE void add_last(const uint16_t* x, int64_t apart, const uint32_t* const* w, int64_t at,
                     Vec (*sum)[2]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        const uint32_t* from = w[OWN ? r : 0] + at;
        const Vec a = even_of(load_words(from)), b = even_of(load_words(from + LANES));
        sum[r][0] += a * from_bf16(x[r * apart]);
        sum[r][1] += b * from_bf16(x[r * apart]);
    }
}

// bf16 widened to float32.
template <int ROWS, bool OWN>
void tile_bf16(const void* data, int64_t inputs, const uint32_t* const* w, float* out) {
    const uint16_t* x = (const uint16_t*)data;
    Vec sum[ROWS][2] = {};
    VecU a, b;
    for (int64_t k = 0; k < inputs / 2; k++) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            if (OWN || r == 0) {
                a = load_words(w[r] + k * PANEL), b = load_words(w[r] + k * PANEL + LANES);
            }
            const uint32_t word = word_of(x + r * inputs + 2 * k);
            const float p = from_bits(word << 16), q = from_bits(word & 0xffff0000u);
            sum[r][0] += even_of(a) * p, sum[r][1] += even_of(b) * p;
            sum[r][0] += odd_of(a) * q, sum[r][1] += odd_of(b) * q;
        }
    }
    if (inputs % 2) add_last<ROWS, OWN>(x + inputs - 1, inputs, w, inputs / 2 * PANEL, sum);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        store(out + r * PANEL, sum[r][0]);
        store(out + r * PANEL + LANES, sum[r][1]);
    }
}

#ifdef __AVX512F__
// bf16 by the instruction that adds the product of a pair. VECS: 1 for a panel's first half alone.
template <int ROWS, bool OWN, int VECS = 2>
__attribute__((target("avx512f,avx512bf16"))) void tile_dots(const void* data, int64_t inputs,
                                                             const uint32_t* const* w, float* out) {
    const uint16_t* x = (const uint16_t*)data;
    Vec sum[ROWS][2] = {};
    __m512bh a, b;
    for (int64_t k = 0; k < inputs / 2; k++) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            if (OWN || r == 0) {
                a = (__m512bh)load_words(w[r] + k * PANEL);
                if (VECS == 2) b = (__m512bh)load_words(w[r] + k * PANEL + LANES);
            }
            const int word = (int)word_of(x + r * inputs + 2 * k);
            const __m512bh p = (__m512bh)_mm512_set1_epi32(word);
            sum[r][0] = (Vec)_mm512_dpbf16_ps((__m512)sum[r][0], p, a);
            if (VECS == 2) sum[r][1] = (Vec)_mm512_dpbf16_ps((__m512)sum[r][1], p, b);
        }
    }
    if (inputs % 2) add_last<ROWS, OWN>(x + inputs - 1, inputs, w, inputs / 2 * PANEL, sum);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        store(out + r * PANEL, sum[r][0]);
        if (VECS == 2) store(out + r * PANEL + LANES, sum[r][1]);
    }
}
#endif

using Tile = void (*)(const void* x, int64_t inputs, const uint32_t* const* panels, float* out);

constexpr int FEW = 4;  // rows of a tile in which each has a panel of its own

// The tile of so many rows, at most FEW if OWN; dots: whether the CPU has tile_dots' instruction.
template <bool OWN>
Tile tile_of(int dtype, bool dots, int64_t rows) {
    constexpr bool SAME = false;
    static constexpr Tile full[8] = {tile_f32<1, OWN>,  tile_f32<2, OWN>,  tile_f32<3, OWN>,
                                     tile_f32<4, OWN>,  tile_f32<5, SAME>, tile_f32<6, SAME>,
                                     tile_f32<7, SAME>, tile_f32<8, SAME>};
    static constexpr Tile wide[8] = {tile_bf16<1, OWN>,  tile_bf16<2, OWN>,  tile_bf16<3, OWN>,
                                     tile_bf16<4, OWN>,  tile_bf16<5, SAME>, tile_bf16<6, SAME>,
                                     tile_bf16<7, SAME>, tile_bf16<8, SAME>};
#ifdef __AVX512F__
    static constexpr Tile dot[8] = {tile_dots<1, OWN>,  tile_dots<2, OWN>,  tile_dots<3, OWN>,
                                    tile_dots<4, OWN>,  tile_dots<5, SAME>, tile_dots<6, SAME>,
                                    tile_dots<7, SAME>, tile_dots<8, SAME>};
    if (dtype == BF16 && dots) return dot[rows - 1];
#endif
    return (dtype == BF16 ? wide : full)[rows - 1];
}

// The tile of n rows that each have a panel, where nobody asks for the second halves of the sums.
INLINE Tile half_tile_of(int dtype, bool dots, int64_t rows) {
#ifdef __AVX512F__
    static constexpr Tile dot[FEW] = {tile_dots<1, true, 1>, tile_dots<2, true, 1>,
                                      tile_dots<3, true, 1>, tile_dots<4, true, 1>};
    if (dtype == BF16 && dots) return dot[rows - 1];
#endif
    return tile_of<true>(dtype, dots, rows);
}

// A packed weight with its bias, whose panels have `step` outputs each (two halves may be of one).
struct Product {
    const uint32_t* weight;
    const float* bias;  // in the panels' order, or null
    int64_t inputs, panels;
};

// store(row, panel, sums with their bias (PANEL,)) for every result that is this thread's.
template <class F>
INLINE void multiply(const Product& p, int dtype, bool dots, const void* x, int64_t rows,
                     int64_t thread, int64_t team, F store_row) {
    const int64_t blocks = (rows + TILE - 1) / TILE, size = words(dtype, p.inputs) * PANEL;
    const Share mine = share_of(p.panels * blocks, thread, team);
    alignas(64) float sum[TILE * PANEL];
    for (int64_t i = mine.begin; i < mine.end; i++) {
        const int64_t panel = i / blocks, row = i % blocks * TILE;
        const int64_t n = rows - row < TILE ? rows - row : TILE;
        const char* from = (const char*)x + row * p.inputs * (dtype == F32 ? 4 : 2);
        const uint32_t* weight = p.weight + panel * size;
        tile_of<false>(dtype, dots, n)(from, p.inputs, &weight, sum);
        for (int64_t r = 0; r < n; r++) {
            Vec a = load(sum + r * PANEL), b = load(sum + r * PANEL + LANES);
            if (p.bias) {
                a += load(p.bias + panel * PANEL), b += load(p.bias + panel * PANEL + LANES);
            }
            store_row(row + r, panel, a, b);
        }
    }
}

}  // namespace
}  // namespace reasonrl
