// Vectors as wide as the instruction set that a source is compiled for, a token in each lane.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <utility>

#include "../ops.h"

namespace reasonrl {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// registers stay registers across small functions and the bodies of loops
#define INLINE_BODY __attribute__((always_inline))
#define INLINE inline INLINE_BODY

// Lanes of x and y by number, those of y counted on; Index: integers as wide as the lanes
#ifdef __clang__
#define REASONRL_SHUFFLE(Index, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define REASONRL_SHUFFLE(Index, x, y, ...) __builtin_shuffle(x, y, Index{__VA_ARGS__})
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * LANES)));
typedef double VecD __attribute__((vector_size(8 * LANES)));

inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, Vec x) {
    memcpy(to, &x, sizeof x);
}

inline VecI load_bits(const int32_t* from) {
    VecI x;
    memcpy(&x, from, sizeof x);
    return x;
}

// LANES numbers of bf16. By name: some compilers widen them in many steps.
INLINE Vec load_bf16(const uint16_t* from) {
#if defined(__AVX512F__)
    const VecI wide = (VecI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    const VecI wide = (VecI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    VecH half;
    memcpy(&half, from, sizeof half);
    const VecI wide = __builtin_convertvector(half, VecI);
#endif
    return (Vec)(wide << 16);
}

// x where the mask has bits, else 0, whatever x is.
inline Vec where(VecI mask, Vec x) {
    return (Vec)((VecI)x & mask);
}

inline double sum_of(VecD x) {
    double sum = 0.0;
    for (int k = 0; k < LANES; k++) sum += x[k];
    return sum;
}

INLINE float total_of(Vec x) {
    double sum = 0.0;
    for (int k = 0; k < LANES; k++) sum += (double)x[k];
    return (float)sum;
}

INLINE float sum_of_lanes(Vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    return total_of(x);
#endif
}

// How many numbers the whole vectors have that n of them fill.
INLINE int64_t vectors(int64_t n) {
    return (n + LANES - 1) / LANES * LANES;
}

}  // namespace

// One instruction each, which compilers do not always make of a < b ? a : b.
#if defined(__AVX512F__)
#define REASONRL_VEC(op) _mm512_##op##_ps
#elif defined(__AVX2__)
#define REASONRL_VEC(op) _mm256_##op##_ps
#elif defined(__SSE2__)
#define REASONRL_VEC(op) _mm_##op##_ps
#endif
#ifdef REASONRL_VEC
template <>
INLINE Vec min_of(Vec a, Vec b) {
    return (Vec)REASONRL_VEC(min)(a, b);
}
template <>
INLINE Vec max_of(Vec a, Vec b) {
    return (Vec)REASONRL_VEC(max)(a, b);
}
#endif

namespace {

constexpr float LOG2_E = 1.44269504f;

// 2^f of |f| <= 1/2, two roundings away from exact; 1 of 0.
INLINE Vec two_to_part(Vec f) {
    const Vec f2 = f * f;
    const Vec low = 2.4022647738e-1f * f + 6.9314718246e-1f;
    const Vec middle = 9.6184369177e-3f * f + 5.5503323674e-2f;
    const Vec high = 1.5353361960e-4f * f + 1.3398875017e-3f;
    return ((high * f2 + middle) * f2 + low) * f + 1.0f;
}

#ifdef __AVX512F__
INLINE Vec nearest(Vec x) {
    return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
}

// x 2^n of whole n, down to 0.
INLINE Vec scaled(Vec x, Vec n) {
    return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
}

// In place of math.h's: 1 / (1 + 2^y), y = -x log2 e in two parts.
INLINE Vec sigmoid(Vec x) {
    const Vec most = Vec{} + 87.0f, y = min_of(most, max_of(-most, -x));
    const Vec n = nearest(y * LOG2_E), f = (y * LOG2_E - n) + y * 1.92596303e-8f;
    return 1.0f / (1.0f + scaled(two_to_part(f), n));
}
#endif

// 2^x where that is a normal number; NaN is kept. Below, AVX-512 goes on to 0, others stop at the
// least normal number.
INLINE Vec two_to(Vec x) {
#ifdef __AVX512F__
    const Vec n = nearest(x);
    return scaled(two_to_part(x - n), n);
#else
    x = min_of(Vec{} + 127.0f, max_of(Vec{} - 126.0f, x));
    const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
    const Vec shifted = x + magic;
    return two_to_part(x - (shifted - magic)) * (Vec)(((VecI)shifted << 23) + (127 << 23));
#endif
}

// Of numbers; where one is NaN, any.
INLINE float largest_lane(Vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float top = x[0];
    for (int k = 1; k < LANES; k++) top = max_of(top, x[k]);
    return top;
#endif
}

}  // namespace

}  // namespace reasonrl
