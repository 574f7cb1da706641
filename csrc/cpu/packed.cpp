// Attention over packed tokens, forward and backward: a completion's queries see their prompt and
// their own tokens up to themselves, a prompt's its own.
//
//   q, k turned by their angles, in place;  p = softmax(scaling q k^T where seen);  out = p v
//   dv = p^T do,  ds = scaling p (dp - sum p dp), dp = do v^T,  dq = ds k,  dk = ds^T q, turned
//   back
//
// A run is a prompt, or a few completions of one: with one key head it is one thread's work, in
// that thread's own memory. Scores have a row a key and a column a query, so that a vector holds
// queries. Weights are made again in the backward, of a maximum and a share a query.
// What completions add to their prompt's keys is summed run by run, in their order. Sums are
// float32; weights and ds are rounded to the heads' type, and results, each once.
#include "packed.h"

namespace reasonrl {
namespace ISA {
namespace {

template <bool DOTS>
struct Thread {
    Thread(const PackedTask& task, const Plan& plan, bool back)
        : t(task),
          size(task.size),
          width(vectors(task.size)),
          inner((task.size + EACH<DOTS> - 1) / EACH<DOTS>),
          group(task.heads / task.key_heads),
          stride((task.heads + 2 * task.key_heads) * task.size),
          cos(task.size + LANES),
          sin(cos),
          row(size + 2 * LANES),
          turned(row) {
        const int64_t wide = vectors(inner), columns = plan.columns + CHUNK, each = EACH<DOTS>;
        const int64_t under = columns / each + LANES;  // words of keys, and what a square has more
        keys = store_.words(columns, wide);
        values = store_.words(columns, wide);
        paired = store_.words(under, width);
        flat = store_.words(width, under);
        q = store_.words(CHUNK, wide);
        q_across = store_.words(wide, CHUNK);
        score = store_.words(columns, CHUNK);
        below = store_.words(columns / each, CHUNK);
        across = store_.words(width, CHUNK);
        out = store_.words(CHUNK, width);
        if (!back) return;
        above = store_.words(CHUNK, wide);
        above_across = store_.words(wide, CHUNK);
        q_pairs = store_.words(CHUNK / each, width);
        above_pairs = store_.words(CHUNK / each, width);
        by_weight = store_.words(columns, CHUNK);
        weight = store_.words(columns, CHUNK / each);
        by_score = store_.words(columns, CHUNK / each);
        by_k = store_.words(plan.queries, width);
        by_v = store_.words(plan.queries, width);
    }

    void read_heads(int64_t token, int64_t head, int64_t count, int64_t padded, Words to) {
        const int64_t at = token * stride + head * size;
        read_rows<DOTS>(t, t.heads_of, t.tokens * stride, at, stride, count, padded, to);
    }

    // Rows of a block's keys or values from `at` on.
    Words rows_of(const PackedBlock& block, int64_t head, int64_t at, Words to) {
        const Words rows = {to.row(at), to.apart};
        read_heads(block.start, head, block.count, vectors(block.count), rows);
        return rows;
    }

    // The same, a row a number of the head and a word a pair of keys.
    void lay(Words rows, int64_t count, int64_t at) {
        const int64_t pairs = vectors(count) / EACH<DOTS>;
        pair_rows<DOTS>(rows, vectors(count), width, paired);
        turn_words(paired, pairs, size, {flat.at + at / EACH<DOTS>, flat.apart});
    }

    // `count` numbers, scaled, as the type has them; all may be read a vector beyond the end.
    void write(const float* from, int64_t count, void* to, int64_t at, float by = 1.0f) {
        for (int64_t j = 0; j < count; j += LANES) {
            const Vec x = load(from + j) * by;
            if (DOTS) give<QUICK>(to, at + j, count - j, x);
            if (!DOTS) store(turned.data() + j, x);
        }
        if (!DOTS) write_any(t.dtype, to, at, count, turned.data());
    }

    // A token's angles: cosines, sines.
    std::pair<const float*, const float*> angles(int64_t token) {
        if (t.angle_dtype == F32 && (t.tokens - token) * size >= size + LANES) {
            return {(const float*)t.cos + token * size, (const float*)t.sin + token * size};
        }
        read_any(t.angle_dtype, t.cos, token * size, size, cos.data());
        read_any(t.angle_dtype, t.sin, token * size, size, sin.data());
        return {cos.data(), sin.data()};
    }

    // A head of numbers take(which) gives, turned, goes `to` its place.
    template <bool BACK, class Take>
    INLINE void turn(int64_t token, int64_t head, Take take, void* to) {
        const auto by = angles(token);
        const int64_t at = token * stride + head * size;
        turn_head<BACK>(by.first, by.second, size / 2, take, [&](int64_t j, int64_t left, Vec x) {
            if (DOTS) give<QUICK>(to, at + j, left, x);
            if (!DOTS) give<F32>(turned.data(), j, left, x);
        });
        if (!DOTS) write_any(t.dtype, to, at, size, turned.data());
    }

    // `count` key heads of a block and the queries' heads by them are turned where they stand,
    // token by token: lines come as a stream.
    void turn_block(const PackedBlock& block, int64_t key_head, int64_t count) {
        const int64_t end = block.start + block.count;
        const auto each_head = [&](auto f) INLINE_BODY {
            for (int64_t h = key_head * group; h < (key_head + count) * group; h++) {
                f(h);
                if (h % group == 0) f(t.heads + h / group);
            }
        };
        const bool done =
            DOTS && t.cos && with_turn(size, [&](auto by) {
                for (int64_t i = block.start; i < end; i++) {
                    const auto [c, s] = angles(i);
                    by.angles(c, s);
                    uint16_t* heads = (uint16_t*)t.heads_of + i * stride;
                    each_head([&](int64_t h) INLINE_BODY { by.turn(heads + h * size); });
                }
            });
        for (int64_t i = block.start; i < end && t.cos && !done; i++) {
            each_head([&](int64_t head) {
                const int64_t at = i * stride + head * size;
                if (!DOTS) read_any(t.dtype, t.heads_of, at, size, row.data());
                const auto from = [&](int64_t j) {
                    if (!DOTS) return load(row.data() + j);
                    return take<QUICK>(t.heads_of, at + j, t.tokens * stride - at - j);
                };
                turn<false>(i, head, from, t.heads_of);
            });
        }
    }

    // Rows of a gradient by q or k, turned back, or by v.
    void put(const float* x, int64_t count, int64_t token, int64_t head, bool back, void* to) {
        for (int64_t end = token + count; token < end; token++, x += width) {
            const auto take = [&](int64_t j) { return load(x + j); };
            if (back && t.cos) turn<true>(token, head, take, to);
            if (!back || !t.cos) write(x, size, to, token * stride + head * size);
        }
    }

    // A row a key: what keys make of queries, or values of gradients; none before its own query.
    void by_rows(Words rows, Words columns, const Chunk& c, Words to) {
        for (int64_t i = 0; i < c.end(HIGH); i += HIGH) {
            const int64_t past = std::max<int64_t>(0, i - c.own - c.first) / LANES * LANES;
            const Words from = {columns.at + past, columns.apart};
            multiply_small<DOTS>({rows.row(i), rows.apart}, from, HIGH, vectors(c.n) - past, inner,
                                 inner, {to.row(i) + past, to.apart}, false);
        }
    }

    // A row a query: sums of keys or values by what stands in `below`.
    void by_columns(const Chunk& c) {
        const int64_t last = c.end(HIGH) / EACH<DOTS>;
        const int64_t steps = (c.own + c.first + LANES) / EACH<DOTS>;
        const int64_t rows = (size + HIGH - 1) / HIGH * HIGH;
        multiply_small<DOTS>(flat, below, rows, vectors(c.n), std::min(steps, last), last, across,
                             false);
    }

    void see(const PackedRun& run, int64_t key_head) {
        const int64_t prompt = run.prompt < 0 ? 0 : t.blocks[run.prompt].count;
        const int64_t k = t.heads + key_head, v = k + t.key_heads;
        const auto all_of = [&](const PackedBlock& block, int64_t at) {
            rows_of(block, k, at, keys);
            lay(rows_of(block, v, 0, values), block.count, at);
        };
        if (prompt) all_of(t.blocks[run.prompt], 0);
        for (int64_t b = run.first; b < run.last; b++) {
            all_of(t.blocks[b], vectors(prompt));
            each_chunk(t.blocks[b], prompt, key_head, group, [&](const Chunk& c, int64_t h) {
                read_heads(c.token, h, c.n, vectors(c.n), q);
                turn_words(q, vectors(c.n), inner, q_across);
                by_rows(keys, q_across, c, score);
                float tops[CHUNK], shares[CHUNK];
                for (int64_t at = 0; at < c.n; at += LANES) {
                    const Weighing by = weigh(c, at);
                    store(tops + at, by.top);
                    store(shares + at, by.share);
                }
                by_columns(c);
                turn_words(across, size, vectors(c.n), out);
                for (int64_t r = 0; r < c.n; r++) {
                    const int64_t at = (c.token + r) * t.heads + h;
                    t.shares[2 * at] = tops[r], t.shares[2 * at + 1] = shares[r];
                    write(out.floats(r), size, t.out, at * size, shares[r]);
                }
            });
        }
    }

    // Scores of a vector of queries become weights without their share; NaN where a seen one is not
    // finite.
    Weighing weigh(const Chunk& c, int64_t at) {
        Weighing by = {t.scaling * LOG2_E, Vec{}, Vec{}};
        Vec most = Vec{} - INFINITY, sum = {};
        const int64_t end = c.end(HIGH);
        each_two(c, at, end, [&](int64_t j, VecI on, VecI next) INLINE_BODY {
            const Vec x = where(on, load(score.floats(j) + at));
            const Vec y = where(next, load(score.floats(j + 1) + at));
            sum += 0.0f * x + 0.0f * y;
            const Vec low = Vec{} - INFINITY;
            most = max_of(most, max_of(select(on, x, low), select(next, y, low)));
        });
        by.top = most * by.scale;
        each_two(c, at, end, [&](int64_t j, VecI on, VecI next) INLINE_BODY {
            const Vec x = where(on, by.raised(load(score.floats(j) + at)));
            const Vec y = where(next, by.raised(load(score.floats(j + 1) + at)));
            sum += x + y;
            give_pair<DOTS>(t.dtype, x, y, nullptr, nullptr, below.row(j / EACH<DOTS>) + at, CHUNK);
        });
        by.share = 1.0f / sum;
        return by;
    }

    // The gradient by a run's own queries, keys and values, and its share of its prompt's.
    void see_back(const PackedGrad& d, const PackedRun& run, int64_t key_head, float* place) {
        const bool alone = run.prompt < 0;  // a prompt: all of its gradient goes to its place
        const int64_t prompt = alone ? 0 : t.blocks[run.prompt].count, own = vectors(prompt);
        const int64_t rows_there = alone ? vectors(t.blocks[run.first].count) : own;
        const int64_t k = t.heads + key_head, v = k + t.key_heads;
        const Words shared_k = {(uint32_t*)place, width};
        const Words shared_v = {shared_k.row(rows_there), width};
        memset(place, 0, 2 * rows_there * width * sizeof(float));
        const auto all_of = [&](const PackedBlock& block, int64_t at) {
            lay(rows_of(block, k, at, keys), block.count, at);
            rows_of(block, v, at, values);
        };
        if (prompt) all_of(t.blocks[run.prompt], 0);
        for (int64_t b = run.first; b < run.last; b++) {
            const PackedBlock& block = t.blocks[b];
            all_of(block, own);
            const Words mine_k = alone ? shared_k : by_k, mine_v = alone ? shared_v : by_v;
            memset(mine_k.at, 0, vectors(block.count) * width * sizeof(float));
            memset(mine_v.at, 0, vectors(block.count) * width * sizeof(float));
            each_chunk(block, prompt, key_head, group, [&](const Chunk& c, int64_t h) {
                by_queries(d, c, h);
                by_keys(weight, above_pairs, c, shared_v, mine_v);
                by_keys(by_score, q_pairs, c, shared_k, mine_k);
            });
            if (alone) continue;
            put(mine_k.floats(0), block.count, block.start, k, true, d.by_heads);
            put(mine_v.floats(0), block.count, block.start, v, false, d.by_heads);
        }
    }

    // The gradients of a chunk's queries, and what they make of the weights.
    void by_queries(const PackedGrad& d, const Chunk& c, int64_t h) {
        const int64_t apart = t.heads * size, padded = vectors(c.n);
        read_heads(c.token, h, c.n, padded, q);
        read_rows<DOTS>(t, d.grad, t.tokens * apart, c.token * apart + h * size, apart, c.n, padded,
                        above);
        turn_words(q, padded, inner, q_across);
        turn_words(above, padded, inner, above_across);
        pair_rows<DOTS>(q, padded, width, q_pairs);
        pair_rows<DOTS>(above, padded, width, above_pairs);
        by_rows(keys, q_across, c, score);
        by_rows(values, above_across, c, by_weight);
        float tops[CHUNK] = {}, shares[CHUNK] = {};
        for (int64_t r = 0; r < c.n; r++) {
            const float* by = t.shares + ((c.token + r) * t.heads + h) * 2;
            tops[r] = by[0], shares[r] = by[1];
        }
        for (int64_t at = 0; at < c.n; at += LANES) {
            weigh_back(c, at, {t.scaling * LOG2_E, load(tops + at), load(shares + at)});
        }
        by_columns(c);
        turn_words(across, size, padded, out);
        put(out.floats(0), c.n, c.token, h, true, d.by_heads);
    }

    // Weights of a vector of queries, and the gradient by their scores.
    void weigh_back(const Chunk& c, int64_t at, const Weighing& by) {
        const int64_t end = c.end(HIGH), word = at / EACH<DOTS>;
        Vec mean = {};
        each_two(c, at, end, [&](int64_t j, VecI on, VecI next) INLINE_BODY {
            float *x = score.floats(j) + at, *y = x + CHUNK, *g = by_weight.floats(j) + at;
            const Vec p = where(on, by.raised(load(x)) * by.share);
            const Vec q = where(next, by.raised(load(y)) * by.share);
            mean += p * load(g) + q * load(g + CHUNK);
            store(x, p);
            store(y, q);
            give_pair<DOTS>(t.dtype, p, q, weight.row(j) + word, weight.row(j + 1) + word, nullptr,
                            CHUNK);
        });
        each_two(c, at, end, [&](int64_t j, VecI, VecI) INLINE_BODY {
            const float *x = score.floats(j) + at, *g = by_weight.floats(j) + at;
            const Vec a = t.scaling * load(x) * (load(g) - mean);
            const Vec b = t.scaling * load(x + CHUNK) * (load(g + CHUNK) - mean);
            give_pair<DOTS>(t.dtype, a, b, by_score.row(j) + word, by_score.row(j + 1) + word,
                            below.row(j / EACH<DOTS>) + at, CHUNK);
        });
    }

    // += what a chunk's queries make of their keys, of the prompt's and of the block's own.
    void by_keys(Words x, Words y, const Chunk& c, Words shared, Words mine) {
        const int64_t steps = vectors(c.n) / EACH<DOTS>;
        multiply_small<DOTS>(x, y, c.own, width, steps, steps, shared, true);
        for (int64_t j = 0; j < c.end(HIGH) - c.own; j += HIGH) {  // no query before a key sees it
            const int64_t past = std::max<int64_t>(0, j - c.first) / EACH<DOTS>;
            const Words a = {x.row(c.own + j) + past, x.apart};
            const Words b = {y.row(past), y.apart}, to = {mine.row(j), width};
            multiply_small<DOTS>(a, b, HIGH, width, steps - past, steps - past, to, true);
        }
    }

    const PackedTask& t;
    int64_t size, width, inner, group, stride;
    std::vector<float> cos, sin, row, turned;
    Store store_;
    Words keys, values, paired, flat, q, q_across, q_pairs, above, above_across, above_pairs;
    Words score, by_weight, weight, by_score, below, across, out, by_k, by_v;
};

// Prompts are turned before anyone sees them.
template <bool DOTS>
void forward(const PackedTask& t, int threads) {
    const Plan plan(t);
    const int64_t part = plan.part(t, threads);
    Dealt turned(t, plan, threads, 1), seen(t, plan, threads, part);
#pragma omp parallel num_threads(threads)
    {
        Thread<DOTS> mine(t, plan, false);
        turned.each([&](const PackedRun& run, int64_t key_head) {
            if (run.prompt < 0) mine.turn_block(t.blocks[run.first], key_head, 1);
        });
#pragma omp barrier
        seen.each([&](const PackedRun& run, int64_t key_head) {
            const bool turns = run.prompt >= 0 && key_head % part == 0;
            for (int64_t b = run.first; b < run.last && turns; b++) {
                mine.turn_block(t.blocks[b], key_head, part);
            }
            mine.see(run, key_head);
        });
    }
}

template <bool DOTS>
void backward(const PackedTask& t, const PackedGrad& d, int threads) {
    const Plan plan(t);
    const int64_t width = vectors(t.size);
    Dealt seen(t, plan, threads, plan.part(t, threads)), summed(t, plan, threads, 1);
    const std::unique_ptr<float[]> places(new float[plan.rows * t.key_heads * 2 * width + LANES]);
    const auto rows = [&](const PackedRun& run) {
        return vectors(t.blocks[run.prompt < 0 ? run.first : run.prompt].count);
    };
    const auto place = [&](const PackedRun& run, int64_t key_head) {
        return places.get() + (run.place * t.key_heads + key_head * rows(run)) * 2 * width;
    };
#pragma omp parallel num_threads(threads)
    {
        Thread<DOTS> mine(t, plan, true);
        seen.each([&](const PackedRun& run, int64_t key_head) {
            mine.see_back(d, run, key_head, place(run, key_head));
        });
#pragma omp barrier
        summed.each([&](const PackedRun& run, int64_t key_head) {
            if (run.prompt >= 0) return;
            const int64_t all = rows(run) * width;
            const PackedBlock& block = t.blocks[run.first];
            float* sum = place(run, key_head);
            for (const PackedRun& other : plan.runs) {
                if (other.prompt != run.first) continue;
                const float* more = place(other, key_head);
                for (int64_t j = 0; j < 2 * all; j++) sum[j] += more[j];
            }
            const int64_t k = t.heads + key_head, v = k + t.key_heads;
            mine.put(sum, block.count, block.start, k, true, d.by_heads);
            mine.put(sum + all, block.count, block.start, v, false, d.by_heads);
        });
    }
}

}  // namespace

void attend_packed(const PackedTask& t, int threads) {
#ifdef __AVX512F__
    if (t.dots) return forward<true>(t, threads);
#endif
    forward<false>(t, threads);
}

void attend_packed_grad(const PackedTask& t, const PackedGrad& d, int threads) {
#ifdef __AVX512F__
    if (t.dots) return backward<true>(t, d, threads);
#endif
    backward<false>(t, d, threads);
}

}  // namespace ISA
}  // namespace reasonrl
