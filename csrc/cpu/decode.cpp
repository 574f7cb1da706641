// New tokens through a whole decoder, its head, the draw and the batch's books, in one parallel
// region: a token of a small model is otherwise hundreds of calls.
//
// The threads share every product, and meet between two parts of a layer at a barrier that spins;
// through a decoder whose weights stay in a cache each takes rows of its own, and meets nobody.
// What is rounded to the model's type is what its modules round: the results of products and norms,
// turned queries and keys, the gate's result; the residual has a type of its own. A row is summed
// in one order whatever stands beside it, so neither other rows nor the number of threads change a
// bit of it.
#include <algorithm>

#include "attend.h"
#include "going.h"
#include "meeting.h"
#include "norm.h"
#include "product.h"

namespace reasonrl {
namespace ISA {

namespace {

constexpr int64_t CHUNK = 256;       // rows of one pass
constexpr int64_t CACHED = 1 << 23;  // bytes of weights that stay in a cache of all threads
constexpr int FAST = LANES == 16 ? QUICK : BF16;  // where pairs of bf16 are multiplied

// What the threads hand each other, with room for `rows` rows of float32.
struct Buffers {
    std::vector<float> residual, narrow, qkv, seen, gated;

    Buffers(const DecodeModel& m, int64_t rows)
        : residual(rows * m.width),
          narrow(rows * m.width),
          qkv(rows * (m.heads + 2 * m.key_heads) * m.size + LANES),
          seen(rows * m.heads * m.size),
          gated(rows * m.inner) {}
};

// Rows whose queries fill a tile where they can.
void divide(const DecodeModel& m, const DecodeRows& rows, std::vector<Share>& blocks) {
    const int64_t most = std::max<int64_t>(1, TILE * m.key_heads / m.heads);
    blocks.clear();
    for (int64_t i = 0; i < rows.rows; i++) {
        const bool next = blocks.empty() || rows.home[i] != rows.home[blocks.back().begin] ||
                          i - blocks.back().begin == most;
        if (next) blocks.push_back({i, i});
        blocks.back().end = i + 1;
    }
}

// The norms' weights in the order in which a row meets them, each in whole vectors.
std::vector<float> norms_of(const DecodeModel& m) {
    std::vector<float> out((2 * m.layers.size() + 1) * vectors(m.width));
    float* to = out.data();
    const auto add = [&](const void* weight) {
        read_any(m.norm_dtype, weight, 0, m.width, to);
        to += vectors(m.width);
    };
    for (const DecodeLayer& layer : m.layers) add(layer.norm1), add(layer.norm2);
    add(m.norm);
    return out;
}

// One thread of a team that walks through the decoder together. RES: the residual's type.
template <int DTYPE, int RES>
class Walk {
  public:
    Walk(const DecodeModel& m, const float* norms, Buffers& b, Meeting& meeting, int64_t thread,
         int64_t team)
        : m_(m),
          norms_(norms),
          b_(b),
          meeting_(meeting),
          attention_(m),
          thread_(thread),
          team_(team) {}

    void meet() {
        if (team_ > 1) meeting_.wait((int)team_);
    }

    Share share(int64_t count) const { return share_of(count, thread_, team_); }

    // Logits (asked rows, V), where a meeting follows.
    void run(const DecodeRows& rows, void* logits) {
        embed(rows);
        divide(m_, rows, blocks_);
        attention_.read_angles(rows);
        const int64_t depth = (int64_t)m_.layers.size();
        norm(rows.rows, 0, m_.layers[0].eps1);
        for (int64_t i = 0; i < depth; i++) {
            const DecodeLayer& layer = m_.layers[i];
            const bool last = i + 1 == depth;
            attention(layer, rows, last);
            const int64_t count = last ? rows.before(rows.rows) : rows.rows;
            add(layer.out, b_.seen.data(), m_.heads * m_.size, count);
            meet();
            norm(count, 2 * i + 1, layer.eps2);
            meet();
            gate(layer, count);
            meet();
            add(layer.down, b_.gated.data(), m_.inner, count);
            meet();
            norm(count, 2 * i + 2, last ? m_.eps : m_.layers[i + 1].eps1);
        }
        meet();
        answer(m_.head, b_.narrow.data(), m_.vocab, rows.before(rows.rows), logits);
    }

  private:
    static constexpr int64_t WIDE = DTYPE == F32 ? 4 : 2;

    void embed(const DecodeRows& rows) {
        const int64_t bytes = m_.width * (RES == F32 ? 4 : 2);
        const Share mine = share(rows.rows);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            memcpy((char*)b_.residual.data() + i * bytes,
                   (const char*)m_.embedding + rows.token[i] * bytes, bytes);
        }
    }

    // By the norm `which` of those that a row meets one after the other.
    void norm(int64_t rows, int64_t which, float eps) {
        const Share mine = share(rows);
        const NormTask task = {b_.residual.data(), nullptr, nullptr, rows, m_.width, RES,
                               m_.norm_dtype,      DTYPE,   eps};
        const float* weight = norms_ + which * vectors(m_.width);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            normalise<RES, DTYPE>(task, {}, b_.narrow.data(), i, weight);
        }
    }

    template <class F>
    void product(const Packed& p, const void* x, int64_t inputs, int64_t panels, int64_t rows,
                 F each) {
        multiply({p.weight, p.bias, inputs, panels}, m_.dtype, m_.dots, x, rows, thread_, team_,
                 each);
    }

    // y (rows, outputs) = the product, in the model's type.
    void answer(const Packed& p, const void* x, int64_t outputs, int64_t rows, void* y) {
        const int64_t panels = (outputs + PANEL - 1) / PANEL;
        product(p, x, m_.width, panels, rows, [=](int64_t row, int64_t panel, Vec a, Vec b) {
            const int64_t left = outputs - panel * PANEL, at = row * outputs + panel * PANEL;
            give<DTYPE>(y, at, left, a);
            if (left > LANES) give<DTYPE>(y, at + LANES, left - LANES, b);
        });
    }

    // The residual and the product together.
    void add(const Packed& p, const void* x, int64_t inputs, int64_t rows) {
        const int64_t width = m_.width, panels = (width + PANEL - 1) / PANEL;
        void* to = b_.residual.data();
        product(p, x, inputs, panels, rows, [=](int64_t row, int64_t panel, Vec a, Vec b) {
            const Vec sums[2] = {a, b};
            for (int64_t v = 0; v < 2; v++) {
                const int64_t first = panel * PANEL + v * LANES, at = row * width + first;
                if (first >= width) return;
                const Vec old = take<RES>(to, at, width - first);
                give<RES>(to, at, width - first, old + as<DTYPE>(sums[v]));
            }
        });
    }

    // Both halves of a panel, gate and up, become one.
    void gate(const DecodeLayer& layer, int64_t rows) {
        const int64_t inner = m_.inner, panels = (inner + LANES - 1) / LANES;
        void* to = b_.gated.data();
        product(layer.both, b_.narrow.data(), m_.width, panels, rows,
                [=](int64_t row, int64_t panel, Vec a, Vec b) {
                    const Vec g = as<DTYPE>(a), u = as<DTYPE>(b);
                    const int64_t first = panel * LANES;
                    give<DTYPE>(to, row * inner + first, inner - first, g * sigmoid(g) * u);
                });
    }

    // Of the last layer only those rows go on that are asked, which stand in front then.
    void attention(const DecodeLayer& layer, const DecodeRows& rows, bool last) {
        const int64_t each = (m_.heads + 2 * m_.key_heads) * m_.size;
        meet();
        answer(layer.qkv, b_.narrow.data(), each, rows.rows, b_.qkv.data());
        meet();
        keep_places(layer, rows);
        const int64_t items = (int64_t)blocks_.size() * m_.key_heads;
        if (rows.slot) {
            const Share mine = share(items);
            for (int64_t i = mine.begin; i < mine.end; i++) attend(layer, rows, i);
        } else {  // later rows see more: everyone takes some of all parts
            meet();
            for (int64_t i = thread_; i < items; i += team_) {
                const Share block = blocks_[i / m_.key_heads];
                const bool asked = rows.before(block.begin) < rows.before(block.end);
                if (asked || !last) attend(layer, rows, i);
            }
        }
        meet();
        if (!last || !rows.asked) return;
        if (thread_ == 0) gather(rows);
        meet();
    }

    // What attention gave, and the residual, of those that are asked.
    void gather(const DecodeRows& rows) {
        const int64_t bytes = m_.width * (RES == F32 ? 4 : 2), seen = m_.heads * m_.size * WIDE;
        int64_t to = 0;
        for (int64_t i = 0; i < rows.rows; i++) {
            if (!rows.asked[i]) continue;
            move(b_.residual, to, i, bytes);
            move(b_.seen, to++, i, seen);
        }
    }

    static void move(std::vector<float>& rows, int64_t to, int64_t from, int64_t bytes) {
        char* data = (char*)rows.data();
        memmove(data + to * bytes, data + from * bytes, bytes);
    }

    // A prompt's keys and values, which other threads are about to read.
    void keep_places(const DecodeLayer& layer, const DecodeRows& rows) {
        if (rows.slot) return;
        const Share mine = share(rows.rows * m_.key_heads);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            const int64_t row = i / m_.key_heads, at = rows.position[row];
            attention_.place(layer, layer.prompt, m_.prompt_room, rows.home[row], at, b_.qkv.data(),
                             row, i % m_.key_heads, false);
        }
    }

    // The i-th of blocks x key heads; a completion's new key is kept by the one that reads it.
    void attend(const DecodeLayer& layer, const DecodeRows& rows, int64_t i) {
        const Share block = blocks_[i / m_.key_heads];
        const int64_t head = i % m_.key_heads;
        for (int64_t row = block.begin; row < block.end && rows.slot; row++) {
            attention_.place(layer, layer.own, m_.own_room, rows.slot[row], rows.own(row) - 1,
                             b_.qkv.data(), row, head, true);
        }
        attention_.attend(layer, rows, block.begin, block.end - block.begin, head, b_.qkv.data(),
                          b_.seen.data());
    }

    const DecodeModel& m_;
    const float* norms_;
    Buffers& b_;
    Meeting& meeting_;
    Attention<DTYPE> attention_;
    const int64_t thread_, team_;
    std::vector<Share> blocks_;  // rows of one prompt that attend together
};

// Threads of which each has something to do in the narrowest product.
int useful(const DecodeModel& m, int64_t rows, int threads) {
    const int64_t most = (m.width + PANEL - 1) / PANEL * ((rows + TILE - 1) / TILE);
    return (int)std::max<int64_t>(1, std::min<int64_t>(threads, most));
}

// Whether each thread of a team takes rows of its own.
bool apart(const DecodeModel& m, int64_t rows, int64_t team) {
    const int64_t seen = m.heads * m.size, qkv = seen + 2 * m.key_heads * m.size;
    const int64_t layer =
        packed_words(m.dtype, m.width, qkv) + packed_words(m.dtype, seen, m.width) +
        packed_words(m.dtype, m.width, 2 * m.inner) + packed_words(m.dtype, m.inner, m.width);
    const int64_t all = (int64_t)m.layers.size() * layer + packed_words(m.dtype, m.width, m.vocab);
    return rows >= FEW * team && all * (int64_t)sizeof(uint32_t) <= CACHED;
}

// One thread of a region, which walks with the others or alone; `most` rows at most.
template <int DTYPE, int RES>
struct Worker {
    const DecodeModel& m;
    const int64_t thread, team;
    Buffers own;
    Walk<DTYPE, RES> together, alone;

    Worker(const DecodeModel& m, const float* norms, Buffers& b, Meeting& meeting, int64_t most)
        : m(m),
          thread(omp_get_thread_num()),
          team(omp_get_num_threads()),
          own(m, apart(m, most, team) ? (most + team - 1) / team : 0),
          together(m, norms, b, meeting, thread, team),
          alone(m, norms, own, meeting, 0, 1) {}

    // Returns when this thread's share of the rows has its logits.
    void run(const DecodeRows& rows, void* logits) {
        if (rows.slot && apart(m, rows.rows, team)) {  // a prompt's rows need each other
            const Share mine = together.share(rows.rows);
            const int64_t before = rows.before(mine.begin);
            alone.run(rows.part(mine.begin, mine.end - mine.begin),
                      (char*)logits + before * m.vocab * (DTYPE == F32 ? 4 : 2));
        } else {
            together.run(rows, logits);
            together.meet();
        }
    }
};

template <int DTYPE, int RES>
void logits_of(const DecodeModel& m, const DecodeRows& all, void* logits, int threads) {
    const int64_t most = std::min(all.rows, CHUNK);
    const std::vector<float> norms = norms_of(m);
    Buffers buffers(m, most);
    Meeting meeting;
#pragma omp parallel num_threads(useful(m, most, threads))
    {
        Worker<DTYPE, RES> worker(m, norms.data(), buffers, meeting, most);
        for (int64_t at = 0; at < all.rows; at += CHUNK) {
            const int64_t asked = all.before(at);
            worker.run(all.part(at, std::min(CHUNK, all.rows - at)),
                       (char*)logits + asked * m.vocab * (DTYPE == F32 ? 4 : 2));
        }
    }
}

template <int DTYPE, int RES>
void tokens_of(const DecodeModel& m, const DecodeState& s, int64_t tokens, int64_t until,
               int threads) {
    const std::vector<float> norms = norms_of(m);
    Buffers buffers(m, s.slots);
    Going going(m, s.slots);
    DecodeRows rows{};
    Meeting meeting;
#pragma omp parallel num_threads(useful(m, s.slots, threads))
    {
        Worker<DTYPE, RES> worker(m, norms.data(), buffers, meeting, s.slots);
        for (int64_t n = 0; n < tokens; n++) {
            if (worker.thread == 0) rows = going.list(s);
            worker.together.meet();
            if (rows.rows <= until) break;
            worker.run(rows, going.logits.data());
            const DrawTask draw = {going.logits.data(),
                                   going.uniform.data(),
                                   going.drawn.data(),
                                   going.logp.data(),
                                   going.rows,
                                   m.vocab,
                                   m.dtype,
                                   s.temperature};
            const Share mine = worker.together.share(rows.rows);
            draw_share(draw, mine.begin, mine.end);
            for (int64_t i = mine.begin; i < mine.end; i++) going.enter(s, i);
            worker.together.meet();
        }
    }
}

}  // namespace

void decode_logits(const DecodeModel& m, const DecodeRows& rows, void* logits, int threads) {
    if (m.dtype == F32) return logits_of<F32, F32>(m, rows, logits, threads);
    auto* of = m.residual == F32 ? logits_of<BF16, F32> : logits_of<BF16, BF16>;
    if (m.dots) of = m.residual == F32 ? logits_of<FAST, F32> : logits_of<FAST, FAST>;
    of(m, rows, logits, threads);
}

void decode_tokens(const DecodeModel& m, const DecodeState& state, int64_t tokens, int64_t until,
                   int threads) {
    if (m.dtype == F32) return tokens_of<F32, F32>(m, state, tokens, until, threads);
    auto* of = m.residual == F32 ? tokens_of<BF16, F32> : tokens_of<BF16, BF16>;
    if (m.dots) of = m.residual == F32 ? tokens_of<FAST, F32> : tokens_of<FAST, FAST>;
    of(m, state, tokens, until, threads);
}

}  // namespace ISA
}  // namespace reasonrl
