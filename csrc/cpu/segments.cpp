// Groups and steps. Sums are double, in memory order: one result for any number of
// threads.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../ops.h"
#include "groups.h"

namespace reasonrl {

// Those that are not 0, in bytes as long as a byte can count: a vector holds many of them.
static int64_t count_set(const uint8_t* mask, int64_t n) {
    constexpr int64_t BLOCK = 240;
    int64_t total = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t size = std::min(BLOCK, n - i);
        uint8_t part = 0;
        for (int64_t k = 0; k < size; k++) part += mask[i + k] != 0;
        total += part;
    }
    return total;
}

void count_tokens(const uint8_t* mask, const int64_t* cu, int64_t batch, int64_t* counts) {
    for (int64_t b = 0; b < batch; b++) {
        const int64_t n = cu[b + 1] - cu[b];
        counts[b] = mask ? count_set(mask + cu[b], n) : n;
    }
}

// Members of one group; a group whose scored rewards are all equal, or fewer than two, stays 0.
void normalise(const float* reward, const int64_t* member, int64_t n, int kind, double ddof,
               double eps, float* out) {
    if (n < 2) return;
    double sum = 0.0;
    bool equal = true;
    for (int64_t k = 0; k < n; k++) {
        sum += reward[member[k]];
        equal = equal && reward[member[k]] == reward[member[0]];
    }
    if (equal) return;
    const double mean = sum / (double)n;
    double square = 0.0;
    for (int64_t k = 0; k < n; k++) {
        const double x = reward[member[k]] - mean;
        square += x * x;
    }
    const double scale =
        kind == GROUP_GRPO ? sqrt(square / std::max((double)n - ddof, 1.0)) + eps : 1.0;
    for (int64_t k = 0; k < n; k++) {
        const double r = reward[member[k]];
        const double base = kind == GROUP_RLOO ? (sum - r) / (double)(n - 1) : mean;
        out[member[k]] = (float)((r - base) / scale);
    }
}

void group_advantage(const float* reward, const int64_t* group, const uint8_t* scored,
                     int64_t batch, int kind, double ddof, double eps, float* out) {
    std::fill(out, out + batch, 0.0f);
    each_group(group, scored, batch, [&](const int64_t* member, int64_t n) {
        normalise(reward, member, n, kind, ddof, eps, out);
    });
}

// Keeps the first NaN, then the first smallest or largest.
static bool better(float x, float best, bool smallest) {
    if (best != best) return false;
    return x != x || (smallest ? x < best : x > best);
}

static void pick(const float* value, const int64_t* step, int64_t tokens, int64_t steps, int how,
                 float* out, int64_t* index) {
    std::fill(index, index + steps, (int64_t)-1);
    for (int64_t i = 0; i < tokens; i++) {
        if (step[i] < 0) continue;
        int64_t& at = index[step[i]];
        if (at < 0 || how == STEP_LAST || better(value[i], value[at], how == STEP_MIN)) at = i;
    }
    for (int64_t s = 0; s < steps; s++) out[s] = index[s] < 0 ? 0.0f : value[index[s]];
}

namespace {

// The runs of WAVE chunks of tokens at a time, listed side by side.
class Waves {
  public:
    static constexpr int WAVE = 16;
    int64_t count[WAVE];

    Waves(const float* value, const int64_t* step, int64_t tokens, int what, int threads)
        : value(value),
          step(step),
          tokens(tokens),
          what(what),
          threads(threads),
          size(std::min<int64_t>(1 << 15, tokens)),
          buffer(new Run[WAVE * size]) {}

    bool next() {
        if (at >= tokens) return false;
        bool each[WAVE];
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int w = 0; w < WAVE; w++) {
            const int64_t start = std::min(tokens, at + w * size);
            const int64_t stop = std::min(tokens, start + size);
            count[w] = ops().list_runs(value, step, start, stop, what, runs(w), &each[w]);
        }
        at += WAVE * size;
        for (int w = 0; w < WAVE; w++) {
            if (count[w] == 0) continue;
            rises = rises && each[w] && runs(w)[0].step >= last;
            last = runs(w)[count[w] - 1].step;
        }
        return true;
    }

    // so far no step has two runs, but for those that a chunk's end has split
    bool ascending() const { return rises; }
    Run* runs(int w) { return buffer.get() + w * size; }

  private:
    const float* value;
    const int64_t* step;
    const int64_t tokens;
    const int what, threads;
    const int64_t size;
    std::unique_ptr<Run[]> buffer;
    int64_t at = 0, last = -1;
    bool rises = true;
};

void join(Run& all, const Run& run, bool product) {
    all.value = product ? all.value * run.value : all.value + run.value;
    all.tokens += run.tokens;
    all.end = run.end;
}

// Calls done(run) once for every step that has tokens, from any thread; false, and half done, where
// the steps do not ascend.
template <typename Done>
bool each_step(Waves waves, bool product, int threads, Done done) {
    Run open = {-1, 0, 0, 0.0};  // may go on in the next chunk
    while (waves.next()) {
        if (!waves.ascending()) return false;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int w = 0; w < Waves::WAVE; w++) {
            for (int64_t k = 1; k < waves.count[w] - 1; k++) done(waves.runs(w)[k]);
        }
        for (int w = 0; w < Waves::WAVE; w++) {
            const int64_t n = waves.count[w];
            if (n == 0) continue;
            const Run first = waves.runs(w)[0];
            if (first.step == open.step) {
                join(open, first, product);
            } else {
                if (open.step >= 0) done(open);
                open = first;
            }
            if (n > 1) done(open), open = waves.runs(w)[n - 1];
        }
    }
    if (open.step >= 0) done(open);
    return true;
}

// The same for steps in any order, by one number a step.
template <typename Done>
void each_step_of_any(Waves waves, int64_t steps, bool product, Done done) {
    std::vector<Run> all(steps, Run{-1, 0, 0, product ? 1.0 : 0.0});
    while (waves.next()) {
        for (int w = 0; w < Waves::WAVE; w++) {
            for (int64_t k = 0; k < waves.count[w]; k++) {
                const Run& run = waves.runs(w)[k];
                join(all[run.step], run, product);
                all[run.step].step = run.step;
            }
        }
    }
    for (const Run& run : all) {
        if (run.step >= 0) done(run);
    }
}

template <typename Done>
void all_steps(const float* value, const int64_t* step, int64_t tokens, int64_t steps, int what,
               int threads, Done done) {
    const auto waves = [&] { return Waves(value, step, tokens, what, threads); };
    const bool product = what == RUN_PRODUCT;
    if (!each_step(waves(), product, threads, done)) {
        each_step_of_any(waves(), steps, product, done);
    }
}

}  // namespace

// `index` (S,): the token chosen (min, max, last) or the number of tokens (mean).
void step_reduce(const float* value, const int64_t* step, int64_t tokens, int64_t steps, int how,
                 float* out, int64_t* index, int threads) {
    if (how == STEP_MIN || how == STEP_MAX || how == STEP_LAST) {
        return pick(value, step, tokens, steps, how, out, index);
    }
    const bool product = how == STEP_PROD, mean = how == STEP_MEAN;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < steps; s++) out[s] = product ? 1.0f : 0.0f, index[s] = 0;
    const auto done = [=](const Run& run) {
        out[run.step] = (float)(mean ? run.value / (double)run.tokens : run.value);
        index[run.step] = run.tokens;
    };
    all_steps(value, step, tokens, steps, product ? RUN_PRODUCT : RUN_SUM, threads, done);
}

// Every factor's gradient is the product of the others: by division, but exact around zeros.
static void prod_grad(const float* value, const int64_t* step, int64_t tokens, int64_t steps,
                      const float* grad, float* out) {
    std::vector<double> rest(steps, 1.0);
    std::vector<int64_t> zeros(steps, 0);
    for (int64_t i = 0; i < tokens; i++) {
        if (step[i] < 0) continue;
        if (value[i] == 0.0f) {
            zeros[step[i]]++;
        } else {
            rest[step[i]] *= value[i];
        }
    }
    for (int64_t i = 0; i < tokens; i++) {
        out[i] = 0.0f;
        if (step[i] < 0) continue;
        const int64_t s = step[i], others = zeros[s] - (value[i] == 0.0f);
        const double product = value[i] == 0.0f ? rest[s] : rest[s] / value[i];
        if (others == 0) out[i] = (float)(grad[s] * product);
    }
}

void step_reduce_grad(const float* value, const int64_t* step, int64_t tokens, int64_t steps,
                      int how, const int64_t* index, const float* grad, float* out, int threads) {
    if (how == STEP_PROD) return prod_grad(value, step, tokens, steps, grad, out);
    const bool chosen = how == STEP_MIN || how == STEP_MAX || how == STEP_LAST;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < tokens; i++) {
        const int64_t s = step[i];
        out[i] = 0.0f;
        if (s < 0) continue;
        if (chosen) {
            if (index[s] == i) out[i] = grad[s];
        } else {
            out[i] = how == STEP_MEAN ? grad[s] / (float)index[s] : grad[s];
        }
    }
}

void step_expand(const float* value, const int64_t* step, int64_t tokens, int64_t steps, bool last,
                 float* out, int threads) {
    if (!last) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < tokens; i++) out[i] = step[i] < 0 ? 0.0f : value[step[i]];
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < tokens; i++) out[i] = 0.0f;
    const auto done = [=](const Run& run) { out[run.end - 1] = value[run.step]; };
    all_steps(nullptr, step, tokens, steps, RUN_ENDS, threads, done);
}

}  // namespace reasonrl
