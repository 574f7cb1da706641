// Blocks of up to 1024 values as float32, whatever the storage type; conversions that vectorise.
#pragma once

#include "../ops.h"

namespace reasonrl {
namespace {

constexpr int BLOCK = 1024;

inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float from_bf16(uint16_t h) {
    return from_bits((uint32_t)h << 16);
}

inline uint16_t to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

// 2^112 moves a half's exponent into place, subnormals included
inline float from_f16(uint16_t h) {
    const uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    const uint32_t finite = to_bits(from_bits(magnitude) * from_bits(0x77800000u));
    const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
    return from_bits(bits | ((uint32_t)(h & 0x8000u) << 16));
}

inline uint16_t to_f16(float x) {
    const uint32_t bits = to_bits(x), a = bits & 0x7fffffffu;
    const uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
    const uint32_t small = to_bits(from_bits(a) + 0.5f) - 0x3f000000u;
    uint32_t half = a < 0x38800000u ? small : normal;
    half = a >= 0x477ff000u ? 0x7c00u : half;
    half = a > 0x7f800000u ? 0x7e00u : half;
    return (uint16_t)(half | ((bits >> 16) & 0x8000u));
}

template <int DTYPE>
inline void read(const void* data, int64_t at, int n, float* __restrict out) {
    if (DTYPE == F32) {
        memcpy(out, (const float*)data + at, n * sizeof(float));
        return;
    }
    const uint16_t* __restrict from = (const uint16_t*)data + at;
#pragma omp simd
    for (int j = 0; j < n; j++) out[j] = DTYPE == BF16 ? from_bf16(from[j]) : from_f16(from[j]);
}

template <int DTYPE>
inline void write(void* data, int64_t at, int n, const float* __restrict in) {
    if (DTYPE == F32) {
        memcpy((float*)data + at, in, n * sizeof(float));
        return;
    }
    uint16_t* __restrict to = (uint16_t*)data + at;
#pragma omp simd
    for (int j = 0; j < n; j++) to[j] = DTYPE == BF16 ? to_bf16(in[j]) : to_f16(in[j]);
}

// The same where the type is known when it runs.
inline void read_any(int dtype, const void* data, int64_t at, int64_t n, float* out) {
    if (dtype == F32) read<F32>(data, at, (int)n, out);
    if (dtype == BF16) read<BF16>(data, at, (int)n, out);
    if (dtype == F16) read<F16>(data, at, (int)n, out);
}

inline void write_any(int dtype, void* data, int64_t at, int64_t n, const float* in) {
    if (dtype == F32) write<F32>(data, at, (int)n, in);
    if (dtype == BF16) write<BF16>(data, at, (int)n, in);
    if (dtype == F16) write<F16>(data, at, (int)n, in);
}

}  // namespace
}  // namespace reasonrl
