// What SwiGLU's gradient is of some lanes; see layers.cpp.
#pragma once

#include "lanes.h"

namespace reasonrl {
namespace {

// Of `by`, the gradient of lanes that stand at `from` in gate and up, to `to` in theirs; what they
// gave goes to `dense`, where it is wanted. By local pointers: stores might change those of a task.
template <int T>
INLINE void ungate(const void* gate, const void* up, int64_t from, int64_t left, Vec by,
                   void* by_gate, void* by_up, int64_t to, void* again, int64_t dense) {
    const Vec g = take<T>(gate, from, left), u = take<T>(up, from, left);
    const Vec s = sigmoid(g), silu = g * s;
    give<T>(by_gate, to, left, by * u * (s + silu * (1.0f - s)));
    give<T>(by_up, to, left, by * silu);
    if (again) give<T>(again, dense, left, silu * u);
}

}  // namespace
}  // namespace reasonrl
