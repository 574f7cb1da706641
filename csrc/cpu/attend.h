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
#include "rotary.h"
#include "weights.h"

namespace reasonrl {
namespace {

// (ROWS, VECS * LANES) sums go on by weights (ROWS, n) times n rows of values, `apart` numbers
// wide.
template <int DTYPE, int ROWS, int VECS>
void add_values(const float* weight, int64_t room, const void* value, int64_t at, int64_t n,
                int64_t apart, float* out) {
    Vec sum[ROWS][VECS];
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) sum[r][v] = load(out + r * apart + at + v * LANES);
    }
    for (int64_t j = 0; j < n; j++) {
        Vec x[VECS];
        for (int v = 0; v < VECS; v++) x[v] = load_as<DTYPE>(value, j * apart + at + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            for (int v = 0; v < VECS; v++) sum[r][v] += x[v] * weight[r * room + j];
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) store(out + r * apart + at + v * LANES, sum[r][v]);
    }
}

template <int DTYPE, int VECS>
void add_values_of(int64_t rows, const float* weight, int64_t room, const void* value, int64_t at,
                   int64_t n, int64_t apart, float* out) {
    constexpr decltype(&add_values<DTYPE, 1, VECS>) of[8] = {
        add_values<DTYPE, 1, VECS>, add_values<DTYPE, 2, VECS>, add_values<DTYPE, 3, VECS>,
        add_values<DTYPE, 4, VECS>, add_values<DTYPE, 5, VECS>, add_values<DTYPE, 6, VECS>,
        add_values<DTYPE, 7, VECS>, add_values<DTYPE, 8, VECS>};
    of[rows - 1](weight, room, value, at, n, apart, out);
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
          query_(TILE * m.size),
          weight_(TILE * room_),
          out_(TILE * padded_),
          row_(m.size),
          norm_(m.size),
          key_(words(DTYPE, m.size)),
          angle_(m.size) {}

    // The key and value of row i to place n of a slot.
    void place(const DecodeLayer& layer, const Kept& kept, int64_t room, int64_t slot, int64_t n,
               const void* qkv, int64_t i, int64_t head, int64_t position) {
        const int64_t size = m_.size, key = i * each() + (m_.heads + head) * size;
        uint32_t* to = keys(kept, room, slot, head) + n / PANEL * keys_ + n % PANEL;
        read_head(qkv, key, layer.k_norm, layer.head_eps, position);
        key_.back() = 0;  // behind an odd number
        write<DTYPE>(key_.data(), 0, (int)size, row_.data());
        for (int64_t k = 0; k < (int64_t)key_.size(); k++) to[k * PANEL] = key_[k];
        char* value = values(kept, room, slot, head) + n * padded_ * WIDE;
        memcpy(value, (const char*)qkv + (key + m_.key_heads * size) * WIDE, size * WIDE);
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
            read_head(qkv, query, layer.q_norm, layer.head_eps, rows.position[row]);
            write<DTYPE>(query_.data(), i * m_.size, (int)m_.size, row_.data());
            begin[i] = whole(prompt);
            longest = std::max(longest, prompt);
        }
        const int64_t home = rows.home[first];
        const uint32_t* prompt = keys(layer.prompt, m_.prompt_room, home, head);
        score(prompt, longest, 0, n, layer.scaling);
        std::fill(out_.begin(), out_.end(), 0.0f);
        float share[TILE];
        for (int64_t i = 0, next; i < n; i = next) {  // the queries of one row
            const int64_t row = first + (at + i) / group_, own = rows.own(row);
            next = std::min(n, i + group_ - (at + i) % group_);
            if (own) {
                const uint32_t* mine = keys(layer.own, m_.own_room, rows.slot[row], head);
                score(mine, own, i, next - i, layer.scaling, begin[i]);
            }
            for (int64_t q = i; q < next; q++) {
                float* weight = weight_.data() + q * room_;
                hide(weight, rows.prompt_length[row], begin[q]);
                hide(weight + begin[q], own, whole(own));
                share[q] = soften(weight, begin[q] + whole(own));
            }
        }
        // a shorter prompt's weights go on as zeros
        for (int64_t i = 0; i < n && !rows.own(first); i++) {
            for (int64_t j = begin[i]; j < longest; j++) weight_[i * room_ + j] = 0.0f;
        }
        add(values(layer.prompt, m_.prompt_room, home, head), longest, 0, n, 0);
        for (int64_t i = 0, next; i < n; i = next) {
            const int64_t row = first + (at + i) / group_, own = rows.own(row);
            next = std::min(n, i + group_ - (at + i) % group_);
            if (!own) continue;
            add(values(layer.own, m_.own_room, rows.slot[row], head), own, i, next - i, begin[i]);
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t row = first + (at + i) / group_, q = head * group_ + (at + i) % group_;
            float* out = out_.data() + i * padded_;
            for (int64_t c = 0; c < padded_; c += LANES) store(out + c, load(out + c) * share[i]);
            write<DTYPE>(seen, (row * m_.heads + q) * m_.size, (int)m_.size, out);
        }
    }

    static int64_t whole(int64_t places) { return (places + PANEL - 1) / PANEL * PANEL; }

    // A head into row_, normed where there is a norm, and turned.
    void read_head(const void* qkv, int64_t at, const void* norm, float eps, int64_t position) {
        const int64_t size = m_.size;
        float* x = row_.data();
        read<DTYPE>(qkv, at, (int)size, x);
        if (norm) {
            float square = 0.0f;
            for (int64_t j = 0; j < size; j++) square += x[j] * x[j];
            const float scale = 1.0f / sqrtf(square / (float)size + eps);
            for (int64_t j = 0; j < size; j++) x[j] *= scale;
            write<DTYPE>(key_.data(), 0, (int)size, x);  // rounded, as its module does
            read<DTYPE>(key_.data(), 0, (int)size, x);
            read_any(m_.norm_dtype, norm, 0, size, norm_.data());
            for (int64_t j = 0; j < size; j++) x[j] *= norm_[j];
        }
        angle_.read(m_.angle_dtype, m_.cos, m_.sin, position);
        turn<false>(x, angle_);
    }

    // Scores of n queries from the i-th on with `places` keys, among their weights from `begin` on.
    void score(const uint32_t* panel, int64_t places, int64_t i, int64_t n, float scaling,
               int64_t begin = 0) {
        alignas(64) float sum[TILE * PANEL];
        const char* query = (const char*)query_.data() + i * m_.size * WIDE;
        for (int64_t p = 0; p < places; p += PANEL, panel += keys_) {
            tile_of(DTYPE, m_.dots, n)(query, m_.size, panel, sum);
            for (int64_t r = 0; r < n; r++) {
                float* to = weight_.data() + (i + r) * room_ + begin + p;
                for (int64_t c = 0; c < PANEL; c += LANES) {
                    store(to + c, load(sum + r * PANEL + c) * scaling);
                }
            }
        }
    }

    // No weight for what is in the last panel behind the `places` that are seen.
    static void hide(float* weight, int64_t places, int64_t end) {
        for (int64_t j = places; j < end; j++) weight[j] = -FLT_MAX;
    }

    void add(const void* value, int64_t places, int64_t i, int64_t n, int64_t begin) {
        const float* weight = weight_.data() + i * room_ + begin;
        float* out = out_.data() + i * padded_;
        int64_t c = 0;
        for (; c + PANEL <= padded_; c += PANEL) {
            add_values_of<DTYPE, 2>(n, weight, room_, value, c, places, padded_, out);
        }
        if (c < padded_) add_values_of<DTYPE, 1>(n, weight, room_, value, c, places, padded_, out);
    }

    const DecodeModel& m_;
    const int64_t group_, padded_, keys_, room_;
    std::vector<float> query_, weight_, out_, row_, norm_;
    std::vector<uint32_t> key_;  // as it is kept
    Angles angle_;
};

}  // namespace
}  // namespace reasonrl
