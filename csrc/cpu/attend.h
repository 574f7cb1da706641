// Attention of rows whose prompt stands once for all that share it:
//
//   o = softmax(scaling q [K_prompt, K_own]^T) [V_prompt, V_own]
//
// Keys are kept in panels (product.h) of PANEL places, values in rows of whole vectors, both in the
// model's type (sums.h). The queries of one key head, of several rows where their prompt is the
// same, share a pass over the prompt. Weights are float32, or bf16 where sums.h has pairs; a query
// is summed in one order over its prompt and then its own places, whatever stands beside it.
#pragma once

#include <float.h>

#include "sums.h"

namespace reasonrl {
namespace {

// What one thread needs to attend. Rooms are in whole panels.
template <int DTYPE>
class Attention {
  public:
    Attention(const DecodeModel& m)
        : m_(m),
          group_(m.heads / m.key_heads),
          padded_(vectors(m.size)),
          keys_(words(m.dtype, m.size) * PANEL),
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
    // alone: nobody else writes to the slot, and n is its last place.
    void place(const DecodeLayer& layer, const Kept& kept, int64_t room, int64_t slot, int64_t n,
               const void* qkv, int64_t i, int64_t head, bool alone) {
        const int64_t key = i * each() + (m_.heads + head) * m_.size;
        uint32_t* to = keys(kept, room, slot, head) + n / PANEL * keys_ + n % PANEL;
        read_head(qkv, key, layer.k_norm, layer.head_eps, i, key_.data(), 0);
        const uint32_t* from = (const uint32_t*)key_.data();
        for (int64_t k = 0; k < keys_ / PANEL; k++) to[k * PANEL] = from[k];
        const char* given = (const char*)qkv + (key + m_.key_heads * m_.size) * WIDE;
        if (PAIRS) {
            void* pair = values(kept, room, slot, head) + n / 2 * 2 * padded_ * WIDE;
            return pair_up(given, padded_, n % 2, alone, pair);
        }
        char* value = values(kept, room, slot, head) + n * padded_ * WIDE;
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
    static constexpr int KIND = DTYPE == F32 ? F32 : BF16;
    static constexpr bool PAIRS = DTYPE == QUICK;     // of values, and weights of their type
    static constexpr int64_t NARROW = PAIRS ? 2 : 4;  // bytes of a weight
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
        int64_t row[TILE], of[TILE];       // a query's row and head
        int64_t begin[TILE], longest = 0;  // where a query's own places begin among its weights
        for (int64_t i = 0, j = first + at / group_, k = at % group_; i < n; i++) {
            row[i] = j, of[i] = head * group_ + k;
            if (++k == group_) j++, k = 0;
        }
        const uint32_t* key[TILE];
        const void* value[TILE];
        int64_t own[TILE];
        for (int64_t i = 0; i < n; i++) {
            own[i] = rows.own(row[i]);
            if (!own[i]) continue;
            key[i] = keys(layer.own, m_.own_room, rows.slot[row[i]], head);
            value[i] = values(layer.own, m_.own_room, rows.slot[row[i]], head);
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t prompt = rows.prompt_length[row[i]];
            const int64_t query = row[i] * each() + of[i] * m_.size;
            read_head(qkv, query, layer.q_norm, layer.head_eps, row[i], query_.data(), i * m_.size);
            begin[i] = whole(prompt);
            longest = std::max(longest, prompt);
        }
        const int64_t home = rows.home[first];
        score(keys(layer.prompt, m_.prompt_room, home, head), longest, n, layer.scaling * LOG2_E);
        for (int64_t i = 0; i < n && rows.slot; i += FEW) {
            score_own(key + i, own + i, begin + i, i, std::min<int64_t>(FEW, n - i),
                      layer.scaling * LOG2_E);
        }
        float share[TILE];
        for (int64_t i = 0; i < n; i++) {
            float* weight = weight_.data() + i * room_;
            hide(weight, rows.prompt_length[row[i]], begin[i]);
            hide(weight + begin[i], own[i], vectors(own[i]));
            share[i] = soften<PAIRS ? QUICK : F32>(weight, begin[i] + vectors(own[i]));
            // a shorter prompt's weights go on as zeros
            if (!rows.slot && begin[i] < longest) {
                memset((char*)weight + begin[i] * NARROW, 0, (longest - begin[i]) * NARROW);
            }
        }
        std::fill(out_.begin(), out_.end(), 0.0f);
        const void* weight[TILE];
        for (int64_t i = 0; i < n; i++) weight[i] = weight_.data() + i * room_;
        const void* shared = values(layer.prompt, m_.prompt_room, home, head);
        add<false>(weight, &shared, longest, 0, n);
        for (int64_t i = 0; i < n && rows.slot; i += FEW) {
            add_own(weight + i, value + i, own + i, begin + i, i, std::min<int64_t>(FEW, n - i));
        }
        for (int64_t i = 0; i < n; i++) {
            const float* out = out_.data() + i * padded_;
            for (int64_t c = 0; c < m_.size; c += LANES) {
                give<DTYPE>(seen, (row[i] * m_.heads + of[i]) * m_.size + c, m_.size - c,
                            load(out + c) * share[i]);
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
        read<KIND>(qkv, from, (int)size, x);
        float square = 0.0f;
        for (int64_t j = 0; j < size; j++) square += x[j] * x[j];
        const float scale = 1.0f / sqrtf(square / (float)size + eps);
        for (int64_t j = 0; j < size; j++) x[j] *= scale;
        write<KIND>(key_.data(), 0, (int)size, x);  // rounded, as its module does
        read<KIND>(key_.data(), 0, (int)size, x);
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
            give<DTYPE>(to, at + j, LANES, p);
            give<DTYPE>(to, at + half + j, LANES, q);
        }
    }

    // Scores of n queries with `places` keys that they share.
    void score(const uint32_t* key, int64_t places, int64_t n, float scaling) {
        alignas(64) float sum[TILE * PANEL];
        for (int64_t p = 0; p < places; p += PANEL, key += keys_) {
            tile_of<false>(KIND, m_.dots, n)(query_.data(), m_.size, &key, sum);
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
        const int64_t most = *std::max_element(own, own + n);
        for (int64_t p = 0, last; p < most; p += PANEL) {
            for (int64_t r = 0; r < n; r++) {
                last = whole(own[r]) - PANEL;
                panel[r] = key[r] + std::min(p, last) / PANEL * keys_;
            }
            const Tile tile =
                most - p > LANES ? tile_of<true>(KIND, m_.dots, n) : half_tile_of(KIND, m_.dots, n);
            tile(query, m_.size, panel, sum);
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
    void add(const void* const* weight, const void* const* value, int64_t places, int64_t i,
             int64_t n) {
        float* out = out_.data() + i * padded_;
        for (int64_t c = 0, vecs; c < padded_; c += vecs * LANES) {
            const int64_t left = (padded_ - c) / LANES;
            vecs = MOST == 3 && left % 3 == 0 ? 3 : std::min<int64_t>(left, 2);
            auto* of = vecs == 3   ? add_values_of<DTYPE, MOST, OWN>
                       : vecs == 2 ? add_values_of<DTYPE, 2, OWN>
                                   : add_values_of<DTYPE, 1, OWN>;
            of(n)(weight, value, c, places, padded_, out);
        }
    }

    // Those that each of n <= FEW queries has for itself: as many as all have, then what is left.
    void add_own(const void* const* weight, const void* const* value, const int64_t* own,
                 const int64_t* begin, int64_t i, int64_t n) {
        const int64_t all = *std::min_element(own, own + n), least = PAIRS ? all / 2 * 2 : all;
        const void* from[FEW];
        for (int64_t r = 0; r < n; r++) from[r] = (const char*)weight[r] + begin[r] * NARROW;
        add<true>(from, value, least, i, n);
        for (int64_t r = 0; r < n; r++) {
            from[r] = (const char*)from[r] + least * NARROW;
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
