// A row's RMSNorm; see layers.cpp.
#pragma once

#include <math.h>

#include "lanes.h"

namespace reasonrl {
namespace {

// Row i; w: the weight, in whole vectors.
template <int X, int Y>
void normalise(const NormTask& t, const Added& added, void* y, int64_t i, const float* w) {
    const int64_t at = i * t.width, width = t.width;
    if (added.delta) {
        of_type(added.dtype, [&](auto delta) {
            for (int64_t j = 0; j < width; j += LANES) {
                const Vec more = take<delta()>(added.delta, at + j, width - j);
                const Vec x = as<X>(take<X>(t.x, at + j, width - j) + more);
                give<X>(added.sum, at + j, width - j, x);
            }
        });
    }
    const void* from = added.delta ? added.sum : t.x;
    Vec sum = {};
    for (int64_t j = 0; j < width; j += LANES) {
        const Vec x = take<X>(from, at + j, width - j);
        sum += x * x;
    }
    const float scale = 1.0f / sqrtf(sum_of_lanes(sum) / (float)width + t.eps);
    if (t.scale) t.scale[i] = scale;
    for (int64_t j = 0; j < width; j += LANES) {
        const Vec n = as<X>(take<X>(from, at + j, width - j) * scale);
        give<Y>(y, at + j, width - j, load(w + j) * n);
    }
}

}  // namespace
}  // namespace reasonrl
