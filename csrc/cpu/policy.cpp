// The policy loss: per-token terms, KL, entropy, reduction and metrics, with dL/dlogp and dL/dentropy.
//
// Token ratios: one pass over blocks of 1024 tokens. Sequence ratios: one completion at a time, its mean
// log-ratio first. Sums are double, in an order fixed by the sizes alone.
#include "block.h"

namespace reasonrl {
namespace ISA {
namespace {

// One block with absent inputs filled in, so that the loops below have no branches.
struct Span {
    const float *logp, *old_logp, *advantage, *ref_logp, *entropy, *weight;
    const uint8_t* mask;
    float *grad_logp, *grad_entropy;
    int n;
};

struct Filler {
    float zero[BLOCK], one[BLOCK];
    uint8_t all[BLOCK];
    Filler() {
        for (int j = 0; j < BLOCK; j++) zero[j] = 0.0f, one[j] = 1.0f, all[j] = 1;
    }
};

Span span_of(const PolicyInput& in, const PolicyOutput& out, const Filler& fill, int64_t at, int n) {
    Span s;
    s.logp = in.logp + at;
    s.old_logp = in.old_logp ? in.old_logp + at : s.logp;
    s.advantage = in.advantage + at;
    s.ref_logp = in.ref_logp ? in.ref_logp + at : s.logp;
    s.entropy = in.entropy ? in.entropy + at : fill.zero;
    s.weight = in.weight ? in.weight + at : fill.one;
    s.mask = in.mask ? in.mask + at : fill.all;
    s.grad_logp = out.grad_logp + at;
    s.grad_entropy = out.grad_entropy ? out.grad_entropy + at : nullptr;
    s.n = n;
    return s;
}

inline bool usable(const Span& s, int j) {
    return (s.mask[j] != 0) & is_finite(s.logp[j]) & is_finite(s.old_logp[j]) &
           is_finite(s.advantage[j]) & is_finite(s.ref_logp[j]) & is_finite(s.entropy[j]) &
           is_finite(s.weight[j]);
}

// What a completion knows of itself before its tokens are visited.
struct Whole {
    double scale, entropy_scale;
    float d;         // mean log-ratio (sequence ratios)
    float v, share;  // gmpo: -exp(mean l) mean(A) mean(w), and d(sum over tokens) / dl_t
};

enum Mode { OWN, SHARED, HELD };  // ratio of the token; of the completion; its value, token's gradient

// Terms of one block. SHARED leaves the policy part of the gradient to `share_out`; returns its sum.
template <int SURROGATE, int MODE>
double block(const Loss& loss, const Span& s, const Whole& whole, double* sums) {
    double policy = 0, bonus = 0, kl = 0, ratio = 0, shared = 0;
    float low = 0, high = 0, cut = 0, top = 0, tokens = 0, bad = 0, active = 0;  // exact counts
    const float scale = (float)whole.scale, entropy_scale = (float)whole.entropy_scale;
    const float eta = -loss.entropy_coef * entropy_scale;
    const int kind = loss.kl_coef != 0.0f ? loss.kl : (int)K3;
#pragma omp simd reduction(+ : policy, bonus, kl, ratio, shared) reduction(max : top) \
    reduction(+ : low, high, cut, tokens, bad, active)
    for (int j = 0; j < s.n; j++) {
        const bool on = s.mask[j] != 0, good = usable(s, j);
        const float logp = good ? s.logp[j] : 0.0f, old = good ? s.old_logp[j] : 0.0f;
        const float advantage = good ? s.advantage[j] : 0.0f, ref = good ? s.ref_logp[j] : 0.0f;
        const float weight = good ? s.weight[j] : 0.0f, entropy = good ? s.entropy[j] : 0.0f;
        const float d = MODE == OWN ? logp - old : whole.d;
        Term t;
        if (SURROGATE == GMPO) {
            t = gmpo_term(loss, logp - old, advantage);
            t.grad = t.grad * whole.share;
            t.loss = whole.v;
            t.ratio = exp_of(clamp_to(d, -EXPONENT_LIMIT, EXPONENT_LIMIT));
        } else {
            t = surrogate_term(loss, SURROGATE, d, logp, advantage);
            t.loss = weight * t.loss;
            t.grad = weight * t.grad;
        }
        float slope;
        const float k = kl_term(kind, ref - logp, &slope);
        const float own = (SURROGATE != GMPO && MODE == SHARED) ? 0.0f : t.grad;
        const float pull = loss.kl_coef != 0.0f ? loss.kl_coef * slope : 0.0f;
        const float c = good ? (own + pull) * scale : 0.0f;
        s.grad_logp[j] = c;
        policy += good ? t.loss + loss.kl_coef * k : 0.0f;
        shared += good ? t.grad : 0.0f;
        bonus += entropy;
        kl += k;
        ratio += good ? t.ratio : 0.0f;
        top = good & (t.ratio > top) ? t.ratio : top;
        low += good & t.low ? 1.0f : 0.0f;
        high += good & t.high ? 1.0f : 0.0f;
        cut += good & t.cut ? 1.0f : 0.0f;
        tokens += on ? 1.0f : 0.0f;
        bad += on & !good ? 1.0f : 0.0f;
        active += good & ((c != 0.0f) | (eta != 0.0f)) ? 1.0f : 0.0f;
    }
    if (s.grad_entropy) {
        for (int j = 0; j < s.n; j++) s.grad_entropy[j] = usable(s, j) ? eta : 0.0f;
    }
    sums[SUM_LOSS] += policy * whole.scale - loss.entropy_coef * bonus * whole.entropy_scale;
    sums[SUM_LOW] += low, sums[SUM_HIGH] += high, sums[SUM_CUT] += cut;
    sums[SUM_KL] += kl, sums[SUM_RATIO] += ratio, sums[SUM_TOKENS] += tokens;
    sums[SUM_NONFINITE] += bad;
    if (SURROGATE == GMPO || MODE != SHARED) sums[SUM_ACTIVE] += active;
    if (top > sums[SUM_RATIO_MAX]) sums[SUM_RATIO_MAX] = top;
    return shared;
}

// Means over the unmasked tokens of completion [start, end): d, and for gmpo l, A and w.
void look_ahead(const Loss& loss, const PolicyInput& in, const PolicyOutput& out,
                const Filler& fill, int64_t start, int64_t end, double count, Whole* whole) {
    double d_sum = 0, l_sum = 0, a_sum = 0, w_sum = 0, used = 0;
    for (int64_t at = start; at < end; at += BLOCK) {
        const Span s = span_of(in, out, fill, at, (int)(end - at < BLOCK ? end - at : BLOCK));
        double d = 0, l = 0, a = 0, w = 0, n = 0;
#pragma omp simd reduction(+ : d, l, a, w, n)
        for (int j = 0; j < s.n; j++) {
            const bool good = usable(s, j);
            const float step = good ? s.logp[j] - s.old_logp[j] : 0.0f;
            const float advantage = good ? s.advantage[j] : 0.0f;
            d += step;
            l += gmpo_term(loss, step, advantage).loss;
            a += advantage;
            w += good ? s.weight[j] : 0.0f;
            n += good ? 1.0 : 0.0;
        }
        d_sum += d, l_sum += l, a_sum += a, w_sum += w, used += n;
    }
    whole->d = (float)(d_sum / count);
    const float l = (float)(l_sum / count), x = clamp_to(l, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const double v = -(double)exp_of(x) * (a_sum / count) * (w_sum / count);
    whole->v = (float)v;
    whole->share = x == l ? (float)(v * used / count) : 0.0f;
}

template <int SURROGATE, int MODE>
void completion(const Loss& loss, const PolicyInput& in, const PolicyOutput& out,
                const Filler& fill, int64_t start, int64_t end, Whole whole, double count,
                double* sums) {
    if (MODE != OWN) look_ahead(loss, in, out, fill, start, end, count, &whole);
    double shared = 0;
    for (int64_t at = start; at < end; at += BLOCK) {
        const Span s = span_of(in, out, fill, at, (int)(end - at < BLOCK ? end - at : BLOCK));
        shared += block<SURROGATE, MODE>(loss, s, whole, sums);
    }
    if (SURROGATE == GMPO || MODE != SHARED) return;
    const float part = (float)(shared / count * whole.scale);
    const bool bonus = loss.entropy_coef * whole.entropy_scale != 0.0;
    for (int64_t at = start; at < end; at += BLOCK) {
        const Span s = span_of(in, out, fill, at, (int)(end - at < BLOCK ? end - at : BLOCK));
        float active = 0;
#pragma omp simd reduction(+ : active)
        for (int j = 0; j < s.n; j++) {
            const bool good = usable(s, j);
            const float c = good ? s.grad_logp[j] + part : 0.0f;
            s.grad_logp[j] = c;
            active += good & (bonus | (c != 0.0f)) ? 1.0f : 0.0f;
        }
        sums[SUM_ACTIVE] += active;
    }
}

// One item of work: a completion (sequence ratios) or a block of one.
struct Item {
    int64_t start, end, completion;
};

int64_t list_items(const PolicyInput& in, bool whole, bool plain, Item* items) {
    int64_t n = 0;
    const int64_t batch = plain ? 1 : in.batch;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t start = plain ? 0 : in.cu[b], end = plain ? in.tokens : in.cu[b + 1];
        const int64_t size = whole ? end - start : 4 * BLOCK;
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
    const bool plain = MODE == OWN && !in.per_completion;
    const int64_t n = list_items(in, MODE != OWN, plain, nullptr);
    Item* items = new Item[n + 1];
    double* sums = new double[(n + 1) * SUM_COUNT]();
    list_items(in, MODE != OWN, plain, items);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < n; i++) {
        const Item& item = items[i];
        const double count = in.counts && !plain ? (double)in.counts[item.completion] : 1.0;
        Whole whole = {};
        whole.scale = 1.0 / (in.per_completion ? in.divisor * count : in.divisor);
        whole.entropy_scale = in.entropy_divisor != 0.0 ? 1.0 / in.entropy_divisor : whole.scale;
        if (count == 0.0) whole.scale = whole.entropy_scale = 0.0;
        completion<SURROGATE, MODE>(loss, in, out, fill, item.start, item.end, whole,
                                    count > 0.0 ? count : 1.0, sums + i * SUM_COUNT);
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
