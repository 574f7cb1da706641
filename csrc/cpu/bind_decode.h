// The bindings of a decoder that makes new tokens in one call; see ../decode.h.
#pragma once

#include <pybind11/stl.h>

#include <array>

#include "../bind.h"
#include "../ops.h"

namespace reasonrl {

inline void bind_decode(py::module_& m) {
    m.def("has_dots", &has_dots, "Whether pairs of bf16 are multiplied by one instruction.");
    m.def("panel", [] { return ops().panel(); }, "Outputs of a panel.");
    m.def(
        "packed_words",
        [](int dtype, int64_t inputs, int64_t outputs) {
            return ops().packed_words(dtype, inputs, outputs);
        },
        "32-bit words of a packed weight.");
    using Part = std::tuple<uintptr_t, int64_t, int>;  // weight, its outputs, its dtype
    m.def(
        "pack",
        [](const std::vector<Part>& parts, uintptr_t out, int64_t inputs, int to, bool halves,
           int threads) {
            py::gil_scoped_release release;
            PackTask task = {{}, at<uint32_t>(out), inputs, to, halves};
            for (const auto& [weight, outputs, dtype] : parts) {
                task.parts.push_back({at<const void>(weight), outputs, dtype});
            }
            ops().pack(task, threads);
        },
        "Weights of one input into the panels of a product, all of these.");
    py::class_<DecodeLayer>(m, "DecodeLayer", "A layer with its slots.")
        .def(py::init([](std::array<uintptr_t, 16> p, std::array<float, 4> scales) {
            const auto packed = [&](int i) {
                return Packed{at<const uint32_t>(p[i]), at<const float>(p[i + 1])};
            };
            return DecodeLayer{at<const void>(p[0]),
                               at<const void>(p[1]),
                               at<const void>(p[2]),
                               at<const void>(p[3]),
                               scales[0],
                               scales[1],
                               scales[2],
                               scales[3],
                               packed(4),
                               packed(6),
                               packed(8),
                               packed(10),
                               {at<void>(p[12]), at<void>(p[13])},
                               {at<void>(p[14]), at<void>(p[15])}};
        }));
    py::class_<DecodeModel>(m, "DecodeModel", "A decoder with its head.")
        .def(py::init([](std::vector<DecodeLayer> layers, std::array<uintptr_t, 6> p, float eps,
                         std::array<int64_t, 8> sizes, std::array<int, 4> dtypes, bool dots) {
            DecodeModel model{};
            model.layers = std::move(layers);
            model.embedding = at<const void>(p[0]), model.norm = at<const void>(p[1]);
            model.head = {at<const uint32_t>(p[2]), at<const float>(p[3])};
            model.cos = at<const void>(p[4]), model.sin = at<const void>(p[5]);
            model.eps = eps;
            model.width = sizes[0], model.inner = sizes[1], model.heads = sizes[2];
            model.key_heads = sizes[3], model.size = sizes[4], model.vocab = sizes[5];
            model.prompt_room = sizes[6], model.own_room = sizes[7];
            model.dtype = dtypes[0], model.residual = dtypes[1], model.norm_dtype = dtypes[2];
            model.angle_dtype = dtypes[3];
            model.dots = dots && has_dots();
            return model;
        }));
    m.def(
        "decode_logits",
        [](const DecodeModel& model, std::array<uintptr_t, 6> p, int64_t rows, uintptr_t logits,
           int threads) {
            py::gil_scoped_release release;
            const DecodeRows given = {at<const int64_t>(p[0]),
                                      at<const int64_t>(p[1]),
                                      at<const int64_t>(p[2]),
                                      at<const int64_t>(p[3]),
                                      at<const int64_t>(p[4]),
                                      at<const uint8_t>(p[5]),
                                      rows};
            ops().decode_logits(model, given, at<void>(logits), threads);
        },
        "Tokens to where they are kept, and logits of those that are asked for.");
    py::class_<DecodeState>(m, "DecodeState", "The batch that is decoded.")
        .def(py::init(
            [](std::array<uintptr_t, 11> p, std::array<int64_t, 3> sizes, float temperature) {
                return DecodeState{at<int64_t>(p[0]),
                                   at<int64_t>(p[1]),
                                   at<const int64_t>(p[2]),
                                   at<const int64_t>(p[3]),
                                   at<const int64_t>(p[4]),
                                   at<uint8_t>(p[5]),
                                   at<const double>(p[6]),
                                   at<int64_t>(p[7]),
                                   at<int64_t>(p[8]),
                                   at<float>(p[9]),
                                   at<const int64_t>(p[10]),
                                   sizes[0],
                                   sizes[1],
                                   sizes[2],
                                   temperature};
            }));
    m.def(
        "decode_tokens",
        [](const DecodeModel& model, const DecodeState& state, int64_t tokens, int64_t until,
           int threads) {
            py::gil_scoped_release release;
            ops().decode_tokens(model, state, tokens, until, threads);
        },
        "Up to so many tokens of every slot that goes on, while more than `until` do.");
}

}  // namespace reasonrl
