// The policy loss on a GPU: a block per completion, or per 4096 tokens where no completion matters.
//
// Sequence ratios read their completion twice (its mean first), token ratios once. Per-block sums
// go to memory and a last block adds them in a fixed order: the same bits in every run.
#include "device.h"

#include "launch.h"

namespace reasonrl {
namespace {

constexpr int64_t CHUNK = 4096;

__host__ __device__ bool ignores_completions(const Loss& loss, int per_completion) {
    return loss.ratio == TOKEN && !per_completion;
}

struct Token {
    bool on, good;
    float logp, d, advantage, r, weight, entropy;
};

// x[i], or `absent` without x; false where it is not finite. One read.
__device__ bool take(const float* x, int64_t i, float absent, float* out) {
    *out = x ? x[i] : absent;
    return is_finite(*out);
}

// Masked and non-finite tokens hold zeros: selected away, never multiplied.
__device__ Token load(const PolicyTask& task, int64_t i) {
    Token t = {};
    t.on = task.mask == nullptr || task.mask[i] != 0;
    if (!t.on) return t;
    Token read = {true, true};
    float old, ref;
    bool good = take(task.logp, i, 0.0f, &read.logp);
    good &= take(task.old_logp, i, read.logp, &old);
    good &= take(task.advantage, i, 0.0f, &read.advantage);
    good &= take(task.ref_logp, i, read.logp, &ref);
    good &= take(task.weight, i, 1.0f, &read.weight);
    good &= take(task.entropy, i, 0.0f, &read.entropy);
    read.d = read.logp - old;
    read.r = ref - read.logp;
    return good ? read : t;
}

// A completion's own numbers: mean d; gmpo: v = -exp(mean l) mean(A) mean(w), d(sum over
// tokens)/dl_t.
struct Whole {
    float d, v, share;
};

__device__ Whole look_ahead(const Loss& loss, const PolicyTask& task, int64_t start, int64_t end,
                            double count, double* slots) {
    double x[5] = {};
    for (int64_t i = start + threadIdx.x; i < end; i += THREADS) {
        const Token t = load(task, i);
        x[0] += t.d;
        x[1] += gmpo_term(loss, t.d, t.advantage).loss;
        x[2] += t.advantage;
        x[3] += t.weight;
        x[4] += t.good ? 1.0 : 0.0;
    }
    block_sums<5>(x, slots);
    const float l = (float)(x[1] / count), capped = clamp_to(l, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const double v = -(double)exp_of(capped) * (x[2] / count) * (x[3] / count);
    Whole whole;
    whole.d = (float)(x[0] / count);
    whole.v = (float)v;
    whole.share = capped == l ? (float)(v * x[4] / count) : 0.0f;
    return whole;
}

__device__ Term term_of(const Loss& loss, const Whole& whole, const Token& t) {
    const float d = loss.ratio == TOKEN ? t.d : whole.d;
    if (loss.surrogate != GMPO) {
        Term term = surrogate_term(loss, loss.surrogate, d, t.logp, t.advantage);
        term.loss *= t.weight;
        term.grad *= t.weight;
        return term;
    }
    Term term = gmpo_term(loss, t.d, t.advantage);
    term.grad *= whole.share;
    term.loss = whole.v;
    term.ratio = exp_of(clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT));
    return term;
}

__global__ void policy_kernel(Loss loss, PolicyTask task) {
    SHARED(double, slots, WARPS*(SUM_COUNT + 1));
    const bool plain = ignores_completions(loss, task.per_completion);
    const int64_t b = blockIdx.x;
    const int64_t start = plain ? b * CHUNK : task.cu[b];
    const int64_t last = start + CHUNK < task.tokens ? start + CHUNK : task.tokens;
    const int64_t end = plain ? last : task.cu[b + 1];
    const double count = plain || task.counts[b] == 0 ? 1.0 : (double)task.counts[b];
    const double scale = 1.0 / (task.per_completion ? task.divisors[0] * count : task.divisors[0]);
    const double entropy_scale = task.divisors[1] != 0.0 ? 1.0 / task.divisors[1] : scale;
    const float eta = -loss.entropy_coef * (float)entropy_scale;
    const bool shared = loss.ratio == SEQUENCE && loss.surrogate == CLIP;
    Whole whole = {};
    if (loss.ratio != TOKEN) whole = look_ahead(loss, task, start, end, count, slots);

    double x[SUM_COUNT + 1] = {};  // the last one: the gradient that a completion shares evenly
    for (int64_t i = start + threadIdx.x; i < end; i += THREADS) {
        const Token t = load(task, i);
        x[SUM_TOKENS] += t.on ? 1.0 : 0.0;
        x[SUM_NONFINITE] += t.on && !t.good ? 1.0 : 0.0;
        float c = 0.0f, slope;
        if (t.good) {
            const Term term = term_of(loss, whole, t);
            const float k = kl_term(loss.kl_coef != 0.0f ? loss.kl : (int)K3, t.r, &slope);
            c = ((shared ? 0.0f : term.grad) + loss.kl_coef * slope) * (float)scale;
            x[SUM_LOSS] += (term.loss + loss.kl_coef * k) * scale + (double)eta * t.entropy;
            x[SUM_LOW] += term.low;
            x[SUM_HIGH] += term.high;
            x[SUM_CUT] += term.cut;
            x[SUM_KL] += k;
            x[SUM_RATIO] += term.ratio;
            x[SUM_RATIO_MAX] = term.ratio > x[SUM_RATIO_MAX] ? term.ratio : x[SUM_RATIO_MAX];
            x[SUM_ACTIVE] += !shared && (c != 0.0f || eta != 0.0f) ? 1.0 : 0.0;
            x[SUM_COUNT] += term.grad;
        }
        task.grad_logp[i] = c;
        if (task.grad_entropy) task.grad_entropy[i] = t.good ? eta : 0.0f;
    }
    block_sums<SUM_COUNT + 1>(x, slots, SUM_RATIO_MAX);
    if (shared) {
        const float part = (float)(x[SUM_COUNT] / count * scale);
        double active[1] = {};
        for (int64_t i = start + threadIdx.x; i < end; i += THREADS) {
            if (!load(task, i).good) continue;
            const float c = task.grad_logp[i] + part;
            task.grad_logp[i] = c;
            active[0] += c != 0.0f || eta != 0.0f ? 1.0 : 0.0;
        }
        block_sums<1>(active, slots);
        x[SUM_ACTIVE] = active[0];
    }
    if (threadIdx.x == 0) {
        for (int k = 0; k < SUM_COUNT; k++) task.sums[b * SUM_COUNT + k] = x[k];
    }
}

__global__ void finish_kernel(PolicyTask task, int64_t items) {
    SHARED(double, slots, WARPS* SUM_COUNT);
    double x[SUM_COUNT] = {};
    for (int64_t i = threadIdx.x; i < items; i += THREADS) {
        for (int k = 0; k < SUM_COUNT; k++) {
            const double y = task.sums[i * SUM_COUNT + k];
            x[k] = k == SUM_RATIO_MAX ? (y > x[k] ? y : x[k]) : x[k] + y;
        }
    }
    block_sums<SUM_COUNT>(x, slots, SUM_RATIO_MAX);
    if (threadIdx.x != 0) return;
    const double n = x[SUM_TOKENS] > 0.0 ? x[SUM_TOKENS] : 1.0;
    const double metrics[11] = {
        x[SUM_LOSS],    x[SUM_LOW] / n,   x[SUM_HIGH] / n,  (x[SUM_LOW] + x[SUM_HIGH]) / n,
        x[SUM_CUT] / n, x[SUM_KL] / n,    x[SUM_RATIO] / n, x[SUM_RATIO_MAX],
        x[SUM_TOKENS],  x[SUM_NONFINITE], x[SUM_ACTIVE] / n};
    for (int k = 0; k < 11; k++) task.result[k] = (float)metrics[k];
}

}  // namespace
}  // namespace reasonrl

using namespace reasonrl;

int64_t reasonrl_policy_items(const Loss* loss, int64_t tokens, int64_t batch, int per_completion) {
    return ignores_completions(*loss, per_completion) ? (tokens + CHUNK - 1) / CHUNK : batch;
}

int reasonrl_policy(const Loss* loss, const PolicyTask* task, void* stream) {
    const int64_t items =
        reasonrl_policy_items(loss, task->tokens, task->batch, task->per_completion);
    const int error = launch(items, stream, policy_kernel, *loss, *task);
    return error ? error : launch(1, stream, finish_kernel, *task, items);
}
