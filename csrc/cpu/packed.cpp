// Attention over packed tokens, forward and backward: a completion's queries see their prompt and
// their own tokens up to themselves, a prompt's its own.
//
//   q, k turned by their angles, in place;  p = softmax(scaling q k^T where seen);  out = p v
//   dv = p^T do,  ds = scaling p (dp - sum p dp), dp = do v^T,  dq = ds k,  dk = ds^T q, turned
//   back
//
// A run is a prompt, or a few completions of one: with one key head it is one thread's work, in
// that thread's own memory. Weights are made again in the backward, of a maximum and a share a row.
// What completions add to their prompt's keys is summed run by run, in their order. Sums are
// float32; weights and ds are rounded to the heads' type, and results, each once.
#include "packed.h"

#include "tiles.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int64_t CHUNK = 64;  // queries of a product by keys

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
          row(stride + 2 * LANES),
          turned(row),
          half(stride + 2 * LANES) {
        const int64_t wide = vectors(inner), columns = plan.columns, chunk = CHUNK;
        const int64_t pairs = std::max<int64_t>(LANES, chunk / EACH<DOTS>);
        rows = store_.words(std::max(plan.queries, chunk), wide);
        k_across = store_.words(wide, columns);
        v_pairs = store_.words(columns / EACH<DOTS>, width);
        q = store_.words(chunk, wide);
        score = store_.words(HIGH, columns);
        out = store_.words(HIGH, width);
        weight = store_.words(chunk, columns / EACH<DOTS>);
        if (!back) return;
        v_across = store_.words(wide, columns);
        k_pairs = store_.words(columns / EACH<DOTS>, width);
        above = store_.words(chunk, wide);
        q_pairs = store_.words(pairs, width);
        above_pairs = store_.words(pairs, width);
        by_weight = store_.words(HIGH, columns);
        by_score = store_.words(chunk, columns / EACH<DOTS>);
        paired = store_.words(pairs, columns);
        across = store_.words(columns, pairs);
        by_k = store_.words(plan.queries, width);
        by_v = store_.words(plan.queries, width);
    }

    // `count` rows of heads as words, with zero rows behind them up to `padded`. Of `all` numbers;
    // what stands behind a head of even size may be read with it, and concerns no result.
    void read(const void* from, int64_t all, int64_t at, int64_t apart, int64_t count,
              int64_t padded, Words to) {
        for (int64_t i = 0; i < padded; i++, at += apart) {
            if (DOTS && size % 2 == 0 && i < count && at + 2 * to.apart <= all) {
                const uint32_t* here = (const uint32_t*)((const uint16_t*)from + at);
                for (int64_t j = 0; j < to.apart; j += LANES) {
                    store(to.floats(i) + j, (Vec)load_words(here + j));
                }
                continue;
            }
            memset(to.row(i), 0, to.apart * sizeof(uint32_t));
            if (i >= count) continue;
            if (DOTS) memcpy(to.row(i), (const uint16_t*)from + at, size * 2);
            if (!DOTS) read_any(t.dtype, from, at, size, to.floats(i));
        }
    }

    void read_heads(int64_t token, int64_t head, int64_t count, int64_t padded, Words to) {
        const int64_t at = token * stride + head * size;
        read(t.heads_of, t.tokens * stride, at, stride, count, padded, to);
    }

    // Keys and values of a block from column `at` on, as the products want them.
    void take(const PackedBlock& block, int64_t key_head, int64_t at, bool back) {
        const int64_t padded = vectors(block.count), k = t.heads + key_head, v = k + t.key_heads;
        const auto beside = [&](Words x) { return Words{x.at + at, x.apart}; };
        const auto under = [&](Words x) { return Words{x.row(at / EACH<DOTS>), x.apart}; };
        read_heads(block.start, k, block.count, padded, rows);
        turn_words(rows, padded, inner, beside(k_across));
        if (back) pair_rows<DOTS>(rows, padded, width, under(k_pairs));
        read_heads(block.start, v, block.count, padded, rows);
        if (back) turn_words(rows, padded, inner, beside(v_across));
        if (!back) pair_rows<DOTS>(rows, padded, width, under(v_pairs));
    }

    // Numbers of a row, rounded to the type, as words; zeros up to `columns`.
    void keep(float* from, int64_t count, int64_t columns, uint32_t* to) {
        if (count < columns) memset(from + count, 0, (columns - count) * sizeof(float));
        if (DOTS) return round_pairs(from, columns, to);
        for (int64_t j = 0; j < columns; j += LANES) {
            const Vec x = load(from + j);
            store((float*)to + j, t.dtype == BF16 ? as<BF16>(x) : x);
        }
        for (int64_t j = 0; j < columns && t.dtype == F16; j++) {
            ((float*)to)[j] = from_f16(to_f16(from[j]));
        }
    }

    // `count` numbers as the type has them; all may be read a vector beyond the end.
    void write(const float* from, int64_t count, void* to, int64_t at) {
        if (!DOTS) return write_any(t.dtype, to, at, count, from);
        round_pairs(from, vectors(count), (uint32_t*)half.data());
        memcpy((uint16_t*)to + at, half.data(), count * sizeof(uint16_t));
    }

    template <bool BACK>
    void turn(const float* x, int64_t token, int64_t heads, float* to) {
        const float *c = cos.data(), *s = sin.data();
        if (t.angle_dtype == F32 && (t.tokens - token) * size >= size + LANES) {
            c = (const float*)t.cos + token * size, s = (const float*)t.sin + token * size;
        } else {
            read_any(t.angle_dtype, t.cos, token * size, size, cos.data());
            read_any(t.angle_dtype, t.sin, token * size, size, sin.data());
        }
        for (int64_t h = 0; h < heads; h++) {
            turn_head<BACK>(x + h * size, c, s, size / 2, to + h * size);
        }
    }

    // Queries and keys of a token are turned where they stand.
    void turn_token(int64_t token) {
        const int64_t heads = t.heads + t.key_heads, at = token * stride;
        read_any(t.dtype, t.heads_of, at, heads * size, row.data());
        turn<false>(row.data(), token, heads, turned.data());
        write(turned.data(), heads * size, t.heads_of, at);
    }

    // A row of a gradient by q or k, turned back, or by v.
    void put(const float* x, int64_t token, int64_t head, bool back, void* to) {
        if (back && t.cos) {
            turn<true>(x, token, 1, turned.data());
            x = turned.data();
        }
        write(x, size, to, token * stride + head * size);
    }

    void see(const PackedRun& run, int64_t key_head) {
        const int64_t prompt = run.prompt < 0 ? 0 : t.blocks[run.prompt].count;
        const int64_t own = vectors(prompt);
        if (prompt) take(t.blocks[run.prompt], key_head, 0, false);
        for (int64_t b = run.first; b < run.last; b++) {
            const PackedBlock& block = t.blocks[b];
            take(block, key_head, own, false);
            for (int64_t h = key_head * group; h < (key_head + 1) * group; h++) {
                for (int64_t first = 0; first < block.count; first += HIGH) {
                    const int64_t n = std::min<int64_t>(HIGH, block.count - first);
                    const int64_t columns = own + vectors(first + n), token = block.start + first;
                    read_heads(token, h, n, HIGH, q);
                    multiply_small<DOTS>(q, k_across, HIGH, columns, inner, score, false);
                    for (int64_t r = 0; r < n; r++) {
                        const Seen seen = {prompt, own, first + r + 1};
                        const Weighing by = soften(score.floats(r), seen, t.scaling);
                        memcpy(t.shares + ((token + r) * t.heads + h) * 2, &by, sizeof by);
                        keep(score.floats(r), seen.end(), columns, weight.row(r));
                    }
                    multiply_small<DOTS>(weight, v_pairs, HIGH, width, columns / EACH<DOTS>, out,
                                         false);
                    for (int64_t r = 0; r < n; r++) {
                        const int64_t at = ((token + r) * t.heads + h) * size;
                        write(out.floats(r), size, t.out, at);
                    }
                }
            }
        }
    }

    // The gradient by a run's own queries, keys and values, and its share of its prompt's.
    void see_back(const PackedGrad& d, const PackedRun& run, int64_t key_head, float* place) {
        const bool alone = run.prompt < 0;  // a prompt: all of its gradient goes to its place
        const int64_t prompt = alone ? 0 : t.blocks[run.prompt].count, own = vectors(prompt);
        const int64_t rows_there = alone ? vectors(t.blocks[run.first].count) : own;
        const Words shared_k = {(uint32_t*)place, width};
        const Words shared_v = {shared_k.row(rows_there), width};
        memset(place, 0, 2 * rows_there * width * sizeof(float));
        if (prompt) take(t.blocks[run.prompt], key_head, 0, true);
        for (int64_t b = run.first; b < run.last; b++) {
            const PackedBlock& block = t.blocks[b];
            take(block, key_head, own, true);
            const Words mine_k = alone ? shared_k : by_k, mine_v = alone ? shared_v : by_v;
            memset(mine_k.at, 0, vectors(block.count) * width * sizeof(float));
            memset(mine_v.at, 0, vectors(block.count) * width * sizeof(float));
            for (int64_t h = key_head * group; h < (key_head + 1) * group; h++) {
                for (int64_t first = 0; first < block.count; first += CHUNK) {
                    const int64_t n = std::min<int64_t>(CHUNK, block.count - first);
                    by_queries(d, block, h, first, n, prompt);
                    by_keys(weight, above_pairs, first, n, own, shared_v, mine_v);
                    by_keys(by_score, q_pairs, first, n, own, shared_k, mine_k);
                }
            }
            for (int64_t i = 0; i < block.count && !alone; i++) {
                put(mine_k.floats(i), block.start + i, t.heads + key_head, true, d.by_heads);
                put(mine_v.floats(i), block.start + i, t.heads + t.key_heads + key_head, false,
                    d.by_heads);
            }
        }
    }

    // `n` queries from `first` on: their gradients, and what they make of the weights.
    void by_queries(const PackedGrad& d, const PackedBlock& block, int64_t h, int64_t first,
                    int64_t n, int64_t prompt) {
        const int64_t own = vectors(prompt), columns = own + vectors(first + n);
        const int64_t token = block.start + first, padded = (n + HIGH - 1) / HIGH * HIGH;
        const int64_t apart = t.heads * size, at = token * apart + h * size;
        read_heads(token, h, n, padded, q);
        read(d.grad, t.tokens * apart, at, apart, n, padded, above);
        pair_rows<DOTS>(q, padded, width, q_pairs);
        pair_rows<DOTS>(above, padded, width, above_pairs);
        for (int64_t i = 0; i < padded; i += HIGH) {
            const int64_t end = std::min(n, i + HIGH), here = own + vectors(first + end);
            const auto from = [&](Words x) { return Words{x.row(i), x.apart}; };
            multiply_small<DOTS>(from(q), k_across, HIGH, here, inner, score, false);
            multiply_small<DOTS>(from(above), v_across, HIGH, here, inner, by_weight, false);
            for (int64_t r = i; r < end; r++) {
                const Seen seen = {prompt, own, first + r + 1};
                Weighing by;
                memcpy(&by, t.shares + ((token + r) * t.heads + h) * 2, sizeof by);
                float *p = score.floats(r - i), *g = by_weight.floats(r - i);
                weigh(p, seen, t.scaling, by);
                keep(p, seen.end(), columns, weight.row(r));
                Vec sum = {};
                for (int64_t j = 0; j < seen.end(); j += LANES) sum += load(p + j) * load(g + j);
                const float mean = sum_of_lanes(sum);
                for (int64_t j = 0; j < seen.end(); j += LANES) {
                    store(g + j, t.scaling * load(p + j) * (load(g + j) - mean));
                }
                keep(g, seen.end(), columns, by_score.row(r));
            }
            for (int64_t r = end; r < i + HIGH; r++) {
                memset(weight.row(r), 0, weight.apart * sizeof(uint32_t));
                memset(by_score.row(r), 0, by_score.apart * sizeof(uint32_t));
            }
            multiply_small<DOTS>(from(by_score), k_pairs, HIGH, width, here / EACH<DOTS>, out,
                                 false);
            for (int64_t r = i; r < end; r++)
                put(out.floats(r - i), token + r, h, true, d.by_heads);
        }
    }

    // += what a chunk's queries make of their keys: x^T y, of the prompt's and of the block's own.
    void by_keys(Words x, Words y, int64_t first, int64_t n, int64_t own, Words shared,
                 Words mine) {
        const int64_t columns = own + vectors(first + n);
        const int64_t padded = (n + HIGH - 1) / HIGH * HIGH, steps = padded / EACH<DOTS>;
        pair_rows<DOTS>(x, padded, columns, paired);
        turn_words(paired, steps, columns, across);
        multiply_small<DOTS>(across, y, own, width, steps, shared, true);
        for (int64_t j = 0; j < columns - own; j += HIGH) {  // no query before a key sees it
            const int64_t past = std::max<int64_t>(0, j - first) / EACH<DOTS>;
            if (past >= steps) break;
            const Words a = {across.row(own + j) + past, across.apart};
            const Words b = {y.row(past), y.apart};
            multiply_small<DOTS>(a, b, HIGH, width, steps - past, {mine.row(j), width}, true);
        }
    }

    const PackedTask& t;
    int64_t size, width, inner, group, stride;
    std::vector<float> cos, sin, row, turned;
    std::vector<uint16_t> half;
    Store store_;
    Words rows, k_across, k_pairs, v_across, v_pairs, q, q_pairs, above, above_pairs;
    Words score, by_weight, weight, by_score, paired, across, out, by_k, by_v;
};

// Each key head of each run, by whoever is free.
template <bool DOTS>
void forward(const PackedTask& t, int threads) {
    const Plan plan(t);
    const int64_t count = (int64_t)plan.runs.size() * t.key_heads;
#pragma omp parallel num_threads(threads)
    {
        Thread<DOTS> mine(t, plan, false);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (t.cos ? t.tokens : 0); i++) mine.turn_token(i);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            mine.see(plan.runs[i / t.key_heads], i % t.key_heads);
        }
    }
}

template <bool DOTS>
void backward(const PackedTask& t, const PackedGrad& d, int threads) {
    const Plan plan(t);
    const int64_t width = vectors(t.size), count = (int64_t)plan.runs.size() * t.key_heads;
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
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            const PackedRun& run = plan.runs[i / t.key_heads];
            mine.see_back(d, run, i % t.key_heads, place(run, i % t.key_heads));
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            const PackedRun& run = plan.runs[i / t.key_heads];
            if (run.prompt >= 0) continue;
            const int64_t key_head = i % t.key_heads, all = rows(run) * width;
            const PackedBlock& block = t.blocks[run.first];
            float* sum = place(run, key_head);
            for (const PackedRun& other : plan.runs) {
                if (other.prompt != run.first) continue;
                const float* more = place(other, key_head);
                for (int64_t j = 0; j < 2 * all; j++) sum[j] += more[j];
            }
            const int64_t k = t.heads + key_head, v = k + t.key_heads;
            for (int64_t j = 0; j < block.count; j++) {
                mine.put(sum + j * width, block.start + j, k, true, d.by_heads);
                mine.put(sum + all + j * width, block.start + j, v, false, d.by_heads);
            }
        }
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
