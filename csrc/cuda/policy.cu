// The policy loss on a GPU in one launch: a block per completion, per 4096 tokens where no
// completion matters, or, from rewards instead of advantages (the fused core), per group.
//
// Sequence ratios read their completion twice (its mean first), token ratios once. Per-block sums
// go to memory and the last block to end adds them in a fixed order: the same bits in every run.
#include "device.h"

#include "credit.h"
#include "tokens.h"

namespace reasonrl {
namespace {

constexpr int64_t CHUNK = 4096;
constexpr int AHEAD = 4;  // tokens of a thread whose bytes are under way at once

bool ignores_completions(const Loss& loss, int per_completion, int credited) {
    return loss.ratio == TOKEN && !per_completion && !credited;
}

// Where the tokens come from: a stretch of memory, or completion j walked with its credit.
struct Stretch {
    int64_t start, end, j;
    const CreditTask* credit;
    Affine* totals;
};

template <typename Visit>
__device__ void each_token(const PolicyTask& task, const Stretch& s, Visit visit) {
    if (s.credit) {
        walk<1>(*s.credit, task.mask, s.j, s.start, s.end, s.totals,
                [&](int64_t i, float advantage) { visit(i, load(task, i, &advantage)); });
        return;
    }
    for (int64_t first = s.start + threadIdx.x; first < s.end; first += AHEAD * THREADS) {
        bool on[AHEAD];
        Raw raw[AHEAD];
        UNROLLED
        for (int n = 0; n < AHEAD; n++) on[n] = is_on(task, first + n * THREADS, s.end);
        UNROLLED
        for (int n = 0; n < AHEAD; n++) raw[n] = read(task, first + n * THREADS, on[n], nullptr);
        UNROLLED
        for (int n = 0; n < AHEAD; n++) {
            const int64_t i = first + n * THREADS;
            if (i < s.end) visit(i, token_of(raw[n]));
        }
    }
}

// A completion's own numbers: mean d; gmpo: v = -exp(mean l) mean(A) mean(w), d(sum over
// tokens)/dl_t.
struct Whole {
    float d, v, share;
};

__device__ Whole look_ahead(const Loss& loss, const PolicyTask& task, const Stretch& s,
                            double count, double* slots) {
    double x[5] = {};
    each_token(task, s, [&](int64_t, const Token& t) {
        x[0] += t.d;
        x[1] += gmpo_term(loss, t.d, t.advantage).loss;
        x[2] += t.advantage;
        x[3] += t.weight;
        x[4] += t.good ? 1.0 : 0.0;
    });
    block_sums<5>(x, slots);
    const float l = (float)(x[1] / count), capped = clamp_to(l, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const double v = -(double)exp_of(capped) * (x[2] / count) * (x[3] / count);
    Whole whole;
    whole.d = (float)(x[0] / count);
    whole.v = (float)v;
    whole.share = capped == l ? (float)(v * x[4] / count) : 0.0f;
    return whole;
}

__device__ Term<float> term_of(const Loss& loss, const Whole& whole, const Token& t) {
    const float d = loss.ratio == TOKEN ? t.d : whole.d;
    if (loss.surrogate != GMPO) {
        Term<float> term = surrogate_term(loss, loss.surrogate, d, t.logp, t.advantage);
        term.loss *= t.weight;
        term.grad *= t.weight;
        return term;
    }
    Term<float> term = gmpo_term(loss, t.d, t.advantage);
    term.grad *= whole.share;
    term.loss = whole.v;
    term.ratio = exp_of(clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT));
    return term;
}

__device__ double unmasked(const PolicyTask& task, const Stretch& s, double* slots) {
    if (task.mask == nullptr) return (double)(s.end - s.start);
    double n[1] = {};
    for (int64_t i = s.start + threadIdx.x; i < s.end; i += THREADS) {
        n[0] += task.mask[i] != 0 ? 1.0 : 0.0;
    }
    block_sums<1>(n, slots);
    return n[0];
}

// What a token's loss is multiplied with, and its entropy.
struct Scale {
    double loss, entropy;

    __device__ Scale(const Loss& l, const PolicyTask& task, double count) {
        const double divisor = task.divisors ? task.divisors[0] : task.divisor;
        const double apart = task.divisors ? task.divisors[1] : task.entropy_divisor;
        loss = 1.0 / (task.per_completion ? divisor * count : divisor);
        entropy = -l.entropy_coef * (apart != 0.0 ? 1.0 / apart : loss);
    }
};

// The block's sums x, in the order of Sum, join those that it has in memory.
__device__ void note(const PolicyTask& task, const double* x) {
    if (threadIdx.x != 0) return;
    double* sums = task.sums + blockIdx.x * SUM_COUNT;
    for (int k = 0; k < SUM_COUNT; k++) sums[k] = fold(sums[k], x[k], k == SUM_RATIO_MAX);
}

// Loss and gradients of one completion; its sums are added to this block's in memory.
__device__ void stretch(const Loss& loss, const PolicyTask& task, const Stretch& s, double* slots) {
    const double length = unmasked(task, s, slots), count = length > 0.0 ? length : 1.0;
    const Scale scale(loss, task, count);
    const float eta = (float)scale.entropy;
    const bool shared = loss.ratio == SEQUENCE && loss.surrogate == CLIP;
    Whole whole = {};
    if (loss.ratio != TOKEN) whole = look_ahead(loss, task, s, count, slots);

    Tally<double> all = {};
    each_token(task, s, [&](int64_t i, const Token& t) {
        all.tokens += t.on;
        all.lost += t.on && !t.good;
        float c = 0.0f, slope;
        if (t.good) {
            const Term<float> term = term_of(loss, whole, t);
            const float k = kl_term(loss.kl_coef != 0.0f ? loss.kl : (int)K3, t.r, &slope);
            c = ((shared ? 0.0f : term.grad) + loss.kl_coef * slope) * (float)scale.loss;
            all.add(t, term, loss.kl_coef * k, k, !shared && (c != 0.0f || eta != 0.0f));
        }
        task.grad_logp[i] = c;
        if (task.grad_entropy) task.grad_entropy[i] = t.good ? eta : 0.0f;
    });
    const double total = all.policy * scale.loss + eta * all.entropy;
    // in the order of Sum; the last one is the gradient that a completion shares evenly
    double x[SUM_COUNT + 1] = {
        total,   (double)all.low,    (double)all.high, (double)all.cut,    all.kl,  all.ratio,
        all.top, (double)all.tokens, (double)all.lost, (double)all.active, all.even};
    block_sums<SUM_COUNT + 1>(x, slots, 1u << SUM_RATIO_MAX);
    if (shared) {
        const float part = (float)(x[SUM_COUNT] / count * scale.loss);
        double moved[1] = {};
        each_token(task, s, [&](int64_t i, const Token& t) {
            if (!t.good) return;
            const float c = task.grad_logp[i] + part;
            task.grad_logp[i] = c;
            moved[0] += c != 0.0f || eta != 0.0f ? 1.0 : 0.0;
        });
        block_sums<1>(moved, slots);
        x[SUM_ACTIVE] = moved[0];
    }
    note(task, x);
}

__device__ void begin(const PolicyTask& task) {
    if (threadIdx.x != 0) return;
    for (int k = 0; k < SUM_COUNT; k++) task.sums[blockIdx.x * SUM_COUNT + k] = 0.0;
}

// The last block adds all blocks' sums and writes loss and metrics.
__device__ void finish(const PolicyTask& task, double* slots) {
    if (!comes_last(task.arrived)) return;
    double x[SUM_COUNT] = {};
    for (int64_t i = threadIdx.x; i < gridDim.x; i += THREADS) {
        for (int k = 0; k < SUM_COUNT; k++) {
            x[k] = fold(x[k], task.sums[i * SUM_COUNT + k], k == SUM_RATIO_MAX);
        }
    }
    block_sums<SUM_COUNT>(x, slots, 1u << SUM_RATIO_MAX);
    if (threadIdx.x != 0) return;
    const double n = x[SUM_TOKENS] > 0.0 ? x[SUM_TOKENS] : 1.0;
    const double metrics[10] = {x[SUM_LOW] / n,   x[SUM_HIGH] / n, (x[SUM_LOW] + x[SUM_HIGH]) / n,
                                x[SUM_CUT] / n,   x[SUM_KL] / n,   x[SUM_RATIO] / n,
                                x[SUM_RATIO_MAX], x[SUM_TOKENS],   x[SUM_NONFINITE],
                                x[SUM_ACTIVE] / n};
    *task.loss = (float)x[SUM_LOSS];
    for (int k = 0; k < 10; k++) task.metrics[k] = (float)metrics[k];
}

// Token ratios, where no completion matters: a block has a chunk of the memory. The surrogate is
// known when this is compiled, and a thread reads AHEAD tokens before it works on them.
template <int SURROGATE>
__global__ void __launch_bounds__(THREADS, 3) chunk_kernel(Loss loss, PolicyTask task) {
    SHARED(double, slots, WARPS* SUM_COUNT);
    const int64_t start = blockIdx.x * CHUNK;
    const int64_t end = start + CHUNK < task.tokens ? start + CHUNK : task.tokens;
    begin(task);
    const Scale scale(loss, task, 1.0);
    const float share = (float)scale.loss, eta = (float)scale.entropy;
    const int kl = loss.kl_coef != 0.0f ? loss.kl : (int)K3;
    Tally<double> all = {};
    for (int64_t first = start + threadIdx.x; first < end; first += AHEAD * THREADS) {
        bool on[AHEAD];
        Raw raw[AHEAD];
        UNROLLED
        for (int n = 0; n < AHEAD; n++) on[n] = is_on(task, first + n * THREADS, end);
        UNROLLED
        for (int n = 0; n < AHEAD; n++) raw[n] = read(task, first + n * THREADS, on[n], nullptr);
        Tally<float> few = {};
        UNROLLED
        for (int n = 0; n < AHEAD; n++) {
            const int64_t i = first + n * THREADS;
            if (i >= end) break;
            const Token t = token_of(raw[n]);
            few.tokens += t.on;
            few.lost += t.on && !t.good;
            float c = 0.0f, k = 0.0f, slope = 0.0f;
            if (t.good) {
                Term<float> term = surrogate_term(loss, SURROGATE, t.d, t.logp, t.advantage);
                term.loss *= t.weight;
                term.grad *= t.weight;
                if (task.ref_logp) k = kl_term(kl, t.r, &slope);
                c = (term.grad + loss.kl_coef * slope) * share;
                few.add(t, term, loss.kl_coef * k, k, c != 0.0f || eta != 0.0f);
            }
            task.grad_logp[i] = c;
            if (task.grad_entropy) task.grad_entropy[i] = t.good ? eta : 0.0f;
        }
        gather(&all, few);
    }
    const double total = all.policy * scale.loss + eta * all.entropy;
    double x[SUM_COUNT] = {
        total,     (double)all.low, (double)all.high,   (double)all.cut,  all.kl,
        all.ratio, all.top,         (double)all.tokens, (double)all.lost, (double)all.active};
    block_sums<SUM_COUNT>(x, slots, 1u << SUM_RATIO_MAX);
    note(task, x);
    finish(task, slots);
}

__global__ void completion_kernel(Loss loss, PolicyTask task) {
    SHARED(double, slots, WARPS*(SUM_COUNT + 1));
    const int64_t b = blockIdx.x;
    begin(task);
    stretch(loss, task, {task.cu[b], task.cu[b + 1], b, nullptr, nullptr}, slots);
    finish(task, slots);
}

// two blocks a processor: the registers of one would leave half of its threads idle
__global__ void __launch_bounds__(THREADS, 2)
    core_kernel(Loss loss, PolicyTask task, CreditTask credit) {
    SHARED(double, slots, WARPS*(SUM_COUNT + 1));
    SHARED(Affine, totals, WARPS);
    const int64_t b = blockIdx.x;
    begin(task);
    if (leads(credit, b, slots)) {
        measure(credit, task.cu, task.mask, task.batch, b, slots);
        for (int64_t j = b; j < task.batch; j = next_member(credit, task.batch, b, j, slots)) {
            stretch(loss, task, {task.cu[j], task.cu[j + 1], j, &credit, totals}, slots);
        }
    }
    finish(task, slots);
}

__global__ void credit_kernel(CreditTask credit, const int64_t* cu, const uint8_t* mask,
                              int64_t batch, float* out) {
    SHARED(double, slots, WARPS * 4);
    SHARED(Affine, totals, WARPS);
    const int64_t b = blockIdx.x;
    if (!leads(credit, b, slots)) return;
    measure(credit, cu, mask, batch, b, slots);
    for (int64_t j = b; j < batch; j = next_member(credit, batch, b, j, slots)) {
        walk<4>(credit, mask, j, cu[j], cu[j + 1], totals,
                [&](int64_t i, float advantage) { out[i] = advantage; });
    }
}

}  // namespace
}  // namespace reasonrl

using namespace reasonrl;

int64_t reasonrl_policy_items(const Loss* loss, int64_t tokens, int64_t batch, int per_completion,
                              int credited) {
    const bool plain = ignores_completions(*loss, per_completion, credited);
    return plain ? (tokens + CHUNK - 1) / CHUNK : batch;
}

int reasonrl_policy(const Loss* loss, const PolicyTask* task, void* stream) {
    const int64_t items =
        reasonrl_policy_items(loss, task->tokens, task->batch, task->per_completion, 0);
    if (!ignores_completions(*loss, task->per_completion, 0)) {
        return launch(items, stream, completion_kernel, *loss, *task);
    }
    const auto run = loss->surrogate == CISPO       ? chunk_kernel<CISPO>
                     : loss->surrogate == SAPO      ? chunk_kernel<SAPO>
                     : loss->surrogate == REINFORCE ? chunk_kernel<REINFORCE>
                                                    : chunk_kernel<CLIP>;
    return launch(items, stream, run, *loss, *task);
}

int reasonrl_core(const Loss* loss, const PolicyTask* task, const CreditTask* credit,
                  void* stream) {
    return launch(task->batch, stream, core_kernel, *loss, *task, *credit);
}

int reasonrl_credit_advantage(const CreditTask* credit, const int64_t* cu, const uint8_t* mask,
                              int64_t batch, float* out, void* stream) {
    return launch(batch, stream, credit_kernel, *credit, cu, mask, batch, out);
}
