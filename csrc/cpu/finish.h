// Where the sums of a product go (linear.cpp): `ask` for the lines, then, LANES sums of a row from
// a column on, of which `left` columns are left. SHORT: straight from registers.
#pragma once

#include "gate.h"
#include "tiles.h"

namespace reasonrl {
namespace {

template <bool DOTS>
using Number = std::conditional_t<DOTS, uint16_t, float>;

// The first `left` of LANES sums, as the result's type has them.
INLINE void settle(float* to, int64_t left, Vec x) {
    give<F32>(to, 0, left, x);
}

INLINE void settle(uint16_t* to, int64_t left, Vec x) {
    give<QUICK>(to, 0, left, x);
}

// C's rows of `Type`, one behind the other.
template <class Type>
struct Rows {
    static constexpr bool SHORT = true;
    Type* out;
    int64_t width;

    INLINE void ask(int64_t row, int64_t j, int64_t count) const {
        soon(out + row * width + j, count);
    }

    INLINE void operator()(int64_t row, int64_t j, int64_t left, Vec x) const {
        settle(out + row * width + j, left, x);
    }
};

// C, as the product's type has it, added to float32 rows.
template <bool DOTS>
struct Onto {
    static constexpr bool SHORT = true;
    const float* x;
    float* out;
    int64_t width;

    INLINE void ask(int64_t row, int64_t j, int64_t count) const {
        soon(x + row * width + j, count);
        soon(out + row * width + j, count);
    }

    INLINE void operator()(int64_t row, int64_t j, int64_t left, Vec y) const {
        const int64_t at = row * width + j;
        give<F32>(out, at, left, take<F32>(x, at, left) + as<DOTS ? QUICK : F32>(y));
    }
};

// C is the gradient of what a gate let through.
template <bool DOTS>
struct Ungated {
    static constexpr bool SHORT = false;
    GateTask t;
    GateGrad d;

    INLINE void ask(int64_t row, int64_t j, int64_t count) const {
        const Number<DOTS>*gate = (const Number<DOTS>*)t.gate, *up = (const Number<DOTS>*)t.up;
        soon(gate + row * t.stride + j, count);
        soon(up + row * t.stride + j, count);
    }

    INLINE void operator()(int64_t row, int64_t j, int64_t left, Vec x) const {
        constexpr int T = DOTS ? QUICK : F32;
        const int64_t from = row * t.stride + j, to = row * d.stride + j;
        ungate<T>(t.gate, t.up, from, left, as<T>(x), d.grad_gate, d.grad_up, to, d.again,
                  row * t.width + j);
    }
};

}  // namespace
}  // namespace reasonrl
