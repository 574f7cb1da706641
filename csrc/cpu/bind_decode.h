// The bindings of a decoder that makes new tokens in one call; see ../decode.h.
#pragma once

#include <pybind11/stl.h>

#include <array>

#include "../bind.h"
#include "../ops.h"
#include "enter.h"

namespace reasonrl {

using PackGiven = std::tuple<std::vector<std::tuple<uintptr_t, int64_t, int>>, int64_t, bool>;

inline std::vector<int64_t> packed_words(const std::vector<PackGiven>& given, int to) {
    std::vector<int64_t> words;
    const int64_t half = ops().panel() / 2;
    for (const auto& [parts, inputs, halves] : given) {
        int64_t outputs = 0;
        for (const auto& part : parts) outputs += std::get<1>(part);
        if (halves) outputs = (std::get<1>(parts[0]) + half - 1) / half * 2 * half;
        words.push_back(ops().packed_words(to, inputs, outputs));
    }
    return words;
}

inline void bind_decode(py::module_& m) {
    m.def("has_dots", &has_dots, "Whether pairs of bf16 are multiplied by one instruction.");
    m.def("panel", [] { return ops().panel(); }, "Outputs of a panel.");
    m.def("packed_words", &packed_words, "32-bit words of each of these products, packed.");
    m.def(
        "pack",
        [](const std::vector<PackGiven>& given, uintptr_t out, int to, int threads) {
            py::gil_scoped_release release;
            const std::vector<int64_t> words = packed_words(given, to);
            std::vector<PackTask> tasks;
            for (size_t i = 0; i < given.size(); out += words[i++] * sizeof(uint32_t)) {
                const auto& [parts, inputs, halves] = given[i];
                tasks.push_back({{}, at<uint32_t>(out), inputs, to, halves});
                for (const auto& [weight, outputs, dtype] : parts) {
                    tasks.back().parts.push_back({at<const void>(weight), outputs, dtype});
                }
            }
            ops().pack(tasks, threads);
        },
        "Weights into the panels of these products, one after the other.");
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
                                   at<int64_t>(p[2]),
                                   at<int64_t>(p[3]),
                                   at<int64_t>(p[4]),
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
    using Ids = std::vector<int64_t>;
    m.def(
        "decode_prompts",
        [](const DecodeModel& model, const std::vector<Ids>& prompts, const Ids& homes,
           uintptr_t logits, int threads) {
            py::gil_scoped_release release;
            ops().decode_logits(model, Prompts(prompts, homes).rows(), at<void>(logits), threads);
        },
        "Prompts to where they are kept, and the logits of what follows each.");
    m.def(
        "decode_enter",
        [](const DecodeModel& model, const DecodeState& state, const std::vector<Ids>& prompts,
           const Ids& homes, const Ids& at, int64_t first, int threads) {
            py::gil_scoped_release release;
            const Prompts given(prompts, homes);
            std::vector<float> logits(prompts.size() * model.vocab);
            ops().decode_logits(model, given.rows(), logits.data(), threads);
            begin(model, state, given, (const char*)logits.data(), at, first, threads);
        },
        "Prompts to where they are kept, and their completions' first tokens into slots.");
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
