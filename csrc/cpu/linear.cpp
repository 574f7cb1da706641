// The three products of a linear layer that learns, for layers that a cache holds:
//
//   y = x W^T + bias,  dx = g W,  dW = g^T x
//
// straight from W's float32 rows, which may be those of several layers that read one input. Where a
// layer is small, a library spends as long on its way to a product as in it, and wants W in the
// product's own type first. Each is C = A B with B in panels of a few vectors, packed once for all
// threads. C is float32, summed over the inner side in one order, and rounded once.
#include <algorithm>

#include "share.h"
#include "tiles.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t TILES = 12;   // of HIGH rows of A that share a pass over a panel
constexpr int64_t STEPS = 128;  // words of the inner side that do
constexpr int64_t APART = WIDE * LANES;

// Words that a thread keeps from product to product: fresh pages cost as much as a small one.
Words kept(int which, int64_t rows, int64_t apart) {
    static thread_local std::vector<uint32_t> all[2];
    const size_t wanted = rows * apart + 32;
    if (all[which].size() < wanted) all[which] = std::vector<uint32_t>(wanted);
    const uintptr_t at = (uintptr_t)all[which].data();
    return {(uint32_t*)((at + 63) / 64 * 64), apart};
}

template <bool DOTS>
constexpr int TYPE = DOTS ? BF16 : F32;

INLINE int64_t up(int64_t n, int64_t to) {
    return (n + to - 1) / to;
}

// The i-th word of a column: of one row, or (DOTS) of two that are neighbours.
template <bool DOTS, class Row>
INLINE VecU word_of_rows(int64_t i, Row row) {
    if (!DOTS) return (VecU)row(i);
    return (VecU)row(2 * i) >> 16 | (VecU)row(2 * i + 1);
}

// Row i of the weights, end to end.
INLINE const float* weight_row(const LinearTask& t, int64_t i) {
    const Piece* part = t.parts.data();
    for (; i >= part->count; part++) i -= part->count;
    return part->at + i * t.inputs;
}

// Row i, from column j on, of `rows` rows of numbers in the product's type; zeros beyond them.
template <bool DOTS>
struct Tokens {
    const void* data;
    int64_t rows, width;

    INLINE Vec operator()(int64_t i, int64_t j) const {
        return i < rows ? take<TYPE<DOTS>>(data, i * width + j, width - j) : Vec{};
    }
};

// B, a row of words in each panel for every step of the inner side.
template <bool DOTS>
struct Panels {
    Panels(int64_t inner, int64_t columns)
        : steps(up(inner, EACH<DOTS>)),
          high(up(steps, LANES) * LANES),
          wide(up(columns, LANES)),
          count(up(wide, WIDE)),
          words(kept(0, count * high, APART)) {}

    Share columns(int64_t panel) const { return share_of(wide, panel, count); }

    Words panel(int64_t i) const { return {words.row(i * high), APART}; }

    // Rows begin .. end of B by word(step, first of its columns).
    template <class F>
    void fill(int64_t begin, int64_t end, F word) {
        for (int64_t i = 0; i < count; i++) {
            const Share mine = columns(i);
            for (int64_t k = begin; k < end; k++) {
                for (int64_t v = mine.begin; v < mine.end; v++) {
                    const VecU x = word(k, v * LANES);
                    memcpy(panel(i).row(k) + (v - mine.begin) * LANES, &x, sizeof x);
                }
            }
        }
    }

    // W^T, whose inner side is W's own: vectors of rows in panels begin .. end.
    void fill_across(const LinearTask& t, int64_t begin, int64_t end) {
        Store store;
        const Words rows = store.words(LANES, high);
        for (int64_t i = begin; i < end; i++) {
            const Share mine = columns(i);
            for (int64_t v = mine.begin; v < mine.end; v++) {
                memset(rows.at, 0, LANES * high * sizeof(uint32_t));
                for (int64_t r = 0; r < LANES && v * LANES + r < t.outputs; r++) {
                    const float* from = weight_row(t, v * LANES + r);
                    for (int64_t j = 0; j < t.inputs; j += LANES) {
                        const int64_t left = t.inputs - j;
                        give<TYPE<DOTS>>(rows.row(r), j, left, take<F32>(from, j, left));
                    }
                }
                turn_words(rows, LANES, high, {panel(i).at + (v - mine.begin) * LANES, APART});
            }
        }
    }

    int64_t steps, high, wide, count;
    Words words;
};

// A: rows of words, whole tiles of them but for the last `rows % HIGH`, which `rest` has.
struct Left {
    Words all;
    int64_t rows;
    Words rest;

    INLINE Words tile(int64_t i) const {
        return (i + 1) * HIGH > rows ? rest : Words{all.row(i * HIGH), all.apart};
    }
};

// Rows of numbers in the product's type as A; what is left behind whole tiles is copied.
template <bool DOTS>
Left left_of(const void* x, int64_t rows, int64_t width, Store& store) {
    const int64_t apart = width / EACH<DOTS>, some = rows % HIGH;
    const Words all = {(uint32_t*)x, apart}, rest = store.words(HIGH, apart);
    memset(rest.at, 0, HIGH * apart * sizeof(uint32_t));
    memcpy(rest.at, all.row(rows - some), some * apart * sizeof(uint32_t));
    return {all, rows, rest};
}

// Sums with their bias, as the product's type has them, `apart` from row to row.
#define REASONRL_FINISH(where, name, type, keep)                                        \
    where void name(Words c, int64_t rows, int64_t count, const float* bias, void* out, \
                    int64_t at, int64_t apart) {                                        \
        for (int64_t r = 0; r < rows; r++, at += apart) {                               \
            for (int64_t j = 0; j < count; j += LANES) {                                \
                const Vec sum = load(c.floats(r) + j);                                  \
                const auto y = keep(bias ? sum + load(bias + j) : sum);                 \
                type* to = (type*)out + at + j;                                         \
                if (count - j >= LANES) memcpy(to, &y, sizeof y);                       \
                if (count - j < LANES) memcpy(to, &y, (count - j) * sizeof *to);        \
            }                                                                           \
        }                                                                               \
    }

#define REASONRL_HALVES(x) _mm512_cvtneps_pbh((__m512)(x))

REASONRL_FINISH(inline, finish_floats, float, Vec)
#ifdef __AVX512F__
REASONRL_FINISH(REASONRL_PAIRS inline, finish_pairs, uint16_t, REASONRL_HALVES)
#endif

template <bool HALVES>
void finish(Words c, int64_t rows, int64_t count, const float* bias, void* out, int64_t at,
            int64_t apart) {
#ifdef __AVX512F__
    if (HALVES) return finish_pairs(c, rows, count, bias, out, at, apart);
#endif
    finish_floats(c, rows, count, bias, out, at, apart);
}

// This thread's part of C (rows, columns), in the product's type or (WHOLE) in float32.
template <bool DOTS, bool WHOLE>
void multiply(const Left& a, const Panels<DOTS>& b, int64_t columns, const float* bias, void* out) {
    const int64_t tiles = up(a.rows, HIGH), team = omp_get_num_threads();
    const int64_t blocks = up(tiles, TILES * team) * team, parts = up(b.steps, STEPS);
    Store own;
    const Words c = own.words(TILES * HIGH, APART);
    const Share mine = share_of(blocks * b.count);
    for (int64_t i = mine.begin; i < mine.end; i++) {
        const Share block = share_of(tiles, i / b.count, blocks), at = b.columns(i % b.count);
        const Words panel = b.panel(i % b.count);
        const int64_t wide = at.end - at.begin, first = at.begin * LANES;
        for (int64_t p = 0; p < parts; p++) {
            const Share some = share_of(b.steps, p, parts);
            const Words w = {panel.row(some.begin), APART};
            const int64_t steps = some.end - some.begin;
            for (int64_t r = block.begin; r < block.end; r++) {
                const Words whole = a.tile(r), x = {whole.at + some.begin, whole.apart};
                const Words sum = {c.row((r - block.begin) * HIGH), APART};
                if (wide == 3) tile<DOTS, 3>(x, w, steps, steps, sum, p > 0);
                if (wide == 2) tile<DOTS, 2>(x, w, steps, steps, sum, p > 0);
                if (wide == 1) tile<DOTS, 1>(x, w, steps, steps, sum, p > 0);
            }
        }
        const int64_t row = block.begin * HIGH, rows = std::min(a.rows, block.end * HIGH) - row;
        const int64_t count = std::min(columns - first, wide * LANES);
        const float* more = bias ? bias + first : nullptr;
        finish<DOTS && !WHOLE>(c, rows, count, more, out, row * columns + first, columns);
    }
}

// The layers' biases end to end, as the product's type has them.
template <bool DOTS>
std::vector<float> biases_of(const LinearTask& t) {
    std::vector<float> all;
    const auto none = [](const float* bias) { return !bias; };
    if (std::all_of(t.biases.begin(), t.biases.end(), none)) return all;
    all.resize(vectors(t.outputs));
    int64_t at = 0;
    for (size_t i = 0; i < t.parts.size(); at += t.parts[i++].count) {
        if (t.biases[i]) std::copy_n(t.biases[i], t.parts[i].count, all.begin() + at);
    }
    for (int64_t j = 0; j < (int64_t)all.size(); j += LANES) {
        store(&all[j], as<TYPE<DOTS>>(load(&all[j])));
    }
    return all;
}

template <bool DOTS>
void forward(const LinearTask& t, const void* x, void* y, int threads) {
    Store store;
    const Left a = left_of<DOTS>(x, t.rows, t.inputs, store);
    Panels<DOTS> b(t.inputs, t.outputs);
    const std::vector<float> bias = biases_of<DOTS>(t);
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(b.count);
        b.fill_across(t, mine.begin, mine.end);
#pragma omp barrier
        multiply<DOTS, false>(a, b, t.outputs, bias.empty() ? nullptr : bias.data(), y);
    }
}

template <bool DOTS>
void by_input(const LinearTask& t, const void* grad, void* out, int threads) {
    Store store;
    const Left a = left_of<DOTS>(grad, t.rows, t.outputs, store);
    Panels<DOTS> b(t.outputs, t.inputs);
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(b.steps);
        b.fill(mine.begin, mine.end, [&](int64_t k, int64_t j) {
            return word_of_rows<DOTS>(k, [&](int64_t i) {
                return as<TYPE<DOTS>>(take<F32>(weight_row(t, i), j, t.inputs - j));
            });
        });
#pragma omp barrier
        multiply<DOTS, false>(a, b, t.inputs, nullptr, out);
    }
}

template <bool DOTS>
void by_weight(const LinearTask& t, const void* grad, const void* x, float* out, int threads) {
    Panels<DOTS> b(t.rows, t.inputs);
    const Tokens<DOTS> g = {grad, t.rows, t.outputs}, read = {x, t.rows, t.inputs};
    const Words across = kept(1, vectors(t.outputs), b.high);
#pragma omp parallel num_threads(threads)
    {
        Store own;
        const Words square = own.words(LANES, LANES);
        const Share mine = share_of(b.steps), wide = share_of(vectors(t.outputs) / LANES);
        b.fill(mine.begin, mine.end, [&](int64_t k, int64_t j) {
            return word_of_rows<DOTS>(k, [&](int64_t i) { return read(i, j); });
        });
        for (int64_t j = wide.begin * LANES; j < wide.end * LANES; j += LANES) {
            for (int64_t k = 0; k < b.high; k += LANES) {
                for (int64_t n = 0; n < LANES; n++) {
                    const VecU word = word_of_rows<DOTS>(k + n, [&](int64_t i) { return g(i, j); });
                    memcpy(square.row(n), &word, sizeof word);
                }
                turn_square(square, {across.row(j) + k, across.apart});
            }
        }
#pragma omp barrier
        const Words rest = {across.row(t.outputs / HIGH * HIGH), across.apart};
        multiply<DOTS, true>({across, t.outputs, rest}, b, t.inputs, nullptr, out);
    }
}

}  // namespace

void linear(const LinearTask& t, const void* x, void* y, int threads) {
#ifdef __AVX512F__
    if (t.dtype == BF16) return forward<true>(t, x, y, threads);
#endif
    forward<false>(t, x, y, threads);
}

void linear_by_input(const LinearTask& t, const void* grad, void* out, int threads) {
#ifdef __AVX512F__
    if (t.dtype == BF16) return by_input<true>(t, grad, out, threads);
#endif
    by_input<false>(t, grad, out, threads);
}

void linear_by_weight(const LinearTask& t, const void* grad, const void* x, float* out,
                      int threads) {
#ifdef __AVX512F__
    if (t.dtype == BF16) return by_weight<true>(t, grad, x, out, threads);
#endif
    by_weight<false>(t, grad, x, out, threads);
}

}  // namespace ISA
}  // namespace reasonrl
