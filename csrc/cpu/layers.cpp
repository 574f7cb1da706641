// What stands between a decoder's products, forward and backward in one pass each:
//
//   RMSNorm  n = x / sqrt(mean(x^2) + eps) in x's type,  y = w n
//            dx = (w dy - n mean(w dy n)) / rms,  dw = sum over rows of dy n
//            with a residual: x + delta in x's type is kept and takes the place of x
//   SwiGLU   h = g sigmoid(g) u
//            du = dh g sigmoid(g),  dg = dh u sigmoid(g) (1 + g (1 - sigmoid(g)))
//
// All in float32. dw is summed by chunks of rows whose number and order the rows alone decide.
#include <math.h>

#include <algorithm>
#include <vector>

#include "block.h"
#include "share.h"
#include "vector.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t CHUNK = 64;  // rows

// One thread's row, in whole vectors with zeros behind its end.
struct Row {
    explicit Row(const NormTask& t)
        : task(t),
          padded(vectors(t.width)),
          x(padded),
          w(padded),
          g(padded),
          out(padded),
          half(padded) {
        read(t.weight_dtype, t.weight, 0, w);
    }

    // what stood behind the end before, such as a NaN's scale times zero, is not in the next row
    void read(int dtype, const void* data, int64_t row, std::vector<float>& into) {
        read_any(dtype, data, row * task.width, task.width, into.data());
        std::fill(into.begin() + task.width, into.end(), 0.0f);
    }

    // as the type of x holds it
    void round(float* values) {
        if (task.x_dtype == F32) return;
        write_any(task.x_dtype, half.data(), 0, task.width, values);
        read_any(task.x_dtype, half.data(), 0, task.width, values);
    }

    const NormTask& task;
    int64_t padded;
    std::vector<float> x, w, g, out;
    std::vector<uint16_t> half;
};

void normalise(const NormTask& t, const Added& added, void* y, int64_t i, Row& row) {
    row.read(t.x_dtype, t.x, i, row.x);
    if (added.delta) {
        row.read(added.dtype, added.delta, i, row.g);
        for (int64_t j = 0; j < row.padded; j += LANES) {
            store(&row.x[j], load(&row.x[j]) + load(&row.g[j]));
        }
        row.round(row.x.data());
        write_any(t.x_dtype, added.sum, i * t.width, t.width, row.x.data());
    }
    Vec sum = {};
    for (int64_t j = 0; j < row.padded; j += LANES) sum += load(&row.x[j]) * load(&row.x[j]);
    const float scale = 1.0f / sqrtf(total_of(sum) / (float)t.width + t.eps);
    if (t.scale) t.scale[i] = scale;
    float left = scale;  // what x is still to be multiplied by
    if (t.x_dtype != F32) {
        for (int64_t j = 0; j < row.padded; j += LANES) store(&row.x[j], load(&row.x[j]) * scale);
        row.round(row.x.data());
        left = 1.0f;
    }
    for (int64_t j = 0; j < row.padded; j += LANES) {
        store(&row.x[j], load(&row.w[j]) * (load(&row.x[j]) * left));
    }
    write_any(t.y_dtype, y, i * t.width, t.width, row.x.data());
}

// Adds dy n to `part` where there is one.
void normalise_grad(const NormTask& t, const NormGrad& d, float* part, int64_t i, Row& row) {
    const float scale = t.scale[i];
    row.read(t.x_dtype, t.x, i, row.x);
    row.read(t.y_dtype, d.grad, i, row.g);
    Vec sum = {};
    for (int64_t j = 0; j < row.padded; j += LANES) {
        const Vec n = load(&row.x[j]) * scale;
        store(&row.x[j], n);
        sum += load(&row.w[j]) * load(&row.g[j]) * n;
    }
    const float mean = total_of(sum) / (float)t.width;
    for (int64_t j = 0; j < row.padded; j += LANES) {
        store(&row.out[j], scale * (load(&row.w[j]) * load(&row.g[j]) - load(&row.x[j]) * mean));
    }
    if (part || d.again) row.round(row.x.data());
    if (part) {
        for (int64_t j = 0; j < row.padded; j += LANES) {
            store(&part[j], load(&part[j]) + load(&row.g[j]) * load(&row.x[j]));
        }
    }
    if (d.again) {
        for (int64_t j = 0; j < row.padded; j += LANES) {
            store(&row.x[j], load(&row.w[j]) * load(&row.x[j]));
        }
        write_any(t.y_dtype, d.again, i * t.width, t.width, row.x.data());
    }
    if (d.grad_sum) {
        row.read(t.x_dtype, d.grad_sum, i, row.g);
        for (int64_t j = 0; j < row.padded; j += LANES) {
            store(&row.out[j], load(&row.out[j]) + load(&row.g[j]));
        }
    }
    write_any(t.x_dtype, d.grad_x, i * t.width, t.width, row.out.data());
    if (d.grad_delta) write_any(d.dtype, d.grad_delta, i * t.width, t.width, row.out.data());
}

// SPAN numbers of gate and up, or of their gradients.
constexpr int64_t SPAN = BLOCK;

template <class F>
void by_span(const GateTask& t, int threads, F each) {
    const int64_t spans = (t.width + SPAN - 1) / SPAN;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> gate(SPAN), up(SPAN), grad(SPAN);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < t.rows * spans; i++) {
            const int64_t row = i / spans, at = i % spans * SPAN;
            const int64_t n = std::min(SPAN, t.width - at);
            read_any(t.dtype, t.gate, row * t.stride + at, n, gate.data());
            read_any(t.dtype, t.up, row * t.stride + at, n, up.data());
            each(row, at, n, gate.data(), up.data(), grad.data());
        }
    }
}

}  // namespace

void norm_share(const NormTask& t, const Added& added, void* y, int64_t begin, int64_t end) {
    Row row(t);
    for (int64_t i = begin; i < end; i++) normalise(t, added, y, i, row);
}

void rms_norm(const NormTask& t, const Added& added, void* y, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(t.rows);
        norm_share(t, added, y, mine.begin, mine.end);
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
            const int64_t end = std::min(t.rows, (c + 1) * CHUNK);
            for (int64_t i = c * CHUNK; i < end; i++) normalise_grad(t, d, part, i, row);
        }
    }
    if (!d.grad_weight) return;
    for (int64_t c = 0; c < chunks; c++) {
        for (int64_t j = 0; j < t.width; j++) whole[j] += parts[c * padded + j];
    }
    write_any(t.weight_dtype, d.grad_weight, 0, t.width, whole.data());
}

void swiglu(const GateTask& t, void* out, int threads) {
    by_span(t, threads, [&](int64_t row, int64_t at, int64_t n, float* gate, float* up, float*) {
        for (int64_t j = 0; j < n; j += LANES) {
            const Vec g = load(gate + j);
            store(gate + j, g * sigmoid(g) * load(up + j));
        }
        write_any(t.dtype, out, row * t.width + at, n, gate);
    });
}

void swiglu_grad(const GateTask& t, const GateGrad& d, int threads) {
    by_span(t, threads, [&](int64_t row, int64_t at, int64_t n, float* gate, float* up, float* by) {
        read_any(t.dtype, d.grad, row * t.width + at, n, by);
        for (int64_t j = 0; j < n; j += LANES) {
            const Vec g = load(gate + j), u = load(up + j), d = load(by + j), s = sigmoid(g);
            store(gate + j, d * u * s * (1.0f + g * (1.0f - s)));
            store(up + j, d * g * s);
            store(by + j, g * s * u);
        }
        write_any(t.dtype, d.grad_gate, row * d.stride + at, n, gate);
        write_any(t.dtype, d.grad_up, row * d.stride + at, n, up);
        if (d.again) write_any(t.dtype, d.again, row * t.width + at, n, by);
    });
}

}  // namespace ISA
}  // namespace reasonrl
