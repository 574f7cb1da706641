// The three products of a linear layer that learns, for layers that a cache holds:
//
//   y = x W^T + bias,  dx = g W,  dW = g^T x
//
// straight from W's float32 rows, which may be those of several layers that read one input. Where a
// layer is small, a library spends as long on its way to a product as in it, and wants W in the
// product's own type first. Each is C = A B with B in panels of a few vectors, packed once for all
// threads, and A as it stands or, for dW, a block of rows at a time. C is float32, summed over the
// inner side in one order, and rounded once.
#include <algorithm>

#include "finish.h"
#include "share.h"
#include "tiles.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t TILES = 12;   // of HIGH rows of A that share a pass over a panel
constexpr int64_t STEPS = 128;  // words of the inner side that do
constexpr int64_t AHEAD = 8;    // words of the inner side that are asked for before their turn
constexpr int64_t APART = WIDE * LANES;

// Words that a thread keeps from product to product: fresh pages cost as much as a small one.
Words kept(int which, int64_t rows, int64_t apart) {
    static thread_local std::vector<uint32_t> all[3];
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

// Words of LANES columns: of a row, or (DOTS) of two that are neighbours. 0 for no row, and for no
// column, of which there are `left`.
template <bool DOTS>
INLINE VecU word_of_rows(const float* a, const float* b, int64_t left) {
    const Vec x = a ? take<F32>(a, 0, left) : Vec{};
#ifdef __AVX512F__
    if (DOTS) return by_turns(quick(x, b ? take<F32>(b, 0, left) : Vec{}));
#endif
    return (VecU)x;
}

#ifdef __AVX512F__
template <bool DOTS>
INLINE VecU word_of_rows(const uint16_t* a, const uint16_t* b, int64_t left) {
    const __m256i none = {};
    return by_turns(a ? some_halves(a, left) : none, b ? some_halves(b, left) : none);
}
#endif

// LANES words of a row of the weights, of which `left` numbers are left.
template <bool DOTS>
INLINE VecU words_of_row(const float* row, int64_t left) {
#ifdef __AVX512F__
    if (DOTS) {
        const Vec more = left > LANES ? take<F32>(row, LANES, left - LANES) : Vec{};
        return (VecU)quick(take<F32>(row, 0, left), more);
    }
#endif
    return (VecU)take<F32>(row, 0, left);
}

// Row i of the weights, end to end.
INLINE const float* weight_row(const LinearTask& t, int64_t i) {
    const Piece* part = t.parts.data();
    for (; i >= part->count; part++) i -= part->count;
    return part->at + i * t.inputs;
}

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

    // Rows begin .. end of B, of whose columns' numbers row(i) has as many as `width`.
    template <class Row>
    void fill(int64_t begin, int64_t end, int64_t width, Row row) {
        for (int64_t first = begin; first < end; first += AHEAD) {
            const int64_t next = std::min(first + AHEAD, end), after = std::min(next + AHEAD, end);
            for (int64_t k = next * EACH<DOTS>; k < after * EACH<DOTS>; k++) {
                if (const auto from = row(k)) soon(from, width);
            }
            for (int64_t i = 0; i < count; i++) {
                const Share mine = columns(i);
                const Words to = panel(i);
                for (int64_t k = first; k < next; k++) {
                    const auto a = row(k * EACH<DOTS>), b = DOTS ? row(2 * k + 1) : nullptr;
                    soon(to.row(k + AHEAD), APART);
                    for (int64_t v = mine.begin; v < mine.end; v++) {
                        const int64_t j = v * LANES;
                        const VecU x = word_of_rows<DOTS>(a + j, b ? b + j : b, width - j);
                        memcpy(to.row(k) + (v - mine.begin) * LANES, &x, sizeof x);
                    }
                }
            }
        }
    }

    // W^T, whose inner side is W's own: vectors of rows in panels begin .. end.
    void fill_across(const LinearTask& t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const Share mine = columns(i);
            for (int64_t v = mine.begin; v < mine.end; v++) {
                const float* rows[LANES] = {};
                for (int64_t r = 0; r < 2 * LANES && v * LANES + r < t.outputs; r++) {
                    const float* row = weight_row(t, v * LANES + r);
                    if (r < LANES) rows[r] = row;
                    if (r >= LANES && v + 1 < mine.end) soon(row, t.inputs);
                }
                for (int64_t k = 0; k < steps; k += LANES) {
                    const int64_t j = k * EACH<DOTS>;
                    const auto row = [&](int r) INLINE_BODY {
                        return rows[r] ? words_of_row<DOTS>(rows[r] + j, t.inputs - j) : VecU{};
                    };
                    turn_square(row, {panel(i).row(k) + (v - mine.begin) * LANES, APART});
                }
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

    void ready(Share) {}

    void ready_soon(int64_t i) const {
        if ((i + 1) * HIGH <= rows) soon(all.row(i * HIGH), HIGH * all.apart);
    }

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

// Columns of numbers as rows of A, those of a block of tiles at a time: LANES of them side by side,
// one such panel behind the other.
template <bool DOTS, class Row>
struct LeftAcross {
    int64_t rows, steps;
    Row row;  // of the numbers
    uint32_t* words;
    int64_t first = 0;

    void ready_soon(int64_t) const {}

    void ready(Share tiles) {
        first = tiles.begin;
        const int64_t begin = tiles.begin * HIGH, count = std::min(tiles.end * HIGH, rows) - begin;
        for (int64_t k = 0; k < steps; k++) {
            const auto a = row(k * EACH<DOTS>), b = DOTS ? row(2 * k + 1) : nullptr;
            for (int64_t i = 0; i < EACH<DOTS>; i++) {
                const auto later = row((k + AHEAD) * EACH<DOTS> + i);
                if (later) soon(later + begin, count);
            }
            for (int64_t j = 0; j < count; j += LANES) {
                const int64_t at = begin + j;
                const VecU x = word_of_rows<DOTS>(a + at, b ? b + at : b, rows - at);
                memcpy(words + j * steps + k * LANES, &x, sizeof x);
            }
        }
    }

    INLINE Lying tile(int64_t i) const {
        const int64_t at = (i - first) * HIGH, within = at % LANES;
        return {words + (at - within) * steps + within};
    }
};

// This thread's part of C (rows, columns), each sum to put(row, column, columns left, LANES sums).
template <bool DOTS, class A, class Put>
void multiply(A a, const Panels<DOTS>& b, int64_t columns, const float* bias, Put give_to) {
    const int64_t tiles = up(a.rows, HIGH), team = omp_get_num_threads();
    const int64_t blocks = up(tiles, TILES * team) * team, parts = up(b.steps, STEPS);
    const Words c = kept(2, TILES * HIGH, APART);
    const Share mine = share_of(blocks * b.count);
    for (int64_t i = mine.begin; i < mine.end; i++) {
        const Share block = share_of(tiles, i / b.count, blocks), at = b.columns(i % b.count);
        const Words panel = b.panel(i % b.count);
        if (i == mine.begin || i % b.count == 0) a.ready(block);
        const int64_t wide = at.end - at.begin, first = at.begin * LANES;
        const float* more = bias ? bias + first : nullptr;
        for (int64_t p = 0; p < parts; p++) {
            const Share some = share_of(b.steps, p, parts);
            const Words w = {panel.row(some.begin), APART};
            const int64_t steps = some.end - some.begin;
            for (int64_t r = block.begin; r < block.end; r++) {
                const auto x = a.tile(r).from(some.begin);
                const Words sum = {c.row((r - block.begin) * HIGH), APART};
                const int64_t rows = std::min<int64_t>(HIGH, a.rows - r * HIGH);
                const int64_t count = std::min(wide * LANES, columns - first);
                const auto put = [=](int row, int v, Vec x, int64_t left = LANES) INLINE_BODY {
                    if (more) x += load(more + v * LANES);
                    give_to(r * HIGH + row, first + v * LANES, left, x);
                };
                if (p == 0 && i % b.count == 0) a.ready_soon(r + 1);
                const bool ends = p + 1 == parts;
                for (int row = 0; row < rows && ends; row++) {
                    give_to.ask(r * HIGH + row, first, count);
                }
                if (Put::SHORT && ends && rows == HIGH && count == wide * LANES) {
                    tile_of<DOTS>(wide, x, w, steps, steps, sum, p > 0, put);
                    continue;
                }
                tile_of<DOTS>(wide, x, w, steps, steps, sum, p > 0);
                for (int64_t row = 0; row < rows && ends; row++) {
                    for (int64_t v = 0; v < wide; v++) {
                        put(row, v, load(sum.floats(row) + v * LANES), count - v * LANES);
                    }
                }
            }
        }
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

template <bool DOTS, class Put>
void forward(const LinearTask& t, const void* x, Put put, int threads) {
    Store store;
    const Left a = left_of<DOTS>(x, t.rows, t.inputs, store);
    Panels<DOTS> b(t.inputs, t.outputs);
    const std::vector<float> bias = biases_of<DOTS>(t);
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(b.count);
        b.fill_across(t, mine.begin, mine.end);
#pragma omp barrier
        const float* more = bias.empty() ? nullptr : bias.data();
        multiply<DOTS>(a, b, t.outputs, more, put);
    }
}

template <bool DOTS, class Put>
void by_input(const LinearTask& t, const void* grad, Put put, int threads) {
    Store store;
    const Left a = left_of<DOTS>(grad, t.rows, t.outputs, store);
    Panels<DOTS> b(t.outputs, t.inputs);
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(b.steps);
        b.fill(mine.begin, mine.end, t.inputs,
               [&](int64_t i) { return i < t.outputs ? weight_row(t, i) : nullptr; });
#pragma omp barrier
        multiply<DOTS>(a, b, t.inputs, nullptr, put);
    }
}

template <bool DOTS>
void by_weight(const LinearTask& t, const void* grad, const void* x, float* out, int threads) {
    Panels<DOTS> b(t.rows, t.inputs);
    const auto rows = [&t](const void* data, int64_t width) {
        const Number<DOTS>* from = (const Number<DOTS>*)data;
        return [=, &t](int64_t i) { return i < t.rows ? from + i * width : nullptr; };
    };
    const auto g = rows(grad, t.outputs);
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(b.steps);
        b.fill(mine.begin, mine.end, t.inputs, rows(x, t.inputs));
        const Words words = kept(1, TILES * HIGH + LANES, b.steps);
#pragma omp barrier
        const LeftAcross<DOTS, decltype(g)> a = {t.outputs, b.steps, g, words.at};
        multiply<DOTS>(a, b, t.inputs, nullptr, Rows<float>{out, t.inputs});
    }
}

}  // namespace

#ifdef __AVX512F__
#define REASONRL_BY_TYPE(call)   \
    if (t.dtype == BF16) {       \
        constexpr bool P = true; \
        return call;             \
    }                            \
    constexpr bool P = false;    \
    call
#else
#define REASONRL_BY_TYPE(call) \
    constexpr bool P = false;  \
    call
#endif

void linear(const LinearTask& t, const void* x, void* y, int threads) {
    REASONRL_BY_TYPE((forward<P>(t, x, Rows<Number<P>>{(Number<P>*)y, t.outputs}, threads)));
}

void linear_onto(const LinearTask& t, const void* x, const float* onto, float* out, int threads) {
    REASONRL_BY_TYPE((forward<P>(t, x, Onto<P>{onto, out, t.outputs}, threads)));
}

void linear_by_input(const LinearTask& t, const void* grad, void* out, int threads) {
    REASONRL_BY_TYPE((by_input<P>(t, grad, Rows<Number<P>>{(Number<P>*)out, t.inputs}, threads)));
}

void linear_by_gate(const LinearTask& t, const void* grad, const GateTask& gate, const GateGrad& d,
                    int threads) {
    REASONRL_BY_TYPE((by_input<P>(t, grad, Ungated<P>{gate, d}, threads)));
}

void linear_by_weight(const LinearTask& t, const void* grad, const void* x, float* out,
                      int threads) {
    REASONRL_BY_TYPE((by_weight<P>(t, grad, x, out, threads)));
}

}  // namespace ISA
}  // namespace reasonrl
