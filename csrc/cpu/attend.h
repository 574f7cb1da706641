// Attention of rows whose prompt stands once for all that share it:
//
//   o = softmax(scaling q [K_prompt, K_own]^T) [V_prompt, V_own]
//
// Keys are kept in panels (product.h) of PANEL places, values in rows of whole vectors, both in the
// model's type. The queries of one key head, of several rows where their prompt is the same, share
// a pass over the prompt. Weights are float32; a query is summed in one order over its prompt and
// then its own places, whatever stands beside it.
#pragma once

#include <float.h>

#include "product.h"
#include "weights.h"

namespace reasonrl {
namespace {

// (ROWS, VECS * LANES) sums go on by n weights of each row times as many rows of values, `apart`
// numbers wide: of the first's, or each of its own (OWN).
template <int DTYPE, int ROWS, int VECS, bool OWN>
void add_values(const float* const* weight, const void* const* value, int64_t at, int64_t n,
                int64_t apart, float* out) {
    Vec sum[ROWS][VECS], x[VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) sum[r][v] = load(out + r * apart + at + v * LANES);
    }
    for (int64_t j = 0; j < n; j++) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            for (int v = 0; v < VECS && (OWN || r == 0); v++) {
                x[v] = load_as<DTYPE>(value[r], j * apart + at + v * LANES);
            }
            for (int v = 0; v < VECS; v++) sum[r][v] += x[v] * weight[r][j];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) store(out + r * apart + at + v * LANES, sum[r][v]);
    }
}

// At most FEW rows if OWN.
template <int DTYPE, int VECS, bool OWN>
void add_values_of(int64_t rows, const float* const* weight, const void* const* value, int64_t at,
                   int64_t n, int64_t apart, float* out) {
    static constexpr decltype(&add_values<DTYPE, 1, VECS, OWN>) few[FEW] = {
        add_values<DTYPE, 1, VECS, OWN>, add_values<DTYPE, 2, VECS, OWN>,
        add_values<DTYPE, 3, VECS, OWN>, add_values<DTYPE, 4, VECS, OWN>};
    static constexpr decltype(&add_values<DTYPE, 5, VECS, false>) more[4] = {
        add_values<DTYPE, 5, VECS, false>, add_values<DTYPE, 6, VECS, false>,
        add_values<DTYPE, 7, VECS, false>, add_values<DTYPE, 8, VECS, false>};
    (rows <= FEW ? few[rows - 1] : more[rows - 5])(weight, value, at, n, apart, out);
}

// What one thread needs to attend. Rooms are in whole panels.
template <int DTYPE>
class Attention {
  public:
    Attention(const DecodeModel& m)
        : m_(m),
          group_(m.heads / m.key_heads),
          padded_(vectors(m.size)),
          keys_(words(DTYPE, m.size) * PANEL),
          room_(m.prompt_room + m.own_room),
          query_(TILE * m.size + LANES),
          weight_(TILE * room_),
          out_(TILE * padded_),
          row_(m.size + LANES),
          norm_(m.size),
          key_(m.size + LANES) {}

    // The angles of these rows; before anything else is done with them.
    void read_angles(const DecodeRows& rows) {
        const int64_t size = m_.size;
        angles_.resize(rows.rows * 2 * (size + LANES));
        float* to = angles_.data();
        for (int64_t i = 0; i < rows.rows; i++) {
            for (const void* from : {m_.cos, m_.sin}) {
                read_any(m_.angle_dtype, from, rows.position[i] * size, size, to);
                to += size + LANES;
            }
        }
    }

    // The key and value of row i to place n of a slot; behind qkv's end stands another vector.
    void place(const DecodeLayer& layer, const Kept& kept, int64_t room, int64_t slot, int64_t n,
               const void* qkv, int64_t i, int64_t head) {
        const int64_t key = i * each() + (m_.heads + head) * m_.size;
        uint32_t* to = keys(kept, room, slot, head) + n / PANEL * keys_ + n % PANEL;
        read_head(qkv, key, layer.k_norm, layer.head_eps, i, key_.data(), 0);
        const uint32_t* from = (const uint32_t*)key_.data();
        for (int64_t k = 0; k < keys_ / PANEL; k++) to[k * PANEL] = from[k];
        char* value = values(kept, room, slot, head) + n * padded_ * WIDE;
        const char* given = (const char*)qkv + (key + m_.key_heads * m_.size) * WIDE;
        for (int64_t k = 0; k < padded_ * WIDE; k += LANES * WIDE) {
            memcpy(value + k, given + k, LANES * WIDE);
        }
    }

    // Rows first .. first + count of one prompt, at the queries of a key head.
    void attend(const DecodeLayer& layer, const DecodeRows& rows, int64_t first, int64_t count,
                int64_t head, const void* qkv, void* seen) {
        for (int64_t at = 0; at < count * group_; at += TILE) {
            const int64_t left = count * group_ - at, n = left < TILE ? left : TILE;
            some(layer, rows, first, at, n, head, qkv, seen);
        }
    }

  private:
    static constexpr int64_t WIDE = DTYPE == F32 ? 4 : 2;
    static constexpr int MOST =
        LANES == 16 ? 3 : 2;  // vectors of values that TILE sums leave room for

    static VecI lane_numbers() {
        VecI x;
        for (int k = 0; k < LANES; k++) x[k] = k;
        return x;
    }

    int64_t each() const { return (m_.heads + 2 * m_.key_heads) * m_.size; }

    uint32_t* keys(const Kept& kept, int64_t room, int64_t slot, int64_t head) const {
        return (uint32_t*)kept.keys + (slot * m_.key_heads + head) * (room / PANEL) * keys_;
    }

    char* values(const Kept& kept, int64_t room, int64_t slot, int64_t head) const {
        return (char*)kept.values + (slot * m_.key_heads + head) * room * padded_ * WIDE;
    }

    // n queries from the `at`-th of these rows on.
    void some(const DecodeLayer& layer, const DecodeRows& rows, int64_t first, int64_t at,
              int64_t n, int64_t head, const void* qkv, void* seen) {
        int64_t begin[TILE], longest = 0;  // where a query's own places begin among its weights
        for (int64_t i = 0; i < n; i++) {
            const int64_t row = first + (at + i) / group_, prompt = rows.prompt_length[row];
            const int64_t query = row * each() + (head * group_ + (at + i) % group_) * m_.size;
            read_head(qkv, query, layer.q_norm, layer.head_eps, row, query_.data(), i * m_.size);
            begin[i] = whole(prompt);
            longest = std::max(longest, prompt);
        }
        const int64_t home = rows.home[first];
        score(keys(layer.prompt, m_.prompt_room, home, head), longest, n, layer.scaling);
        const uint32_t* key[TILE];
        const void* value[TILE];
        int64_t own[TILE];
        for (int64_t i = 0; i < n; i++) {
            const int64_t row = first + (at + i) / group_;
            own[i] = rows.own(row);
            if (!own[i]) continue;
            key[i] = keys(layer.own, m_.own_room, rows.slot[row], head);
            value[i] = values(layer.own, m_.own_room, rows.slot[row], head);
        }
        for (int64_t i = 0; i < n && rows.slot; i += FEW) {
            score_own(key + i, own + i, begin + i, i, std::min<int64_t>(FEW, n - i), layer.scaling);
        }
        float share[TILE];
        for (int64_t i = 0; i < n; i++) {
            float* weight = weight_.data() + i * room_;
            hide(weight, rows.prompt_length[first + (at + i) / group_], begin[i]);
            hide(weight + begin[i], own[i], vectors(own[i]));
            share[i] = soften(weight, begin[i] + vectors(own[i]));
            // a shorter prompt's weights go on as zeros
            for (int64_t j = begin[i]; j < longest && !rows.slot; j++) weight[j] = 0.0f;
        }
        std::fill(out_.begin(), out_.end(), 0.0f);
        const float* weight[TILE];
        for (int64_t i = 0; i < n; i++) weight[i] = weight_.data() + i * room_;
        const void* shared = values(layer.prompt, m_.prompt_room, home, head);
        add<false>(weight, &shared, longest, 0, n);
        for (int64_t i = 0; i < n && rows.slot; i += FEW) {
            add_own(weight + i, value + i, own + i, begin + i, i, std::min<int64_t>(FEW, n - i));
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t row = first + (at + i) / group_, q = head * group_ + (at + i) % group_;
            const float* out = out_.data() + i * padded_;
            for (int64_t c = 0; c < m_.size; c += LANES) {
                keep<DTYPE>(seen, (row * m_.heads + q) * m_.size + c,
                            as<DTYPE>(load(out + c) * share[i]), m_.size - c);
            }
        }
    }

    static int64_t whole(int64_t places) { return (places + PANEL - 1) / PANEL * PANEL; }

    // A head of row i, normed where there is a norm, and turned; `to` has a vector more.
    void read_head(const void* qkv, int64_t from, const void* norm, float eps, int64_t i, void* to,
                   int64_t at) {
        if (!norm) return turn_head<DTYPE>(qkv, from, i, to, at);
        const int64_t size = m_.size;
        float* x = row_.data();
        read<DTYPE>(qkv, from, (int)size, x);
        float square = 0.0f;
        for (int64_t j = 0; j < size; j++) square += x[j] * x[j];
        const float scale = 1.0f / sqrtf(square / (float)size + eps);
        for (int64_t j = 0; j < size; j++) x[j] *= scale;
        write<DTYPE>(key_.data(), 0, (int)size, x);  // rounded, as its module does
        read<DTYPE>(key_.data(), 0, (int)size, x);
        read_any(m_.norm_dtype, norm, 0, size, norm_.data());
        for (int64_t j = 0; j < size; j++) x[j] *= norm_[j];
        turn_head<F32>(x, 0, i, to, at);
    }

    // From behind, since the last vectors of both halves write behind their ends.
    template <int FROM>
    INLINE void turn_head(const void* x, int64_t from, int64_t i, void* to, int64_t at) {
        const int64_t half = m_.size / 2, apart = m_.size + LANES;
        const float *cos = angles_.data() + 2 * i * apart, *sin = cos + apart;
        for (int64_t j = vectors(half) - LANES; j >= 0; j -= LANES) {
            const Vec a = load_as<FROM>(x, from + j), b = load_as<FROM>(x, from + half + j);
            const Vec p = a * load(cos + j) - b * load(sin + j);
            const Vec q = b * load(cos + half + j) + a * load(sin + half + j);
            keep<DTYPE>(to, at + j, as<DTYPE>(p), LANES);
            keep<DTYPE>(to, at + half + j, as<DTYPE>(q), LANES);
        }
    }

    // Scores of n queries with `places` keys that they share.
    void score(const uint32_t* key, int64_t places, int64_t n, float scaling) {
        alignas(64) float sum[TILE * PANEL];
        for (int64_t p = 0; p < places; p += PANEL, key += keys_) {
            tile_of<false>(DTYPE, m_.dots, n)(query_.data(), m_.size, &key, sum);
            for (int64_t r = 0; r < n; r++) keep_scores(sum, r, r * room_ + p, scaling);
        }
    }

    // Of n <= FEW queries from the i-th on, each with its own keys, among its weights from `begin`
    // on. Keys behind a query's last panel are its last panel again, which is not kept.
    void score_own(const uint32_t* const* key, const int64_t* own, const int64_t* begin, int64_t i,
                   int64_t n, float scaling) {
        alignas(64) float sum[FEW * PANEL];
        const uint32_t* panel[FEW];
        const void* query = (const char*)query_.data() + i * m_.size * WIDE;
        for (int64_t p = 0, last; p < *std::max_element(own, own + n); p += PANEL) {
            for (int64_t r = 0; r < n; r++) {
                last = whole(own[r]) - PANEL;
                panel[r] = key[r] + std::min(p, last) / PANEL * keys_;
            }
            tile_of<true>(DTYPE, m_.dots, n)(query, m_.size, panel, sum);
            for (int64_t r = 0; r < n; r++) {
                if (p < own[r]) keep_scores(sum, r, (i + r) * room_ + begin[r] + p, scaling);
            }
        }
    }

    void keep_scores(const float* sum, int64_t r, int64_t at, float scaling) {
        for (int64_t c = 0; c < PANEL; c += LANES) {
            store(weight_.data() + at + c, load(sum + r * PANEL + c) * scaling);
        }
    }

    // No weight for what stands behind the `places` that are seen.
    static void hide(float* weight, int64_t places, int64_t end) {
        for (int64_t j = places / LANES * LANES; j < end; j += LANES) {
            store(weight + j, select(lane_numbers() < (int32_t)(places - j), load(weight + j),
                                     Vec{} - FLT_MAX));
        }
    }

    // The values of `places`, to the sums of n queries from the i-th on.
    template <bool OWN>
    void add(const float* const* weight, const void* const* value, int64_t places, int64_t i,
             int64_t n) {
        float* out = out_.data() + i * padded_;
        for (int64_t c = 0, vecs; c < padded_; c += vecs * LANES) {
            const int64_t left = (padded_ - c) / LANES;
            vecs = MOST == 3 && left % 3 == 0 ? 3 : std::min<int64_t>(left, 2);
            auto* of = vecs == 3   ? add_values_of<DTYPE, MOST, OWN>
                       : vecs == 2 ? add_values_of<DTYPE, 2, OWN>
                                   : add_values_of<DTYPE, 1, OWN>;
            of(n, weight, value, c, places, padded_, out);
        }
    }

    // Those that each of n <= FEW queries has for itself: as many as all have, then what is left.
    void add_own(const float* const* weight, const void* const* value, const int64_t* own,
                 const int64_t* begin, int64_t i, int64_t n) {
        const int64_t least = *std::min_element(own, own + n);
        const float* from[FEW];
        for (int64_t r = 0; r < n; r++) from[r] = weight[r] + begin[r];
        add<true>(from, value, least, i, n);
        for (int64_t r = 0; r < n; r++) {
            from[r] += least;
            const void* rest = (const char*)value[r] + least * padded_ * WIDE;
            if (own[r] > least) add<true>(from + r, &rest, own[r] - least, i + r, 1);
        }
    }

    const DecodeModel& m_;
    const int64_t group_, padded_, keys_, room_;
    std::vector<float> query_, weight_, out_, row_, norm_, key_, angles_;
};

}  // namespace
}  // namespace reasonrl
