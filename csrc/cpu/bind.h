// The bindings of what a decoder's layers and its sampling need; see module.cpp.
#pragma once

#include <pybind11/stl.h>

#include <array>

#include "../bind.h"
#include "../ops.h"

namespace reasonrl {

inline void bind_packed(py::module_& m) {
    py::class_<PackedTask>(m, "PackedTask", "Packed tokens that attend; see ops.h.")
        .def(py::init([](uintptr_t heads_of, uintptr_t cos, uintptr_t sin, uintptr_t blocks,
                         uintptr_t shares, uintptr_t out, int64_t tokens, int64_t count,
                         int64_t heads, int64_t key_heads, int64_t size, int dtype, int angle_dtype,
                         float scaling, bool dots) {
            return PackedTask{at<void>(heads_of),
                              at<const void>(cos),
                              at<const void>(sin),
                              at<const PackedBlock>(blocks),
                              at<float>(shares),
                              at<void>(out),
                              tokens,
                              count,
                              heads,
                              key_heads,
                              size,
                              dtype,
                              angle_dtype,
                              scaling,
                              dots && dtype == BF16 && has_dots()};
        }));
    m.def(
        "attend_packed",
        [](const PackedTask& task, int threads) {
            py::gil_scoped_release release;
            ops().attend_packed(task, threads);
        },
        "Attention over packed tokens.");
    m.def(
        "attend_packed_grad",
        [](const PackedTask& task, uintptr_t grad, uintptr_t by_heads, int threads) {
            py::gil_scoped_release release;
            ops().attend_packed_grad(task, {at<const void>(grad), at<void>(by_heads)}, threads);
        },
        "Gradient by the heads.");
    py::class_<HeadsTask>(m, "HeadsTask", "Heads to norm and turn; see ops.h.")
        .def(py::init([](uintptr_t from, uintptr_t out, uintptr_t cos, uintptr_t sin,
                         uintptr_t q_norm, uintptr_t k_norm, int64_t tokens, int64_t heads,
                         int64_t key_heads, int64_t size, int dtype, int angle_dtype, float eps) {
            return HeadsTask{at<const void>(from),
                             at<void>(out),
                             at<const void>(cos),
                             at<const void>(sin),
                             at<const float>(q_norm),
                             at<const float>(k_norm),
                             tokens,
                             heads,
                             key_heads,
                             size,
                             dtype,
                             angle_dtype,
                             eps};
        }));
    m.def(
        "norm_heads",
        [](const HeadsTask& task, int threads) {
            py::gil_scoped_release release;
            ops().norm_heads(task, threads);
        },
        "Heads normed and turned.");
    m.def(
        "norm_heads_grad",
        [](const HeadsTask& task, uintptr_t by_norms, int64_t shares, int threads) {
            py::gil_scoped_release release;
            ops().norm_heads_grad(task, at<float>(by_norms), shares, threads);
        },
        "The gradient before the norms, in place, and by their weights in shares.");
}

inline void bind_attention(py::module_& m) {
    m.def(
        "attend_slots",
        [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t keys, uintptr_t values,
           uintptr_t length, uintptr_t out, int64_t rows, int64_t heads, int64_t key_heads,
           int64_t width, int64_t size, int64_t q_stride, int64_t k_stride, int64_t v_stride,
           int q_dtype, int k_dtype, int v_dtype, int dtype, float scaling, uintptr_t cos,
           uintptr_t sin, int angle_dtype, int threads) {
            py::gil_scoped_release release;
            SlotTask task{};
            task.q = at<const void>(q), task.k = at<const void>(k), task.v = at<const void>(v);
            task.keys = at<void>(keys), task.values = at<void>(values);
            task.length = at<const int64_t>(length), task.out = at<void>(out);
            task.rows = rows, task.heads = heads, task.key_heads = key_heads;
            task.width = width, task.size = size;
            task.q_stride = q_stride, task.k_stride = k_stride, task.v_stride = v_stride;
            task.q_dtype = q_dtype, task.k_dtype = k_dtype, task.v_dtype = v_dtype;
            task.dtype = dtype, task.scaling = scaling;
            task.cos = at<const void>(cos), task.sin = at<const void>(sin);
            task.angle_dtype = angle_dtype;
            ops().attend_slots(task, threads);
        },
        "One new token a row: its key and value placed, its attention over its slot.");
    py::class_<SoftmaxTask>(m, "SoftmaxTask", "Scores and what is seen of them; see ops.h.")
        .def(py::init([](uintptr_t weight, uintptr_t sees, int64_t batch, int64_t heads,
                         int64_t queries, int64_t width, int dtype, bool shared, float scaling) {
            return SoftmaxTask{at<void>(weight),
                               at<const uint8_t>(sees),
                               batch,
                               heads,
                               queries,
                               width,
                               dtype,
                               shared,
                               scaling};
        }));
    m.def(
        "masked_softmax",
        [](const SoftmaxTask& task, int threads) {
            py::gil_scoped_release release;
            ops().masked_softmax(task, threads);
        },
        "Scores become weights, in place.");
    m.def(
        "masked_softmax_grad",
        [](const SoftmaxTask& task, uintptr_t grad, uintptr_t out, int threads) {
            py::gil_scoped_release release;
            ops().masked_softmax_grad(task, at<const void>(grad), at<void>(out), threads);
        },
        "Gradient by the scores, from the weights.");
    bind_packed(m);
}

inline void bind_layers(py::module_& m) {
    py::class_<NormTask>(m, "NormTask", "Rows to normalise; see ops.h.")
        .def(py::init([](uintptr_t x, uintptr_t weight, uintptr_t scale, int64_t rows,
                         int64_t width, int x_dtype, int weight_dtype, int y_dtype, float eps) {
            return NormTask{
                at<const void>(x), at<const void>(weight), at<float>(scale), rows, width,
                x_dtype,           weight_dtype,           y_dtype,          eps};
        }));
    m.def(
        "rms_norm",
        [](const NormTask& task, uintptr_t delta, uintptr_t sum, int dtype, uintptr_t y,
           int threads) {
            py::gil_scoped_release release;
            ops().rms_norm(task, {at<const void>(delta), at<void>(sum), dtype}, at<void>(y),
                           threads);
        },
        "Rows, with a delta unless null, over their root mean square, times a weight.");
    m.def(
        "rms_norm_grad",
        [](const NormTask& task, uintptr_t grad, uintptr_t grad_sum, uintptr_t grad_x,
           uintptr_t grad_delta, uintptr_t grad_weight, uintptr_t again, int dtype, int threads) {
            py::gil_scoped_release release;
            const NormGrad out = {at<const void>(grad),
                                  at<const void>(grad_sum),
                                  at<void>(grad_x),
                                  at<void>(grad_delta),
                                  at<void>(grad_weight),
                                  at<void>(again),
                                  dtype};
            ops().rms_norm_grad(task, out, threads);
        },
        "Gradients by the rows and, unless null, by the delta and the weight.");
    py::class_<RotaryTask>(m, "RotaryTask", "Queries and keys to turn; see ops.h.")
        .def(py::init([](uintptr_t q, uintptr_t k, uintptr_t cos, uintptr_t sin, uintptr_t q_out,
                         uintptr_t k_out, int64_t tokens, int64_t heads, int64_t key_heads,
                         int64_t size, int64_t q_stride, int64_t k_stride, int dtype,
                         int angle_dtype, int out_dtype) {
            return RotaryTask{at<const void>(q),
                              at<const void>(k),
                              at<const void>(cos),
                              at<const void>(sin),
                              at<void>(q_out),
                              at<void>(k_out),
                              tokens,
                              heads,
                              key_heads,
                              size,
                              q_stride,
                              k_stride,
                              dtype,
                              angle_dtype,
                              out_dtype};
        }));
    m.def(
        "rotary",
        [](const RotaryTask& task, bool back, int threads) {
            py::gil_scoped_release release;
            ops().rotary(task, back, threads);
        },
        "The rotary embedding, or its gradient.");
    py::class_<GateTask>(m, "GateTask", "A gate and what it lets through; see ops.h.")
        .def(py::init([](uintptr_t gate, uintptr_t up, int64_t rows, int64_t width, int64_t stride,
                         int dtype) {
            return GateTask{at<const void>(gate), at<const void>(up), rows, width, stride, dtype};
        }));
    m.def(
        "swiglu",
        [](const GateTask& task, uintptr_t out, int threads) {
            py::gil_scoped_release release;
            ops().swiglu(task, at<void>(out), threads);
        },
        "silu(gate) * up.");
    m.def(
        "swiglu_grad",
        [](const GateTask& task, uintptr_t grad, uintptr_t grad_gate, uintptr_t grad_up,
           uintptr_t again, int64_t stride, int threads) {
            py::gil_scoped_release release;
            const GateGrad out = {at<const void>(grad), at<void>(grad_gate), at<void>(grad_up),
                                  at<void>(again), stride};
            ops().swiglu_grad(task, out, threads);
        },
        "Gradients by the gate and by what it lets through.");
}

inline void bind_adamw(py::module_& m) {
    m.def(
        "adamw",
        [](uintptr_t learned, int64_t count, double rate, double beta1, double beta2, double eps,
           double decay, double limit, bool usable, int threads) {
            py::gil_scoped_release release;
            const AdamW how = {rate, beta1, beta2, eps, decay, limit, usable};
            return ops().adamw(at<const Learned>(learned), count, how, threads);
        },
        "The gradients' norm; weights and moments after a step.");
}

inline void bind_linear(py::module_& m) {
    using Part = std::tuple<uintptr_t, int64_t, uintptr_t>;  // weight, its rows, bias or 0
    py::class_<LinearTask>(m, "LinearTask", "Linear layers of one input; see ops.h.")
        .def(py::init([](const std::vector<Part>& parts, int64_t rows, int64_t inputs, int dtype) {
            LinearTask task{{}, {}, rows, inputs, 0, dtype};
            for (const auto& [weight, count, bias] : parts) {
                task.parts.push_back({at<const float>(weight), count});
                task.biases.push_back(at<const float>(bias));
                task.outputs += count;
            }
            return task;
        }));
    m.def(
        "linear",
        [](const LinearTask& task, uintptr_t x, uintptr_t y, int threads) {
            py::gil_scoped_release release;
            ops().linear(task, at<const void>(x), at<void>(y), threads);
        },
        "What the layers make of x, side by side.");
    m.def(
        "linear_by_input",
        [](const LinearTask& task, uintptr_t grad, uintptr_t out, int threads) {
            py::gil_scoped_release release;
            ops().linear_by_input(task, at<const void>(grad), at<void>(out), threads);
        },
        "Gradient by what they read.");
    m.def(
        "linear_by_weight",
        [](const LinearTask& task, uintptr_t grad, uintptr_t x, uintptr_t out, int threads) {
            py::gil_scoped_release release;
            const void *above = at<const void>(grad), *read = at<const void>(x);
            ops().linear_by_weight(task, above, read, at<float>(out), threads);
        },
        "Gradients by their weights, one under the other, in float32.");
}

inline void bind_layer(py::module_& m) {
    using Pointers = std::array<uintptr_t, 18>;  // in the order of kernels/decoder.py's NAMES
    py::class_<LayerTask>(m, "LayerTask", "A decoder layer that learns; see ops.h.")
        .def(py::init([](const Pointers& p, std::array<uintptr_t, 4> places,
                         std::array<int64_t, 8> sizes, std::array<int, 2> dtypes,
                         std::array<float, 4> scales, bool dots) {
            LayerTask t{};
            t.blocks = at<const PackedBlock>(places[0]);
            t.cos = at<const void>(places[1]), t.sin = at<const void>(places[2]);
            t.tokens = sizes[0], t.width = sizes[1], t.inner = sizes[2], t.heads = sizes[3];
            t.key_heads = sizes[4], t.size = sizes[5], t.block_count = sizes[6];
            t.asked = at<const int64_t>(places[3]), t.answers = sizes[7];
            t.dtype = dtypes[0], t.angle_dtype = dtypes[1];
            t.eps1 = scales[0], t.eps2 = scales[1], t.head_eps = scales[2], t.scaling = scales[3];
            t.dots = dots && t.dtype == BF16 && has_dots();
            t.norm1 = at<const float>(p[0]), t.norm2 = at<const float>(p[5]);
            t.q_norm = at<const float>(p[16]), t.k_norm = at<const float>(p[17]);
            const auto add = [&](LinearTask& of, int64_t inputs, int weight, int bias, int64_t n) {
                of.parts.push_back({at<const float>(p[weight]), n});
                of.biases.push_back(at<const float>(p[bias]));
                of.rows = t.answers, of.inputs = inputs, of.outputs += n, of.dtype = t.dtype;
            };
            const int64_t queries = t.heads * t.size, keys = t.key_heads * t.size;
            add(t.qkv, t.width, 1, 9, queries);
            add(t.qkv, t.width, 2, 10, keys);
            add(t.qkv, t.width, 3, 11, keys);
            t.qkv.rows = t.tokens;
            add(t.out, queries, 4, 12, t.width);
            add(t.both, t.width, 6, 13, t.inner);
            add(t.both, t.width, 7, 14, t.inner);
            add(t.down, t.inner, 8, 15, t.width);
            return t;
        }))
        .def("keeps", &layer_keeps, "Bytes that the gradient needs again.")
        .def("needs", &layer_needs, "Bytes for a moment, either way.");
    m.def(
        "decoder_layer",
        [](const LayerTask& task, uintptr_t x, uintptr_t kept, uintptr_t scratch, uintptr_t out,
           int threads) {
            py::gil_scoped_release release;
            decoder_layer(task, at<const float>(x), at<void>(kept), at<void>(scratch),
                          at<float>(out), threads);
        },
        "What a layer makes of its tokens.");
    m.def(
        "decoder_layer_grad",
        [](const LayerTask& task, uintptr_t x, uintptr_t kept, uintptr_t scratch, uintptr_t grad,
           uintptr_t grad_x, std::array<uintptr_t, 11> by, int threads) {
            py::gil_scoped_release release;
            const auto to = [&](int i) { return at<float>(by[i]); };
            const LayerGrads grads = {to(0), to(1), to(2), to(3), to(4), to(5),
                                      to(6), to(7), to(8), to(9), to(10)};
            decoder_layer_grad(task, at<const float>(x), at<void>(kept), at<void>(scratch),
                               at<const float>(grad), at<float>(grad_x), grads, threads);
        },
        "Gradients by its tokens and, unless null, by its weights.");
}

inline void bind_draw(py::module_& m) {
    m.def(
        "draw",
        [](uintptr_t logits, uintptr_t uniform, uintptr_t token, uintptr_t logp, int64_t rows,
           int64_t vocab, int dtype, float temperature, int threads) {
            py::gil_scoped_release release;
            const DrawTask task = {at<const void>(logits),
                                   at<const double>(uniform),
                                   at<int64_t>(token),
                                   at<float>(logp),
                                   rows,
                                   vocab,
                                   dtype,
                                   temperature};
            ops().draw(task, threads);
        },
        "A token a row, and its log p.");
}

}  // namespace reasonrl
