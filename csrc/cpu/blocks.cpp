// Heads of packed tokens as blocks for batched products, and their sums back:
//
//   spread   blocks[n, h, w] = rows[place[n, w], h], turned by the row's angles where there are
//   any;
//            zeros where place[n, w] < 0
//   gather   rows[l, h] = sum of blocks[n, h, w] over the places (n, w) of row l, turned back
//
// The second is the gradient of the first. Summed in float32 in the order of a row's places, which
// the packing alone decides. Shapes: N blocks of W places, L rows, H heads of size d.
#include <string.h>

#include <algorithm>
#include <vector>

#include "rotary.h"

namespace reasonrl {
namespace ISA {

void spread(const SpreadTask& t, int threads) {
    const int64_t item = t.dtype == F32 ? 4 : 2, bytes = t.size * item;
#pragma omp parallel num_threads(threads)
    {
        Angles angle(t.size);
        std::vector<float> heads(t.heads * t.size);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < t.blocks * t.width; i++) {
            const int64_t row = t.place[i], n = i / t.width, w = i % t.width;
            const bool turned = t.cos && row >= 0;
            if (turned) {
                angle.read(t.angle_dtype, t.cos, t.sin, row);
                read_any(t.dtype, t.rows, row * t.stride, t.heads * t.size, heads.data());
            }
            for (int64_t h = 0; h < t.heads; h++) {
                const int64_t to = ((n * t.heads + h) * t.width + w) * t.size;
                char* out = (char*)t.out + to * item;
                if (turned) {
                    turn<false>(heads.data() + h * t.size, angle);
                    write_any(t.dtype, t.out, to, t.size, heads.data() + h * t.size);
                } else if (row < 0) {
                    memset(out, 0, bytes);
                } else {
                    memcpy(out, (const char*)t.rows + (row * t.stride + h * t.size) * item, bytes);
                }
            }
        }
    }
}

void gather(const GatherTask& t, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Angles angle(t.size);
        std::vector<float> sum(t.heads * t.size), head(t.size);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < t.rows; row++) {
            if (t.first[row] == t.first[row + 1]) std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t e = t.first[row]; e < t.first[row + 1]; e++) {
                const int64_t part = t.place[e] & 1, place = t.place[e] >> 1;
                const int64_t width = t.width[part], n = place / width, w = place % width;
                const bool first = e == t.first[row];
                for (int64_t h = 0; h < t.heads; h++) {
                    const int64_t at = ((n * t.heads + h) * width + w) * t.size;
                    float* into = sum.data() + h * t.size;
                    read_any(t.dtype, t.blocks[part], at, t.size, first ? into : head.data());
                    for (int64_t j = 0; j < t.size && !first; j++) into[j] += head[j];
                }
            }
            if (t.cos) {
                angle.read(t.angle_dtype, t.cos, t.sin, row);
                for (int64_t h = 0; h < t.heads; h++) turn<true>(sum.data() + h * t.size, angle);
            }
            write_any(t.dtype, t.out, row * t.stride, t.heads * t.size, sum.data());
        }
    }
}

}  // namespace ISA
}  // namespace reasonrl
