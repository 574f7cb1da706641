// What attention over kept keys has in common: numbers as they are kept, scores into weights.
#pragma once

#include "lanes.h"

namespace reasonrl {
namespace {

constexpr float LOWEST = -126.0f;  // less is no weight

// Numbers as they stand in memory, a vector at a time.
template <int DTYPE>
INLINE Vec load_as(const void* data, int64_t at) {
    if (DTYPE == F32) return load((const float*)data + at);
    return load_bf16((const uint16_t*)data + at);
}

// Scores (n,), times log2 e, become weights of the type; 1 / their sum, NaN where one is not
// finite.
template <int TO>
INLINE float soften(float* weight, int64_t n) {
    Vec most = Vec{} - INFINITY, broken = {}, sum = {};
    for (int64_t j = 0; j < n; j += LANES) {
        const Vec x = load(weight + j);
        most = max_of(most, x), broken += 0.0f * x;
    }
    const float top = largest_lane(most);
    for (int64_t j = 0; j < n; j += LANES) {
        const Vec x = load(weight + j) - top;
        const Vec kept = where(x > LOWEST, two_to(x));
        give<TO>(weight, j, LANES, kept);
        sum += as<TO>(kept);
    }
    return 1.0f / sum_of_lanes(sum + broken);
}

}  // namespace
}  // namespace reasonrl
