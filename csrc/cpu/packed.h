// What packed.cpp's threads share out, and what they do with a row: its scores become weights, a
// head is turned.
#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace reasonrl {
namespace {

constexpr float LOWEST = -87.0f;   // less is no weight
constexpr int64_t TOGETHER = 192;  // queries that completions may have in a run
constexpr int64_t RUNS = 8;        // or this part of all of their prompt's

// What a row sees: so many keys of the prompt, and so many from `own` on.
struct Seen {
    int64_t prompt, own, mine;

    INLINE int64_t end() const { return own + vectors(mine); }
    INLINE VecI mask(int64_t j) const {
        VecI lane;
        for (int k = 0; k < LANES; k++) lane[k] = k;
        return lane < (int32_t)(j < own ? prompt - j : own + mine - j);
    }
};

// By which scores become weights: their maximum, and 1 / the sum of e^(score - maximum).
struct Weighing {
    float top, share;
};

INLINE float most_of_lanes(Vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int k = 1; k < LANES; k++) most = max_of(most, x[k]);
    return most;
#endif
}

INLINE Vec raised(Vec score, float top, VecI on) {
    const Vec x = score - top;
    return where(on & (x > LOWEST), exp_of(min_of(max_of(x, Vec{} + LOWEST), Vec{})));
}

// Scores become weights, by what `soften` gave.
INLINE void weigh(float* score, const Seen& seen, float scaling, const Weighing& by) {
    for (int64_t j = 0; j < seen.end(); j += LANES) {
        const VecI on = seen.mask(j);
        store(score + j, raised(where(on, load(score + j) * scaling), by.top, on) * by.share);
    }
}

// Scores become weights; NaN where a seen one is not finite.
INLINE Weighing soften(float* score, const Seen& seen, float scaling) {
    Vec most = Vec{} - INFINITY, sum = {};
    for (int64_t j = 0; j < seen.end(); j += LANES) {
        const VecI on = seen.mask(j);
        const Vec x = where(on, load(score + j) * scaling);
        sum += 0.0f * x;
        most = max_of(most, select(on, x, Vec{} - INFINITY));
        store(score + j, x);
    }
    const float top = most_of_lanes(most);
    for (int64_t j = 0; j < seen.end(); j += LANES) {
        const Vec e = raised(load(score + j), top, seen.mask(j));
        store(score + j, e);
        sum += e;
    }
    const Weighing by = {top, 1.0f / sum_of_lanes(sum)};
    for (int64_t j = 0; j < seen.end(); j += LANES) store(score + j, load(score + j) * by.share);
    return by;
}

// A head turned by its angles, or back; all may be read, and `out` written, a vector beyond the
// end.
template <bool BACK>
INLINE void turn_head(const float* x, const float* cos, const float* sin, int64_t half,
                      float* out) {
    for (int64_t j = 0; j < half; j += LANES) {
        const Vec p = load(x + j), q = load(x + half + j);
        const Vec other = BACK ? load(sin + half + j) : -load(sin + j);
        store(out + j, p * load(cos + j) + q * other);
    }
    for (int64_t j = 0; j < half; j += LANES) {
        const Vec p = load(x + j), q = load(x + half + j);
        const Vec other = BACK ? -load(sin + j) : load(sin + half + j);
        store(out + half + j, q * load(cos + half + j) + p * other);
    }
}

// A prompt (then it is its only block) or some completions of one.
struct PackedRun {
    int64_t first, last, prompt, place, queries;  // place: of its share of the prompt's gradient
};

struct Plan {
    std::vector<PackedRun> runs;
    int64_t columns = 0, queries = 0, rows = 0;  // the most of a block; rows of all places

    explicit Plan(const PackedTask& t) {
        std::vector<int64_t> asked(t.count);  // queries of a prompt's completions
        for (int64_t b = 0; b < t.count; b++) {
            if (t.blocks[b].prompt >= 0) asked[t.blocks[b].prompt] += t.blocks[b].count;
        }
        for (int64_t b = 0; b < t.count; b++) {
            const PackedBlock& block = t.blocks[b];
            const bool own = block.prompt < 0;
            const int64_t prompt = own ? 0 : vectors(t.blocks[block.prompt].count);
            columns = std::max(columns, prompt + vectors(block.count));
            queries = std::max(queries, vectors(block.count));
            const int64_t most = own ? 0 : std::max(TOGETHER, asked[block.prompt] / RUNS);
            if (!own && !runs.empty() && runs.back().prompt == block.prompt &&
                runs.back().queries + block.count <= most) {
                runs.back().last = b + 1, runs.back().queries += block.count;
            } else {
                runs.push_back({b, b + 1, block.prompt, rows, block.count});
                rows += own ? vectors(block.count) : prompt;
            }
        }
    }
};

}  // namespace
}  // namespace reasonrl
