// Numbers of any storage type, a vector at a time.
#pragma once

#include <type_traits>

#include "block.h"
#include "vector.h"

namespace reasonrl {
namespace {

typedef uint32_t VecU __attribute__((vector_size(4 * LANES)));

// bf16 rounded by one instruction, where the CPU has it: the same bits but that numbers below the
// least normal one become 0 and a NaN keeps its sign.
constexpr int QUICK = -1;

#ifdef __AVX512F__
INLINE VecH quick(Vec x) {
    VecH half;
    asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(x));
    return half;
}
// By name: some compilers widen them in many steps.
INLINE Vec widened(VecH half) {
    return (Vec)((VecI)_mm512_cvtepu16_epi32((__m256i)half) << 16);
}
INLINE bool is_quick() {
    return __builtin_cpu_supports("avx512bf16");
}
INLINE void keep_some(uint16_t* to, VecH half, int64_t count) {
    const uint32_t first = count < LANES ? (1u << count) - 1 : 0xffffu;
    _mm256_mask_storeu_epi16(to, (__mmask16)first, (__m256i)half);
}
#else
INLINE VecH quick(Vec) {
    return VecH{};
}
INLINE Vec widened(VecH) {
    return Vec{};
}
INLINE bool is_quick() {
    return false;
}
INLINE void keep_some(uint16_t*, VecH, int64_t) {}
#endif

// x, rounded to the type.
template <int DTYPE>
INLINE Vec as(Vec x) {
    if (DTYPE == QUICK) return widened(quick(x));
    if (DTYPE == F16) {
        for (int k = 0; k < LANES; k++) x[k] = from_f16(to_f16(x[k]));
    }
    if (DTYPE != BF16) return x;
    const VecU bits = (VecU)x, near = bits + 0x7fffu + ((bits >> 16) & 1u);
    const VecU kept = select(x == x, near, VecU{} + 0x7fc00000u);
    return (Vec)(kept & 0xffff0000u);
}

// The first `count` lanes of x (float32 or bf16), which is rounded to the type already.
template <int DTYPE>
INLINE void keep(void* data, int64_t at, Vec x, int64_t count) {
    const VecH half = __builtin_convertvector((VecU)x >> 16, VecH);
    float* floats = (float*)data + at;
    uint16_t* halves = (uint16_t*)data + at;
    if (__builtin_expect(count >= LANES, 1)) {
        if (DTYPE == F32) memcpy(floats, &x, sizeof x);
        if (DTYPE == BF16) memcpy(halves, &half, sizeof half);
        return;
    }
#ifdef __AVX512F__
    const __mmask16 some = (__mmask16)((1u << count) - 1);
    if (DTYPE == F32) _mm512_mask_storeu_ps(floats, some, (__m512)x);
    if (DTYPE == BF16) _mm256_mask_storeu_epi16(halves, some, (__m256i)half);
#else
    if (DTYPE == F32) memcpy(floats, &x, count * sizeof(float));
    if (DTYPE == BF16) memcpy(halves, &half, count * sizeof(uint16_t));
#endif
}

// Numbers from `at` on, of which there are `left`: zeros behind them.
template <int DTYPE>
INLINE Vec take(const void* data, int64_t at, int64_t left) {
    constexpr int KIND = DTYPE == QUICK ? BF16 : DTYPE;
    if (__builtin_expect(left >= LANES, 1)) {
        if (KIND == F32) return load((const float*)data + at);
        if (KIND == BF16) return load_bf16((const uint16_t*)data + at);
    }
    float some[LANES] = {};
    read<KIND>(data, at, (int)(left < LANES ? left : LANES), some);
    return load(some);
}

template <int DTYPE>
INLINE void give(void* data, int64_t at, int64_t left, Vec x) {
    if (__builtin_expect(left >= LANES, 1)) {
        if (DTYPE == F32) return store((float*)data + at, x);
        if (DTYPE == BF16) return keep<BF16>(data, at, as<BF16>(x), LANES);
    }
    if (DTYPE == QUICK) {
        const VecH half = quick(x);
        if (left >= LANES) memcpy((uint16_t*)data + at, &half, sizeof half);
        if (left < LANES) keep_some((uint16_t*)data + at, half, left);
        return;
    }
    if (DTYPE != F16) return keep<DTYPE>(data, at, as<DTYPE>(x), left);
    float some[LANES];
    store(some, x);
    write<DTYPE>(data, at, (int)(left < LANES ? left : LANES), some);
}

// f(a constant that is the type).
template <class F>
INLINE void of_type(int dtype, F f) {
    const bool quick = is_quick();
    if (dtype == F32) f(std::integral_constant<int, F32>{});
    if (dtype == BF16 && quick) f(std::integral_constant<int, QUICK>{});
    if (dtype == BF16 && !quick) f(std::integral_constant<int, BF16>{});
    if (dtype == F16) f(std::integral_constant<int, F16>{});
}

}  // namespace
}  // namespace reasonrl
