// New tokens through a whole decoder, its head, the draw and the batch's books, in one parallel
// region: a token of a small model is otherwise hundreds of calls.
//
// Between two parts of a layer the threads meet at a barrier that spins. What is rounded to the
// model's type is what its modules round: the results of products and norms, turned queries and
// keys, the gate's result; the residual has a type of its own. A row is summed in one order
// whatever stands beside it, so neither other rows nor the number of threads change a bit of it.
#include <algorithm>

#include "attend.h"
#include "meeting.h"
#include "product.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t CHUNK = 256;  // rows of one pass

// What the threads hand each other, with room for `rows` rows of float32.
struct Buffers {
    std::vector<float> residual, narrow, qkv, seen, gated;
    std::vector<Share> blocks;  // rows of one prompt that attend together

    Buffers(const DecodeModel& m, int64_t rows)
        : residual(rows * m.width),
          narrow(rows * m.width),
          qkv(rows * (m.heads + 2 * m.key_heads) * m.size),
          seen(rows * std::max(m.heads * m.size, m.width)),
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

template <int DTYPE>
INLINE Vec load_some(const void* data, int64_t at, int64_t count) {
    if (count >= LANES) return load_as<DTYPE>(data, at);
    float x[LANES] = {};
    read<DTYPE>(data, at, (int)count, x);
    return load(x);
}

// One thread of a team that walks through the decoder together. RES: the residual's type.
template <int DTYPE, int RES>
class Walk {
  public:
    Walk(const DecodeModel& m, Buffers& b, Meeting& meeting)
        : m_(m),
          b_(b),
          meeting_(meeting),
          attention_(m),
          thread_(omp_get_thread_num()),
          team_(omp_get_num_threads()) {}

    void meet() { meeting_.wait((int)team_); }

    Share share(int64_t count) const { return share_of(count, thread_, team_); }

    // Logits (asked rows, V), where a meeting follows; null: those of all rows.
    void run(const DecodeRows& rows, const uint8_t* asked, void* logits) {
        embed(rows);
        const int64_t depth = (int64_t)m_.layers.size();
        norm(rows.rows, m_.layers[0].norm1, m_.layers[0].eps1);
        for (int64_t i = 0; i < depth; i++) {
            const DecodeLayer& layer = m_.layers[i];
            const bool last = i + 1 == depth;
            attention(layer, rows);
            norm(rows.rows, layer.norm2, layer.eps2);
            meet();
            gate(layer, rows.rows);
            meet();
            add(layer.down, b_.gated.data(), m_.inner, rows.rows);
            meet();
            norm(rows.rows, last ? m_.norm : m_.layers[i + 1].norm1,
                 last ? m_.eps : m_.layers[i + 1].eps1);
        }
        meet();
        head(rows.rows, asked, logits);
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

    void norm(int64_t rows, const void* weight, float eps) {
        const Share mine = share(rows);
        const NormTask task = {b_.residual.data(), weight, nullptr, rows, m_.width, RES,
                               m_.norm_dtype,      DTYPE,  eps};
        norm_share(task, {}, b_.narrow.data(), mine.begin, mine.end);
    }

    template <class F>
    void product(const Packed& p, const void* x, int64_t inputs, int64_t panels, int64_t rows,
                 F each) {
        multiply({p.weight, p.bias, inputs, panels}, DTYPE, m_.dots, x, rows, thread_, team_, each);
    }

    // y (rows, outputs) = the product, in the model's type.
    void give(const Packed& p, const void* x, int64_t outputs, int64_t rows, void* y) {
        const int64_t panels = (outputs + PANEL - 1) / PANEL;
        product(p, x, m_.width, panels, rows, [=](int64_t row, int64_t panel, Vec a, Vec b) {
            const int64_t left = outputs - panel * PANEL, at = row * outputs + panel * PANEL;
            keep<DTYPE>(y, at, as<DTYPE>(a), left);
            if (left > LANES) keep<DTYPE>(y, at + LANES, as<DTYPE>(b), left - LANES);
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
                const Vec old = load_some<RES>(to, at, width - first);
                keep<RES>(to, at, as<RES>(old + as<DTYPE>(sums[v])), width - first);
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
                    keep<DTYPE>(to, row * inner + first, as<DTYPE>(g * sigmoid(g) * u),
                                inner - first);
                });
    }

    void attention(const DecodeLayer& layer, const DecodeRows& rows) {
        const int64_t each = (m_.heads + 2 * m_.key_heads) * m_.size;
        meet();
        give(layer.qkv, b_.narrow.data(), each, rows.rows, b_.qkv.data());
        meet();
        keep_places(layer, rows);
        const int64_t items = (int64_t)b_.blocks.size() * m_.key_heads;
        if (rows.slot) {
            const Share mine = share(items);
            for (int64_t i = mine.begin; i < mine.end; i++) attend(layer, rows, i);
        } else {  // later rows see more: everyone takes some of all parts
            meet();
            for (int64_t i = thread_; i < items; i += team_) attend(layer, rows, i);
        }
        meet();
        add(layer.out, b_.seen.data(), m_.heads * m_.size, rows.rows);
        meet();
    }

    // A prompt's keys and values, which other threads are about to read.
    void keep_places(const DecodeLayer& layer, const DecodeRows& rows) {
        if (rows.slot) return;
        const Share mine = share(rows.rows * m_.key_heads);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            const int64_t row = i / m_.key_heads, at = rows.position[row];
            attention_.place(layer, layer.prompt, m_.prompt_room, rows.home[row], at, b_.qkv.data(),
                             row, i % m_.key_heads, at);
        }
    }

    // The i-th of blocks x key heads; a completion's new key is kept by the one that reads it.
    void attend(const DecodeLayer& layer, const DecodeRows& rows, int64_t i) {
        const Share block = b_.blocks[i / m_.key_heads];
        const int64_t head = i % m_.key_heads;
        for (int64_t row = block.begin; row < block.end && rows.slot; row++) {
            attention_.place(layer, layer.own, m_.own_room, rows.slot[row], rows.own(row) - 1,
                             b_.qkv.data(), row, head, rows.position[row]);
        }
        attention_.attend(layer, rows, block.begin, block.end - block.begin, head, b_.qkv.data(),
                          b_.seen.data());
    }

    void head(int64_t rows, const uint8_t* asked, void* logits) {
        if (!asked) return give(m_.head, b_.narrow.data(), m_.vocab, rows, logits);
        int64_t count = 0;
        for (int64_t i = 0; i < rows; i++) {
            if (!asked[i]) continue;
            if (count % team_ == thread_) {
                memcpy((char*)b_.seen.data() + count * m_.width * WIDE,
                       (const char*)b_.narrow.data() + i * m_.width * WIDE, m_.width * WIDE);
            }
            count++;
        }
        meet();
        give(m_.head, b_.seen.data(), m_.vocab, count, logits);
    }

    const DecodeModel& m_;
    Buffers& b_;
    Meeting& meeting_;
    Attention<DTYPE> attention_;
    const int64_t thread_, team_;
};

// The rows of slots that go on, and what is drawn for them.
struct Going {
    std::vector<int64_t> token, home, prompt, slot, position, drawn;
    std::vector<double> uniform;
    std::vector<float> logits, logp;  // (N, V) in the model's type
    int64_t rows = 0;

    Going(const DecodeModel& m, int64_t slots)
        : token(slots),
          home(slots),
          prompt(slots),
          position(slots),
          drawn(slots),
          uniform(slots),
          logits(slots * m.vocab),
          logp(slots) {}

    DecodeRows list(const DecodeState& s) {
        slot.clear();
        for (int64_t b = 0; b < s.slots; b++) {
            if (!s.done[b]) slot.push_back(b);
        }
        std::stable_sort(slot.begin(), slot.end(),
                         [&](int64_t a, int64_t b) { return s.home[a] < s.home[b]; });
        rows = (int64_t)slot.size();
        for (int64_t i = 0; i < rows; i++) {
            const int64_t b = slot[i];
            token[i] = s.token[b], home[i] = s.home[b], prompt[i] = s.prompt[b];
            position[i] = s.prompt[b] + s.length[b];
            uniform[i] = s.uniform[s.row[b] * s.most + s.count[s.row[b]]];
        }
        return {token.data(),    home.data(), prompt.data(), slot.data(),
                position.data(), nullptr,     rows};
    }

    // What row i has drawn, into the books.
    void enter(const DecodeState& s, int64_t i) const {
        const int64_t b = slot[i], row = s.row[b], at = s.count[row]++;
        const int64_t word = drawn[i], place = row * (s.most + 1) + at;
        s.tokens[place] = s.token[b] = word, s.logp[place] = logp[i];
        s.length[b]++;
        const int64_t* end = s.eos + s.eos_count;
        s.done[b] = at + 1 >= s.most || std::find(s.eos, end, word) != end;
    }
};

// Threads of which each has something to do in the narrowest product.
int useful(const DecodeModel& m, int64_t rows, int threads) {
    const int64_t most = (m.width + PANEL - 1) / PANEL * ((rows + TILE - 1) / TILE);
    return (int)std::max<int64_t>(1, std::min<int64_t>(threads, most));
}

template <int DTYPE, int RES>
void logits_of(const DecodeModel& m, const DecodeRows& all, void* logits, int threads) {
    const int64_t most = std::min(all.rows, CHUNK);
    Buffers buffers(m, most);
    Meeting meeting;
#pragma omp parallel num_threads(useful(m, most, threads))
    {
        Walk<DTYPE, RES> walk(m, buffers, meeting);
        int64_t asked = 0;
        for (int64_t at = 0; at < all.rows; at += CHUNK) {
            const int64_t n = std::min(CHUNK, all.rows - at);
            const DecodeRows rows = {all.token + at,
                                     all.home + at,
                                     all.prompt_length + at,
                                     all.slot ? all.slot + at : nullptr,
                                     all.position + at,
                                     all.asked + at,
                                     n};
            if (omp_get_thread_num() == 0) divide(m, rows, buffers.blocks);
            walk.run(rows, rows.asked, (char*)logits + asked * m.vocab * (DTYPE == F32 ? 4 : 2));
            walk.meet();
            asked += std::count_if(rows.asked, rows.asked + rows.rows, [](uint8_t x) { return x; });
        }
    }
}

template <int DTYPE, int RES>
void tokens_of(const DecodeModel& m, const DecodeState& s, int64_t tokens, int64_t until,
               int threads) {
    Buffers buffers(m, s.slots);
    Going going(m, s.slots);
    DecodeRows rows{};
    Meeting meeting;
#pragma omp parallel num_threads(useful(m, s.slots, threads))
    {
        Walk<DTYPE, RES> walk(m, buffers, meeting);
        for (int64_t n = 0; n < tokens; n++) {
            if (omp_get_thread_num() == 0) {
                rows = going.list(s);
                divide(m, rows, buffers.blocks);
            }
            walk.meet();
            if (rows.rows <= until) break;
            walk.run(rows, nullptr, going.logits.data());
            walk.meet();
            const DrawTask draw = {going.logits.data(),
                                   going.uniform.data(),
                                   going.drawn.data(),
                                   going.logp.data(),
                                   going.rows,
                                   m.vocab,
                                   DTYPE,
                                   s.temperature};
            const Share mine = walk.share(rows.rows);
            draw_share(draw, mine.begin, mine.end);
            for (int64_t i = mine.begin; i < mine.end; i++) going.enter(s, i);
            walk.meet();
        }
    }
}

}  // namespace

int64_t packed_words(int dtype, int64_t inputs, int64_t outputs) {
    return words(dtype, inputs) * ((outputs + PANEL - 1) / PANEL * PANEL);
}

int64_t panel() {
    return PANEL;
}

void pack(const PackTask& t, int threads) {
    const int64_t each = words(t.to, t.inputs);
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(t.outputs);
        std::vector<float> row(t.inputs);
        std::vector<uint32_t> from(each);  // 0 behind an odd number
        for (int64_t i = mine.begin; i < mine.end; i++) {
            const int64_t first =
                t.half < 0 ? t.first + i : i / LANES * PANEL + t.half * LANES + i % LANES;
            uint32_t* out = t.out + first / PANEL * each * PANEL + first % PANEL;
            read_any(t.dtype, t.weight, i * t.inputs, t.inputs, row.data());
            write_any(t.to, from.data(), 0, t.inputs, row.data());
            for (int64_t k = 0; k < each; k++) out[k * PANEL] = from[k];
        }
    }
}

void decode_logits(const DecodeModel& m, const DecodeRows& rows, void* logits, int threads) {
    if (m.dtype == F32) return logits_of<F32, F32>(m, rows, logits, threads);
    (m.residual == F32 ? logits_of<BF16, F32> : logits_of<BF16, BF16>)(m, rows, logits, threads);
}

void decode_tokens(const DecodeModel& m, const DecodeState& state, int64_t tokens, int64_t until,
                   int threads) {
    if (m.dtype == F32) return tokens_of<F32, F32>(m, state, tokens, until, threads);
    (m.residual == F32 ? tokens_of<BF16, F32> : tokens_of<BF16, BF16>)(m, state, tokens, until,
                                                                       threads);
}

}  // namespace ISA
}  // namespace reasonrl
