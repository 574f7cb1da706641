// The policy loss: per-token terms, KL, entropy, reduction and metrics, with dL/dlogp and
// dL/dentropy. Advantages are read, or made from rewards a block at a time (credit.h).
//
// Token ratios: one pass over blocks of 256 tokens. Sequence ratios: one completion at a time, its
// mean log-ratio first. Sums are double, in an order fixed by the sizes alone.
#include "block.h"
#include "credit.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int SPAN = 256;  // tokens of a block: all its arrays stay in the nearest cache

// One block with absent inputs filled in, so that the loops below have no branches.
struct Span {
    const float *logp, *old_logp, *advantage, *ref_logp, *entropy, *weight;
    const uint8_t* mask;
    float *grad_logp, *grad_entropy;
    int n;
};

struct Filler {
    float zero[SPAN], one[SPAN];
    uint8_t all[SPAN];
    Filler() {
        for (int j = 0; j < SPAN; j++) zero[j] = 0.0f, one[j] = 1.0f, all[j] = 1;
    }
};

Span span_of(const PolicyInput& in, const PolicyOutput& out, const Filler& fill, int64_t at,
             int n) {
    Span s;
    s.logp = in.logp + at;
    s.old_logp = in.old_logp ? in.old_logp + at : s.logp;
    s.advantage = in.advantage ? in.advantage + at : nullptr;  // else made by `each_block`
    s.ref_logp = in.ref_logp ? in.ref_logp + at : s.logp;
    s.entropy = in.entropy ? in.entropy + at : fill.zero;
    s.weight = in.weight ? in.weight + at : fill.one;
    s.mask = in.mask ? in.mask + at : fill.all;
    s.grad_logp = out.grad_logp + at;
    s.grad_entropy = out.grad_entropy ? out.grad_entropy + at : nullptr;
    s.n = n;
    return s;
}

// One item of work: a completion (sequence ratios, credit) or a block of one.
struct Item {
    int64_t start, end, completion;
};

// Visits the item's blocks in a fixed order: forward, or from the end where rewards become returns.
template <typename Visit>
void each_block(const PolicyInput& in, const PolicyOutput& out, const Filler& fill,
                const Item& item, Visit visit) {
    const int64_t blocks = (item.end - item.start + SPAN - 1) / SPAN;
    if (!in.credit) {
        for (int64_t k = 0; k < blocks; k++) {
            const int64_t at = item.start + k * SPAN, left = item.end - at;
            visit(span_of(in, out, fill, at, (int)(left < SPAN ? left : SPAN)));
        }
        return;
    }
    float advantage[SPAN];
    CreditWalk walk(*in.credit, item.completion);
    for (int64_t k = blocks - 1; k >= 0; k--) {
        const int64_t at = item.start + k * SPAN, left = item.end - at;
        Span s = span_of(in, out, fill, at, (int)(left < SPAN ? left : SPAN));
        walk.back(at, s.n, advantage);
        s.advantage = advantage;
        visit(s);
    }
}

// What a completion knows of itself before its tokens are visited.
struct Whole {
    double scale, entropy_scale;
    float d;         // mean log-ratio (sequence ratios)
    float v, share;  // gmpo: -exp(mean l) mean(A) mean(w), and d(sum over tokens) / dl_t
};

enum Mode {
    OWN,
    SHARED,
    HELD
};  // ratio of the token; of the completion; its value, token's gradient

// The inputs of one block with unusable tokens set to 0; arrays, so that every loop vectorises.
struct Clean {
    int good[SPAN];
    float logp[SPAN], d[SPAN], advantage[SPAN], r[SPAN], weight[SPAN];
};

void clean(const Span& s, Clean& c, double* sums) {
    const float* __restrict logp = s.logp, * __restrict old = s.old_logp;
    const float* __restrict advantage = s.advantage, * __restrict ref = s.ref_logp;
    const float* __restrict entropy = s.entropy, * __restrict weight = s.weight;
    const uint8_t* __restrict mask = s.mask;
    int tokens = 0, kept = 0;
    for (int j = 0; j < s.n; j++) c.good[j] = mask[j] != 0;
#pragma omp simd reduction(+ : tokens, kept)
    for (int j = 0; j < s.n; j++) {
        const float x = logp[j], o = old[j], a = advantage[j], f = ref[j], w = weight[j];
        const bool good = (c.good[j] != 0) & is_finite(x) & is_finite(o) & is_finite(a) &
                          is_finite(f) & is_finite(w) & is_finite(entropy[j]);
        tokens += c.good[j];
        kept += good ? 1 : 0;
        c.good[j] = good ? 1 : 0;
        c.logp[j] = good ? x : 0.0f;
        c.d[j] = good ? x - o : 0.0f;
        c.advantage[j] = good ? a : 0.0f;
        c.r[j] = good ? f - x : 0.0f;
        c.weight[j] = good ? w : 0.0f;
    }
    sums[SUM_TOKENS] += tokens;
    sums[SUM_NONFINITE] += tokens - kept;
}

// What the tokens of one block come to, side by side: sums are taken afterwards, since a loop with
// many sums in double at once runs out of registers.
struct Terms {
    float loss[SPAN], grad[SPAN], ratio[SPAN], k[SPAN], low[SPAN], high[SPAN], cut[SPAN];
};

double total(const float* x, int n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; j++) sum += x[j];
    return sum;
}

// KL of each token, and what it adds to the gradient, which starts as the policy's part.
template <int KL>
void add_kl(const Loss& loss, const Clean& x, int n, Terms& t, float* __restrict grad) {
    const float coef = loss.kl_coef;
#pragma omp simd
    for (int j = 0; j < n; j++) {
        float slope;
        t.k[j] = kl_term(KL, x.r[j], &slope);
        grad[j] += coef * (x.good[j] ? slope : 0.0f);
    }
}

// Terms of one block. SHARED leaves the policy part of the gradient to the completion: its sum
// returns.
template <int SURROGATE, int MODE>
double block(const Loss& numbers, const Span& s, const Whole& whole, double* sums) {
    const Loss loss = numbers;
    const int n = s.n;
    Clean x;
    Terms t;
    clean(s, x, sums);
    const float scale = (float)whole.scale, mean_d = whole.d, v = whole.v, share = whole.share;
    float* __restrict grad = s.grad_logp;
    const float rho = exp_of(clamp_to(mean_d, -EXPONENT_LIMIT, EXPONENT_LIMIT));
    // an array even where d is one number: an invariant in the loop would stop the vectoriser
    for (int j = 0; j < n && SURROGATE != GMPO && MODE != OWN; j++) x.d[j] = mean_d;
#pragma omp simd
    for (int j = 0; j < n; j++) {
        const float good = x.good[j] ? 1.0f : 0.0f;
        Term one;
        if (SURROGATE == GMPO) {
            one = gmpo_term(loss, x.d[j], x.advantage[j]);
            one.grad = one.grad * share;
            one.loss = good * v;
            one.ratio = rho;
        } else {
            one = surrogate_term(loss, SURROGATE, x.d[j], x.logp[j], x.advantage[j]);
            one.loss = x.weight[j] * one.loss;
            one.grad = x.weight[j] * one.grad;
        }
        t.loss[j] = one.loss;
        t.grad[j] = one.grad;
        t.ratio[j] = good * one.ratio;
        t.low[j] = one.low, t.high[j] = one.high, t.cut[j] = one.cut;
        grad[j] = (SURROGATE != GMPO && MODE == SHARED) ? 0.0f : good * one.grad;
    }
    double kl = 0;
    if (s.ref_logp != s.logp) {
        const int kind = loss.kl_coef != 0.0f ? loss.kl : (int)K3;
        if (kind == K1) add_kl<K1>(loss, x, n, t, grad);
        if (kind == K2) add_kl<K2>(loss, x, n, t, grad);
        if (kind == K3) add_kl<K3>(loss, x, n, t, grad);
        kl = total(t.k, n);
    }
    const float eta = -loss.entropy_coef * (float)whole.entropy_scale;
    const float always = eta != 0.0f ? 1.0f : 0.0f;
    float top = 0, active = 0, low = 0, high = 0, cut = 0;  // counts, exact
#pragma omp simd reduction(max : top) reduction(+ : active, low, high, cut)
    for (int j = 0; j < n; j++) {
        const float c = grad[j] * scale;
        grad[j] = c;
        top = t.ratio[j] > top ? t.ratio[j] : top;
        active += x.good[j] ? (c != 0.0f ? 1.0f : always) : 0.0f;
        low += t.low[j], high += t.high[j], cut += t.cut[j];
    }
    double bonus = 0;
    if (s.grad_entropy) {
        for (int j = 0; j < n; j++) bonus += x.good[j] ? s.entropy[j] : 0.0f;
        for (int j = 0; j < n; j++) s.grad_entropy[j] = x.good[j] ? eta : 0.0f;
    }
    const double policy = total(t.loss, n) + loss.kl_coef * kl;
    sums[SUM_LOSS] += policy * whole.scale - loss.entropy_coef * bonus * whole.entropy_scale;
    sums[SUM_LOW] += low, sums[SUM_HIGH] += high, sums[SUM_CUT] += cut;
    sums[SUM_KL] += kl, sums[SUM_RATIO] += total(t.ratio, n);
    if (SURROGATE == GMPO || MODE != SHARED) sums[SUM_ACTIVE] += active;
    if (top > sums[SUM_RATIO_MAX]) sums[SUM_RATIO_MAX] = top;
    return MODE == SHARED ? total(t.grad, n) : 0.0;
}

// Means over the unmasked tokens of a completion: d, and for gmpo l, A and w.
void look_ahead(const Loss& loss, const PolicyInput& in, const PolicyOutput& out,
                const Filler& fill, const Item& item, double count, Whole* whole) {
    double d_sum = 0, l_sum = 0, a_sum = 0, w_sum = 0, used = 0;
    each_block(in, out, fill, item, [&](const Span& s) {
        double d = 0, l = 0, a = 0, w = 0, n = 0, ignored[SUM_COUNT] = {};
        Clean x;
        clean(s, x, ignored);
        const Loss numbers = loss;
#pragma omp simd reduction(+ : d, l, a, w, n)
        for (int j = 0; j < s.n; j++) {
            d += x.d[j];
            l += gmpo_term(numbers, x.d[j], x.advantage[j]).loss;
            a += x.advantage[j];
            w += x.weight[j];
            n += x.good[j];
        }
        d_sum += d, l_sum += l, a_sum += a, w_sum += w, used += n;
    });
    whole->d = (float)(d_sum / count);
    const float l = (float)(l_sum / count), x = clamp_to(l, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const double v = -(double)exp_of(x) * (a_sum / count) * (w_sum / count);
    whole->v = (float)v;
    whole->share = x == l ? (float)(v * used / count) : 0.0f;
}

template <int SURROGATE, int MODE>
void completion(const Loss& loss, const PolicyInput& in, const PolicyOutput& out,
                const Filler& fill, const Item& item, Whole whole, double count, double* sums) {
    if (MODE != OWN) look_ahead(loss, in, out, fill, item, count, &whole);
    double shared = 0;
    each_block(in, out, fill, item,
               [&](const Span& s) { shared += block<SURROGATE, MODE>(loss, s, whole, sums); });
    if (SURROGATE == GMPO || MODE != SHARED) return;
    const float part = (float)(shared / count * whole.scale);
    const float always = loss.entropy_coef * whole.entropy_scale != 0.0 ? 1.0f : 0.0f;
    each_block(in, out, fill, item, [&](const Span& s) {
        double ignored[SUM_COUNT] = {};
        Clean x;
        clean(s, x, ignored);
        float active = 0;
#pragma omp simd reduction(+ : active)
        for (int j = 0; j < s.n; j++) {
            const float good = x.good[j] ? 1.0f : 0.0f, c = good * (s.grad_logp[j] + part);
            s.grad_logp[j] = c;
            active += good * (c != 0.0f ? 1.0f : always);
        }
        sums[SUM_ACTIVE] += active;
    });
}

int64_t list_items(const PolicyInput& in, bool whole, bool plain, Item* items) {
    int64_t n = 0;
    const int64_t batch = plain ? 1 : in.batch;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t start = plain ? 0 : in.cu[b], end = plain ? in.tokens : in.cu[b + 1];
        const int64_t size = whole ? end - start : 16 * SPAN;
        for (int64_t at = start; at < end; at += size, n++) {
            if (items) items[n] = {at, at + size < end ? at + size : end, b};
        }
    }
    return n;
}

template <int SURROGATE, int MODE>
void run(const Loss& loss, const PolicyInput& in, const PolicyOutput& out, int threads) {
    const Filler fill;
    // a token ratio with one divisor for all tokens does not see completions at all
    const bool plain = MODE == OWN && !in.per_completion && !in.credit;
    const bool together = MODE != OWN || in.credit;
    const int64_t n = list_items(in, together, plain, nullptr);
    Item* items = new Item[n + 1];
    double* sums = new double[(n + 1) * SUM_COUNT]();
    list_items(in, together, plain, items);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < n; i++) {
        const Item& item = items[i];
        const double count = in.counts && !plain ? (double)in.counts[item.completion] : 1.0;
        Whole whole = {};
        whole.scale = 1.0 / (in.per_completion ? in.divisor * count : in.divisor);
        whole.entropy_scale = in.entropy_divisor != 0.0 ? 1.0 / in.entropy_divisor : whole.scale;
        if (count == 0.0) whole.scale = whole.entropy_scale = 0.0;
        completion<SURROGATE, MODE>(loss, in, out, fill, item, whole, count > 0.0 ? count : 1.0,
                                    sums + i * SUM_COUNT);
    }
    for (int64_t i = 0; i < n; i++) {
        const double* part = sums + i * SUM_COUNT;
        for (int k = 0; k < SUM_COUNT; k++) {
            if (k != SUM_RATIO_MAX) out.sums[k] += part[k];
        }
        if (part[SUM_RATIO_MAX] > out.sums[SUM_RATIO_MAX]) {
            out.sums[SUM_RATIO_MAX] = part[SUM_RATIO_MAX];
        }
    }
    delete[] sums;
    delete[] items;
}

}  // namespace

void policy_loss(const Loss& loss, const PolicyInput& in, const PolicyOutput& out, int threads) {
    const bool shared = loss.ratio == SEQUENCE, held = loss.ratio == SEQUENCE_TOKEN;
    if (loss.surrogate == GMPO) return run<GMPO, SHARED>(loss, in, out, threads);
    if (loss.surrogate == CISPO) return run<CISPO, OWN>(loss, in, out, threads);
    if (loss.surrogate == SAPO) return run<SAPO, OWN>(loss, in, out, threads);
    if (loss.surrogate == REINFORCE) return run<REINFORCE, OWN>(loss, in, out, threads);
    if (shared) return run<CLIP, SHARED>(loss, in, out, threads);
    if (held) return run<CLIP, HELD>(loss, in, out, threads);
    run<CLIP, OWN>(loss, in, out, threads);
}

}  // namespace ISA
}  // namespace reasonrl
