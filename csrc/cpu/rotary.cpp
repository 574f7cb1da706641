// The rotary embedding of a decoder's queries and keys, before their heads are set apart:
//
//   halves a, b of a head:  a' = a cos_a - b sin_a,  b' = b cos_b + a sin_b
//   backward                da = da' cos_a + db' sin_b,  db = db' cos_b - da' sin_a
//
// One pass where plain torch makes nine, in float32, rounded once.
#include "rotary.h"

#include <algorithm>

namespace reasonrl {
namespace ISA {
namespace {

template <bool BACK>
void turn_all(const RotaryTask& t, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Angles angle(t.size);
        std::vector<float> row(t.size * std::max(t.heads, t.key_heads));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < t.tokens; i++) {
            angle.read(t.angle_dtype, t.cos, t.sin, i);
            for (const bool keys : {false, true}) {
                const int64_t width = t.size * (keys ? t.key_heads : t.heads);
                const int64_t at = i * (keys ? t.k_stride : t.q_stride);
                read_any(t.dtype, keys ? t.k : t.q, at, width, row.data());
                for (int64_t h = 0; h < width; h += t.size) turn<BACK>(row.data() + h, angle);
                write_any(t.out_dtype, keys ? t.k_out : t.q_out, i * width, width, row.data());
            }
        }
    }
}

}  // namespace

void rotary(const RotaryTask& task, bool back, int threads) {
    (back ? turn_all<true> : turn_all<false>)(task, threads);
}

}  // namespace ISA
}  // namespace reasonrl
