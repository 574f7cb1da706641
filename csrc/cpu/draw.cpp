// A token a row by the inverse transform, and its log p:
//
//   y = u / tau,  w = exp(y - max y),  token = the first whose sum of w up to it exceeds
//   uniform * sum w,  logp = y[token] - max y - log sum w
//
// In two levels, so that nothing of the vocabulary's size is written: sums of blocks, then the
// block that is meant once more. Weights are float32, their sums double. A row that has no
// distribution (NaN, inf, or -inf alone) gives token 0 with log p NaN.
#include <math.h>

#include <vector>

#include "block.h"
#include "share.h"
#include "vector.h"

namespace reasonrl {
namespace ISA {
namespace {

struct Row {
    const DrawTask& task;
    int64_t row;
    std::vector<float> x;
    std::vector<double> ends;  // of the blocks, summed

    explicit Row(const DrawTask& t)
        : task(t),
          row(0),
          x(t.vocab < BLOCK ? vectors(t.vocab) : BLOCK),
          ends((t.vocab + BLOCK - 1) / BLOCK) {}

    // Scaled logits of a block, -inf behind the row's end in its last vector; how many there are.
    int64_t read(int64_t block) {
        const int64_t at = block * BLOCK, left = task.vocab - at;
        const int64_t n = left < BLOCK ? left : BLOCK;
        read_any(task.dtype, task.logits, row * task.vocab + at, n, x.data());
        for (int64_t j = n; j < vectors(n); j++) x[j] = -INFINITY;
        if (task.temperature != 1.0f) {
            for (int64_t j = 0; j < n; j++) x[j] /= task.temperature;
        }
        return n;
    }

    // The largest of the row; NaN where it has no distribution.
    float largest() {
        Vec most = Vec{} - INFINITY;
        VecI broken = {};
        for (int64_t b = 0; b < (int64_t)ends.size(); b++) {
            const int64_t n = read(b);
            for (int64_t j = 0; j < n; j += LANES) {
                const Vec v = load(&x[j]);
                most = max_of(most, v);
                broken |= ~(v < Vec{} + INFINITY);
            }
        }
        float top = most[0];
        for (int k = 0; k < LANES; k++) {
            if (broken[k]) return NAN;
            top = max_of(top, most[k]);
        }
        return top == -INFINITY ? NAN : top;
    }

    // The weights of a block take the place of its n logits.
    Vec weigh(float top, int64_t n) {
        Vec sum = {};
        for (int64_t j = 0; j < n; j += LANES) {
            const Vec v = load(&x[j]) - top;
            const Vec w = where(v > -87.0f, exp_of(max_of(v, Vec{} - 87.0f)));
            store(&x[j], w);
            sum += w;
        }
        return sum;
    }

    void draw() {
        const float top = largest();
        task.token[row] = 0, task.logp[row] = NAN;
        if (top != top) return;
        double total = 0.0;
        for (int64_t b = 0; b < (int64_t)ends.size(); b++) {
            const int64_t n = read(b);
            const Vec sum = weigh(top, n);
            for (int k = 0; k < LANES; k++) total += (double)sum[k];
            ends[b] = total;
        }
        const double aim = task.uniform[row] * total;
        int64_t block = 0;
        while (block + 1 < (int64_t)ends.size() && !(ends[block] > aim)) block++;
        const int64_t first = block * BLOCK, left = task.vocab - first;
        const int64_t n = left < BLOCK ? left : BLOCK;
        if (left > BLOCK) read(block), weigh(top, n);  // else its weights stand there still
        double sum = block ? ends[block - 1] : 0.0;
        int64_t at = 0;  // rounding may aim past the block's own sum: its last with any weight
        for (int64_t j = 0; j < n; j++) {
            if (!(x[j] > 0.0f)) continue;
            at = j, sum += (double)x[j];
            if (sum > aim) break;
        }
        float y;
        read_any(task.dtype, task.logits, row * task.vocab + first + at, 1, &y);
        task.token[row] = first + at;
        task.logp[row] = (float)((double)(y / task.temperature - top) - log(total));
    }
};

}  // namespace

void draw_share(const DrawTask& t, int64_t begin, int64_t end) {
    Row one(t);
    for (int64_t i = begin; i < end; i++) {
        one.row = i;
        one.draw();
    }
}

void draw(const DrawTask& t, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(t.rows);
        draw_share(t, mine.begin, mine.end);
    }
}

}  // namespace ISA
}  // namespace reasonrl
