// Groups and steps. Sums are double, in memory order: one result for any number of
// threads.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../ops.h"

namespace reasonrl {

void count_tokens(const uint8_t* mask, const int64_t* cu, int64_t batch, int64_t* counts) {
    for (int64_t b = 0; b < batch; b++) {
        int64_t n = cu[b + 1] - cu[b];
        if (mask) {
            n = 0;
            for (int64_t i = cu[b]; i < cu[b + 1]; i++) n += mask[i] != 0;
        }
        counts[b] = n;
    }
}

// Members of one group; a group whose scored rewards are all equal, or fewer than two, stays 0.
static void one_group(const float* reward, const int64_t* member, int64_t n, int kind, double ddof,
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
    std::vector<int64_t> member;
    member.reserve(batch);
    for (int64_t b = 0; b < batch; b++) {
        out[b] = 0.0f;
        if (!scored || scored[b]) member.push_back(b);
    }
    const auto before = [group](int64_t a, int64_t b) { return group[a] < group[b]; };
    if (!std::is_sorted(member.begin(), member.end(), before)) {
        std::stable_sort(member.begin(), member.end(), before);
    }
    const int64_t n = (int64_t)member.size();
    for (int64_t at = 0, end; at < n; at = end) {
        for (end = at + 1; end < n && group[member[end]] == group[member[at]]; end++) {
        }
        one_group(reward, member.data() + at, end - at, kind, ddof, eps, out);
    }
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

// A run of neighbouring tokens of one step: mostly a whole step.
struct Run {
    int64_t step, tokens;
    double value;  // their sum or product
};

void list_runs(const float* value, const int64_t* step, int64_t start, int64_t stop, bool product,
               std::vector<Run>& out) {
    out.clear();
    for (int64_t i = start, end; i < stop; i = end) {
        const int64_t s = step[i];
        for (end = i + 1; end < stop && step[end] == s; end++) {
        }
        if (s < 0) continue;
        double run = product ? 1.0 : 0.0, even = 0.0, odd = 0.0;
        if (product) {
            for (int64_t k = i; k < end; k++) run *= value[k];
        } else {
            int64_t k = i;
            for (; k + 1 < end; k += 2) even += value[k], odd += value[k + 1];
            run = even + odd + (k < end ? (double)value[k] : 0.0);
        }
        out.push_back({s, end - i, run});
    }
}

// `index` (S,): the token chosen (min, max, last) or the number of tokens (mean).
void step_reduce(const float* value, const int64_t* step, int64_t tokens, int64_t steps, int how,
                 float* out, int64_t* index, int threads) {
    if (how == STEP_MIN || how == STEP_MAX || how == STEP_LAST) {
        return pick(value, step, tokens, steps, how, out, index);
    }
    constexpr int64_t CHUNK = 1 << 15;
    constexpr int WAVE = 16;  // chunks whose runs are kept at one time, then added in order
    const bool product = how == STEP_PROD;
    std::vector<double> total(steps, product ? 1.0 : 0.0);
    std::vector<Run> runs[WAVE];
    std::fill(index, index + steps, (int64_t)0);
    for (int64_t base = 0; base < tokens; base += WAVE * CHUNK) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int w = 0; w < WAVE; w++) {
            const int64_t start = std::min(tokens, base + w * CHUNK);
            const int64_t stop = std::min(tokens, start + CHUNK);
            list_runs(value, step, start, stop, product, runs[w]);
        }
        for (const std::vector<Run>& part : runs) {
            for (const Run& run : part) {
                index[run.step] += run.tokens;
                total[run.step] =
                    product ? total[run.step] * run.value : total[run.step] + run.value;
            }
        }
    }
    for (int64_t s = 0; s < steps; s++) {
        const double n = how == STEP_MEAN && index[s] > 0 ? (double)index[s] : 1.0;
        out[s] = (float)(total[s] / n);
    }
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
                      int how, const int64_t* index, const float* grad, float* out) {
    if (how == STEP_PROD) return prod_grad(value, step, tokens, steps, grad, out);
    const bool chosen = how == STEP_MIN || how == STEP_MAX || how == STEP_LAST;
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
    std::vector<uint8_t> seen(steps, 0);
    for (int64_t i = tokens - 1; i >= 0; i--) {
        const bool take = step[i] >= 0 && !seen[step[i]];
        out[i] = take ? value[step[i]] : 0.0f;
        if (take) seen[step[i]] = 1;
    }
}

}  // namespace reasonrl
