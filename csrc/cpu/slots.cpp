// Attention of one new token a row over the keys and values of its slot:
//
//   keys[b, :, n] = k, values[b, :, n] = v, o = softmax(scaling q K^T) V over places 0 .. n =
//   length[b]
//
// with q and k turned by the row's angles first where there are any (rotary.cpp), in their types.
// An item is a row's key head with its query heads. Nothing behind a row's own length is read, and
// each item is summed in float32 in one order: other rows, widths and threads change no bit of it.
#include <float.h>

#include <vector>

#include "rotary.h"
#include "weights.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int HEADS = 4;  // query heads that share a pass over the keys

struct Scratch {
    int64_t size, padded;  // of a head: as it is, and in whole vectors
    std::vector<float> query, out, block, weight;
    std::vector<uint16_t> half;
    Angles angle;

    Scratch(int64_t size, int64_t longest)
        : size(size),
          padded((size + LANES - 1) / LANES * LANES),
          query(HEADS * padded),
          out(HEADS * padded),
          block(LANES * size + LANES),
          weight(HEADS * (longest + LANES)),
          half(size),
          angle(size) {}

    // A head as it stands, or turned and rounded to its type.
    void read(int dtype, const void* from, int64_t at, bool turned, float* x) {
        read_any(dtype, from, at, size, x);
        if (!turned) return;
        turn<false>(x, angle);
        if (dtype == F32) return;
        write_any(dtype, half.data(), 0, size, x);
        read_any(dtype, half.data(), 0, size, x);
    }
};

template <int ODD, int... K>
INLINE Vec every_second(Vec a, Vec b, std::integer_sequence<int, K...>) {
    return REASONRL_SHUFFLE(VecI, a, b, (2 * K + ODD)...);
}

// Lane k of the result is the sum of the lanes of x[k].
INLINE Vec sums_of(Vec* x) {
    const auto lanes = std::make_integer_sequence<int, LANES>();
    for (int n = LANES / 2; n > 0; n /= 2) {
        for (int k = 0; k < n; k++) {
            const Vec a = x[2 * k], b = x[2 * k + 1];
            x[k] = every_second<0>(a, b, lanes) + every_second<1>(a, b, lanes);
        }
    }
    return x[0];
}

// The places at .. at + n of a slot: where they stand, if their vectors are whole (DIRECT), else as
// float32, with zeros where the last vector of the last one ends.
template <int DTYPE, bool DIRECT>
INLINE const void* places(const void* slot, int64_t at, int64_t n, Scratch& s) {
    if (DIRECT) return (const char*)slot + at * s.size * (DTYPE == F32 ? 4 : 2);
    read<DTYPE>(slot, at * s.size, (int)(n * s.size), s.block.data());
    memset(s.block.data() + n * s.size, 0, LANES * sizeof(float));
    return s.block.data();
}

// Call for the places at .. at + LANES of another slot, to be read soon.
template <int DTYPE>
INLINE void fetch(const void* slot, int64_t at, const Scratch& s) {
    const int64_t width = s.size * (DTYPE == F32 ? 4 : 2);
    const char* from = (const char*)slot + at * width;
    for (int64_t k = 0; k < LANES * width; k += 64) __builtin_prefetch(from + k);
}

// scores[h] of `n` keys, in as many lanes.
template <int DTYPE, int N>
INLINE void score(const Scratch& s, const void* key, int64_t n, Vec* scores) {
    Vec part[N][LANES];
    for (int64_t j = n; j < LANES; j++) {
        for (int h = 0; h < N; h++) part[h][j] = Vec{};
    }
    for (int64_t j = 0; j < n; j++) {
        Vec sum[N] = {};
        for (int64_t c = 0; c < s.padded; c += LANES) {
            const Vec x = load_as<DTYPE>(key, j * s.size + c);
            for (int h = 0; h < N; h++) sum[h] += load(s.query.data() + h * s.padded + c) * x;
        }
        for (int h = 0; h < N; h++) part[h][j] = sum[h];
    }
    for (int h = 0; h < N; h++) scores[h] = sums_of(part[h]);
}

template <int DTYPE, int N>
INLINE void add_values(Scratch& s, const void* value, const float* weight, int64_t room,
                       int64_t n) {
    for (int64_t c = 0; c < s.padded; c += LANES) {
        Vec sum[N];
        for (int h = 0; h < N; h++) sum[h] = load(s.out.data() + h * s.padded + c);
        for (int64_t j = 0; j < n; j++) {
            const Vec x = load_as<DTYPE>(value, j * s.size + c);
            for (int h = 0; h < N; h++) sum[h] += weight[h * room + j] * x;
        }
        for (int h = 0; h < N; h++) store(s.out.data() + h * s.padded + c, sum[h]);
    }
}

// N query heads from `head` on over n places of the slot's key head; `next`: the keys after it.
template <int DTYPE, bool DIRECT, int N>
void heads(const SlotTask& t, const void* keys, const void* values, const void* next, int64_t row,
           int64_t head, int64_t n, Scratch& s) {
    constexpr int SEEN = DIRECT ? DTYPE : (int)F32;
    const int64_t room = (n + LANES - 1) / LANES * LANES;
    for (int h = 0; h < N; h++) {
        float* q = s.query.data() + h * s.padded;
        s.read(t.q_dtype, t.q, row * t.q_stride + (head + h) * s.size, t.cos, q);
        for (int64_t c = 0; c < s.padded; c++) q[c] = c < s.size ? q[c] * t.scaling * LOG2_E : 0.0f;
    }
    for (int64_t at = 0; at < n; at += LANES) {
        const int64_t count = n - at < LANES ? n - at : LANES;
        fetch<DTYPE>(values, at, s);
        Vec scores[N];
        score<SEEN, N>(s, places<DTYPE, DIRECT>(keys, at, count, s), count, scores);
        for (int h = 0; h < N; h++) {
            store(s.weight.data() + h * room + at, scores[h]);
            for (int64_t j = count; j < LANES; j++) s.weight[h * room + at + j] = -FLT_MAX;
        }
    }
    float share[N];
    for (int h = 0; h < N; h++) share[h] = soften<F32>(s.weight.data() + h * room, n);
    memset(s.out.data(), 0, N * s.padded * sizeof(float));
    for (int64_t at = 0; at < n; at += LANES) {
        const int64_t count = n - at < LANES ? n - at : LANES;
        fetch<DTYPE>(next, at, s);
        const void* value = places<DTYPE, DIRECT>(values, at, count, s);
        add_values<SEEN, N>(s, value, s.weight.data() + at, room, count);
    }
    for (int h = 0; h < N; h++) {
        float* o = s.out.data() + h * s.padded;
        for (int64_t c = 0; c < s.size; c++) o[c] *= share[h];
        write<DTYPE>(t.out, (row * t.heads + head + h) * s.size, (int)s.size, o);
    }
}

// The new key or value to its place.
template <int DTYPE>
void put(const void* from, int dtype, int64_t at, bool turned, void* slot, int64_t place,
         Scratch& s) {
    s.read(dtype, from, at, turned, s.block.data());
    write<DTYPE>(slot, place * s.size, (int)s.size, s.block.data());
}

template <int DTYPE, bool DIRECT>
void attend(const SlotTask& t, int64_t longest, int threads) {
    const int64_t group = t.heads / t.key_heads, items = t.rows * t.key_heads;
    const int64_t slot = t.width * t.size * (DTYPE == F32 ? 4 : 2);
    constexpr decltype(&heads<DTYPE, DIRECT, 1>) of[HEADS] = {
        heads<DTYPE, DIRECT, 1>, heads<DTYPE, DIRECT, 2>, heads<DTYPE, DIRECT, 3>,
        heads<DTYPE, DIRECT, 4>};
#pragma omp parallel num_threads(threads)
    {
        Scratch s(t.size, longest);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; i++) {
            char *keys = (char*)t.keys + i * slot, *values = (char*)t.values + i * slot;
            const int64_t row = i / t.key_heads, head = i % t.key_heads, n = t.length[row];
            if (t.cos) s.angle.read(t.angle_dtype, t.cos, t.sin, row);
            put<DTYPE>(t.k, t.k_dtype, row * t.k_stride + head * t.size, t.cos, keys, n, s);
            put<DTYPE>(t.v, t.v_dtype, row * t.v_stride + head * t.size, false, values, n, s);
            for (int64_t g = 0; g < group; g += HEADS) {
                const int64_t left = group - g < HEADS ? group - g : HEADS;
                of[left - 1](t, keys, values, keys + slot, row, head * group + g, n + 1, s);
            }
        }
    }
}

}  // namespace

void attend_slots(const SlotTask& task, int threads) {
    int64_t longest = 0;
    for (int64_t b = 0; b < task.rows; b++) {
        longest = task.length[b] + 1 > longest ? task.length[b] + 1 : longest;
    }
    const bool whole = task.size % LANES == 0;
    if (task.dtype == F32) (whole ? attend<F32, true> : attend<F32, false>)(task, longest, threads);
    if (task.dtype == BF16) {
        (whole ? attend<BF16, true> : attend<BF16, false>)(task, longest, threads);
    }
    if (task.dtype == F16) attend<F16, false>(task, longest, threads);
}

}  // namespace ISA
}  // namespace reasonrl
