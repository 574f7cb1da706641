// What stands between a decoder's products, forward and backward in one pass each:
//
//   RMSNorm  n = x / sqrt(mean(x^2) + eps) in x's type,  y = w n
//            dx = (w dy - n mean(w dy n)) / rms,  dw = sum over rows of dy n
//            with a residual: x + delta in x's type is kept and takes the place of x
//   SwiGLU   h = g sigmoid(g) u
//            du = dh g sigmoid(g),  dg = dh u sigmoid(g) (1 + g (1 - sigmoid(g)))
//
// All in float32. dw is summed by chunks of rows whose number and order the rows alone decide.
// And the least of passes: numbers rounded, sums of columns.
#include <math.h>

#include <algorithm>
#include <vector>

#include "gate.h"
#include "norm.h"
#include "share.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t CHUNK = 64;  // rows

// The weight, and room for a row: whole vectors, zeros behind the weight's end.
struct Row {
    explicit Row(const NormTask& t) : w(vectors(t.width)), out(vectors(t.width)) {
        read_any(t.weight_dtype, t.weight, 0, t.width, w.data());
    }

    std::vector<float> w, out;
};

// Adds dy n to `part` where there is one.
template <int X, int Y>
void normalise_grad(const NormTask& t, const NormGrad& d, float* part, int64_t i, Row& row) {
    const int64_t at = i * t.width, width = t.width;
    const float scale = t.scale[i];
    Vec sum = {};
    for (int64_t j = 0; j < width; j += LANES) {
        const Vec n = take<X>(t.x, at + j, width - j) * scale;
        sum += load(&row.w[j]) * take<Y>(d.grad, at + j, width - j) * n;
    }
    const float mean = sum_of_lanes(sum) / (float)width;
    for (int64_t j = 0; j < width; j += LANES) {
        const int64_t left = width - j;
        const Vec n = take<X>(t.x, at + j, left) * scale, g = take<Y>(d.grad, at + j, left);
        const Vec w = load(&row.w[j]), held = as<X>(n);
        Vec out = scale * (w * g - n * mean);
        if (part) store(&part[j], load(&part[j]) + g * held);
        if (d.again) give<Y>(d.again, at + j, left, w * held);
        if (d.grad_sum) out += take<X>(d.grad_sum, at + j, left);
        give<X>(d.grad_x, at + j, left, out);
        if (d.grad_delta) store(&row.out[j], out);
    }
    if (!d.grad_delta) return;
    of_type(d.dtype, [&](auto delta) {
        for (int64_t j = 0; j < width; j += LANES) {
            give<delta()>(d.grad_delta, at + j, width - j, load(&row.out[j]));
        }
    });
}

// SPAN numbers of gate and up, or of their gradients.
constexpr int64_t SPAN = BLOCK;

// each(row, first number, how many), a part of a row at a time.
template <class F>
void by_span(const GateTask& t, int threads, F each) {
    const int64_t spans = (t.width + SPAN - 1) / SPAN;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < t.rows * spans; i++) {
        const int64_t at = i % spans * SPAN;
        each(i / spans, at, std::min(SPAN, t.width - at));
    }
}

// each(begin, end) of `n` numbers, whole vectors of them for each thread.
template <class F>
void by_part(int64_t n, int threads, F each) {
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(vectors(n) / LANES);
        each(mine.begin * LANES, std::min(n, mine.end * LANES));
    }
}

// `n` numbers, by local pointers: stores might change those of a task.
template <int T>
INLINE void gated(const GateTask& t, int64_t from, int64_t to, int64_t n, void* out) {
    const void *gate = t.gate, *up = t.up;
    for (int64_t j = 0; j < n; j += LANES) {
        const Vec g = take<T>(gate, from + j, n - j), u = take<T>(up, from + j, n - j);
        give<T>(out, to + j, n - j, g * sigmoid(g) * u);
    }
}

template <int T>
INLINE void gated_grad(const GateTask& t, const GateGrad& d, int64_t from, int64_t to,
                       int64_t dense, int64_t n) {
    const void *gate = t.gate, *up = t.up, *grad = d.grad;
    void *by_gate = d.grad_gate, *by_up = d.grad_up, *again = d.again;
    for (int64_t j = 0; j < n; j += LANES) {
        const Vec by = take<T>(grad, dense + j, n - j);
        ungate<T>(gate, up, from + j, n - j, by, by_gate, by_up, to + j, again, dense + j);
    }
}

}  // namespace

void rms_norm(const NormTask& t, const Added& added, void* y, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(t.rows);
        const Row row(t);
        of_type(t.x_dtype, [&](auto x) {
            of_type(t.y_dtype, [&](auto to) {
                for (int64_t i = mine.begin; i < mine.end; i++) {
                    normalise<x(), to()>(t, added, y, i, row.w.data());
                }
            });
        });
    }
}

void rms_norm_grad(const NormTask& t, const NormGrad& d, int threads) {
    const int64_t chunks = (t.rows + CHUNK - 1) / CHUNK, padded = vectors(t.width);
    std::vector<float> parts(d.grad_weight ? chunks * padded : 0), whole(padded);
#pragma omp parallel num_threads(threads)
    {
        Row row(t);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; c++) {
            float* part = d.grad_weight ? parts.data() + c * padded : nullptr;
            const int64_t begin = c * CHUNK, end = std::min(t.rows, begin + CHUNK);
            of_type(t.x_dtype, [&](auto x) {
                of_type(t.y_dtype, [&](auto y) {
                    for (int64_t i = begin; i < end; i++) {
                        normalise_grad<x(), y()>(t, d, part, i, row);
                    }
                });
            });
        }
    }
    if (!d.grad_weight) return;
    for (int64_t c = 0; c < chunks; c++) {
        for (int64_t j = 0; j < t.width; j++) whole[j] += parts[c * padded + j];
    }
    write_any(t.weight_dtype, d.grad_weight, 0, t.width, whole.data());
}

void swiglu(const GateTask& t, void* out, int threads) {
    by_span(t, threads, [&](int64_t row, int64_t at, int64_t n) {
        of_type(t.dtype, [&](auto type) {
            gated<type()>(t, row * t.stride + at, row * t.width + at, n, out);
        });
    });
}

void narrow(const float* x, int64_t n, int dtype, void* out, int threads) {
    by_part(n, threads, [&](int64_t begin, int64_t end) {
        of_type(dtype, [&](auto type) {
            for (int64_t j = begin; j < end; j += LANES) {
                give<type()>(out, j, end - j, take<F32>(x, j, end - j));
            }
        });
    });
}

void column_sums(const void* x, int dtype, int64_t rows, int64_t width, float* out, int threads) {
    by_part(width, threads, [&](int64_t begin, int64_t end) {
        of_type(dtype, [&](auto type) {
            for (int64_t j = begin; j < end; j += LANES) {
                Vec whole = {};
                for (int64_t i = 0; i < rows;) {
                    Vec sum = {};
                    for (const int64_t last = std::min(rows, i + CHUNK); i < last; i++) {
                        sum += take<type()>(x, i * width + j, end - j);
                    }
                    whole += sum;
                }
                give<F32>(out, j, end - j, whole);
            }
        });
    });
}

void swiglu_grad(const GateTask& t, const GateGrad& d, int threads) {
    by_span(t, threads, [&](int64_t row, int64_t at, int64_t n) {
        of_type(t.dtype, [&](auto type) {
            const int64_t dense = row * t.width + at;
            gated_grad<type()>(t, d, row * t.stride + at, row * d.stride + at, dense, n);
        });
    });
}

}  // namespace ISA
}  // namespace reasonrl
