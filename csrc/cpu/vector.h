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

}  // namespace reasonrl
