// What packed.cpp's threads share out, and what they do with a row: its scores become weights, a
// head is turned.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "tiles.h"

namespace reasonrl {
namespace {

constexpr int64_t CHUNK = 48;      // queries at once: whole groups of vectors
constexpr int64_t TOGETHER = 192;  // queries that completions may have in a run
constexpr int64_t RUNS = 8;        // or this part of all of their prompt's

// `n` queries of a block from its `first` on, at `token`: what they see stands in rows, so many of
// their prompt and, from `own` on, those of their block up to themselves.
struct Chunk {
    int64_t token, first, n, prompt, own;

    // Rows up to the last query's own, in whole tiles of `high`.
    INLINE int64_t end(int64_t high) const { return own + (first + n + high - 1) / high * high; }
};

// f(a chunk, a head of queries) for all that a key head has of a block.
template <class F>
INLINE void each_chunk(const PackedBlock& block, int64_t prompt, int64_t key_head, int64_t group,
                       F f) {
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++) {
        for (int64_t first = 0; first < block.count; first += CHUNK) {
            const int64_t n = std::min<int64_t>(CHUNK, block.count - first);
            f(Chunk{block.start + first, first, n, prompt, vectors(prompt)}, h);
        }
    }
}

// f(row, lanes that see it, lanes that see the next) for each two rows that queries `at` to `at` +
// LANES of a chunk may see, padding between prompt and block included.
template <class F>
INLINE void each_two(const Chunk& c, int64_t at, int64_t end, F f) {
    VecI lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
    const VecI all = lane < (int32_t)(c.n - at), none = {};
    const int64_t even = c.prompt / 2 * 2, own = c.own + c.first + at;
    for (int64_t j = 0; j < even; j += 2) f(j, all, all);
    for (int64_t j = even; j < c.own; j += 2) f(j, j < c.prompt ? all : none, none);
    for (int64_t j = c.own; j < own; j += 2) f(j, all, all);
    for (int64_t j = own; j < std::min(end, own + LANES); j += 2) {
        const int32_t i = (int32_t)(j - own);
        f(j, all & (lane >= i), all & (lane > i));
    }
}

// By which scores become weights, 2^(scale score - top) share: a vector of queries.
struct Weighing {
    float scale;
    Vec top, share;

    INLINE Vec raised(Vec score) const { return two_to(score * scale - top); }
};

// N vectors of each half of a head from `at` on, turned by its angles, or back: all are read before
// any is written, so that no read meets what was just written.
template <bool BACK, int N, class Take, class Give>
INLINE void turn_vectors(const float* cos, const float* sin, int64_t at, int64_t half, Take take,
                         Give give) {
    Vec x[N], y[N];
    _Pragma("GCC unroll 2") for (int k = 0; k < N; k++) {
        const int64_t j = at + k * LANES;
        const Vec p = take(j), q = take(half + j), a = load(sin + j), b = load(sin + half + j);
        x[k] = p * load(cos + j) + q * (BACK ? b : -a);
        y[k] = q * load(cos + half + j) + p * (BACK ? -a : b);
    }
    _Pragma("GCC unroll 2") for (int k = 0; k < N; k++) {
        const int64_t j = at + k * LANES;
        give(j, half - j, x[k]);
        give(half + j, half - j, y[k]);
    }
}

// A head: `take` gives its numbers from one on, `give` gets as many as are left of a half.
template <bool BACK, class Take, class Give>
INLINE void turn_head(const float* cos, const float* sin, int64_t half, Take take, Give give) {
    int64_t at = 0;
    for (; half - at > LANES; at += 2 * LANES) {
        turn_vectors<BACK, 2>(cos, sin, at, half, take, give);
    }
    if (at < half) turn_vectors<BACK, 1>(cos, sin, at, half, take, give);
}

#ifdef __AVX512F__
// Heads of at most N vectors, turned where they stand as turn_head does, but in as many vectors as
// they fill: by masks, so that nothing beside a head is touched. A token's heads share its angles.
template <int N>
struct ShortTurn {
    int64_t half;
    __mmask16 all[N], first[N], second[N];  // lanes of a head, of its halves
    Vec cos[N], sin[N];

    INLINE explicit ShortTurn(int64_t size) : half(size / 2) {
        for (int64_t v = 0; v < N; v++) {
            const auto before = [v](int64_t end) INLINE_BODY {
                const int64_t lanes = std::max<int64_t>(0, end - v * LANES);
                return (1u << std::min<int64_t>(LANES, lanes)) - 1;
            };
            all[v] = before(size), first[v] = before(half), second[v] = all[v] & ~first[v];
        }
    }

    INLINE void angles(const float* c, const float* s) {
        _Pragma("GCC unroll 4") for (int v = 0; v < N; v++) {
            const __m512 b = _mm512_maskz_loadu_ps(all[v], s + v * LANES);
            cos[v] = (Vec)_mm512_maskz_loadu_ps(all[v], c + v * LANES);
            sin[v] = (Vec)_mm512_mask_sub_ps(b, first[v], __m512{}, b);
        }
    }

    INLINE void turn(uint16_t* head) const {
        Vec x[N];
        _Pragma("GCC unroll 4") for (int v = 0; v < N; v++) {
            uint16_t* at = head + v * LANES;
            const __m256i own = _mm256_maskz_loadu_epi16(all[v], at);
            const __m256i later = _mm256_maskz_loadu_epi16(first[v], at + half);
            // where there is none, nothing is read of the head before, which was just written
            const __m256i other =
                second[v] ? _mm256_mask_loadu_epi16(later, second[v], at - half) : later;
            const __m512 turned = (__m512)(wide(other) * sin[v]);
            x[v] = (Vec)_mm512_fmadd_ps((__m512)wide(own), (__m512)cos[v], turned);
        }
        _Pragma("GCC unroll 4") for (int v = 0; v < N; v++) {
            const VecH rounded = quick(x[v]);
            const bool whole = v + 1 < N || all[v] == 0xffff;
            if (whole) memcpy(head + v * LANES, &rounded, sizeof rounded);
            if (!whole) keep_some(head + v * LANES, rounded, 2 * half - v * LANES);
        }
    }

    static INLINE Vec wide(__m256i x) {
        return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
    }
};
#endif

// f(a turn of heads of that size), unless they are too long for one.
template <class F>
INLINE bool with_turn(int64_t size, F f) {
#ifdef __AVX512F__
    const int64_t count = vectors(size) / LANES;
    if (count == 1) f(ShortTurn<1>(size));
    if (count == 2) f(ShortTurn<2>(size));
    if (count == 3) f(ShortTurn<3>(size));
    if (count == 4) f(ShortTurn<4>(size));
    return count <= 4;
#else
    return false;
#endif
}

// `count` rows of heads as words, with zero rows behind them up to `padded`. Of `all` numbers;
// what stands behind a head of even size may be read with it, and concerns no result.
template <bool DOTS>
void read_rows(const PackedTask& t, const void* from, int64_t all, int64_t at, int64_t apart,
               int64_t count, int64_t padded, Words to) {
    for (int64_t i = 0; i < padded; i++, at += apart) {
        if (DOTS && t.size % 2 == 0 && i < count && at + 2 * to.apart <= all) {
            const uint32_t* here = (const uint32_t*)((const uint16_t*)from + at);
            for (int64_t j = 0; j < to.apart; j += LANES) {
                store(to.floats(i) + j, (Vec)load_words(here + j));
            }
            continue;
        }
        memset(to.row(i), 0, to.apart * sizeof(uint32_t));
        if (i >= count) continue;
        if (DOTS) memcpy(to.row(i), (const uint16_t*)from + at, t.size * 2);
        if (!DOTS) read_any(t.dtype, from, at, t.size, to.floats(i));
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
        const auto before = [&](const PackedRun& a, const PackedRun& b) {  // as their tokens stand
            return t.blocks[a.first].start < t.blocks[b.first].start;
        };
        std::stable_sort(runs.begin(), runs.end(), before);
    }

    // Key heads that a thread takes at once: all of a run, whose lines they share, but of few runs.
    int64_t part(const PackedTask& t, int threads) const {
        return (int64_t)runs.size() >= 2 * threads ? t.key_heads : 1;
    }
};

// So many key heads of a run at once, by whoever is free: a thread's own part of the tokens first,
// whose lines it has from what made them, then what others have left.
class Dealt {
  public:
    Dealt(const PackedTask& t, const Plan& plan, int threads, int64_t at_once)
        : runs_(plan.runs), at_once_(at_once), parts_(t.key_heads / at_once), left_(threads) {
        for (int64_t k = 0; k <= threads; k++) {
            const auto before = [&](const PackedRun& run) {  // empty ones may stand at the end
                return k == threads || t.blocks[run.first].start * threads < t.tokens * k;
            };
            const auto end = std::partition_point(runs_.begin(), runs_.end(), before);
            begins_.push_back((end - runs_.begin()) * parts_);
            if (k) left_[k - 1] = begins_[k];
        }
    }

    // f(run, key head) for each. From the end, where completions are: what is last is small.
    template <class F>
    void each(F f) {
        const int64_t team = (int64_t)left_.size(), me = omp_get_thread_num();
        for (int64_t k = me; k < me + team; k++) {
            for (int64_t i; (i = --left_[k % team]) >= begins_[k % team];) {
                const int64_t first = i % parts_ * at_once_;
                for (int64_t h = first; h < first + at_once_; h++) f(runs_[i / parts_], h);
            }
        }
    }

  private:
    const std::vector<PackedRun>& runs_;
    int64_t at_once_, parts_;
    std::vector<std::atomic<int64_t>> left_;
    std::vector<int64_t> begins_;
};

}  // namespace
}  // namespace reasonrl
