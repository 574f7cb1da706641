// A head's rotary embedding, in place; see rotary.cpp.
#pragma once

#include <vector>

#include "block.h"

namespace reasonrl {
namespace {

// cos and sin of a token, (d,) each.
struct Angles {
    std::vector<float> cos, sin;

    explicit Angles(int64_t size) : cos(size), sin(size) {}

    void read(int dtype, const void* cos_of, const void* sin_of, int64_t token) {
        const int64_t size = (int64_t)cos.size();
        read_any(dtype, cos_of, token * size, size, cos.data());
        read_any(dtype, sin_of, token * size, size, sin.data());
    }
};

template <bool BACK>
inline void turn(float* x, const Angles& angle) {
    const int64_t half = (int64_t)angle.cos.size() / 2;
    const float *cos = angle.cos.data(), *sin = angle.sin.data();
    float *a = x, *b = x + half;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        const float p = a[j], q = b[j];
        a[j] = BACK ? p * cos[j] + q * sin[j + half] : p * cos[j] - q * sin[j];
        b[j] = BACK ? q * cos[j + half] - p * sin[j] : q * cos[j + half] + p * sin[j + half];
    }
}

}  // namespace
}  // namespace reasonrl
