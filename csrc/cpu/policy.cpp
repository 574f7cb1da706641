// The policy loss: per-token terms, KL, entropy, reduction and metrics, with dL/dlogp and
// dL/dentropy. Advantages are read, or made from rewards a block at a time (credit.h).
//
// Token ratios: one pass over blocks of 256 tokens. Sequence ratios: one completion at a time, its
// mean log-ratio first. Sums are double, in an order fixed by the sizes alone.
#include "credit.h"
#include "vector.h"

namespace reasonrl {
namespace ISA {
namespace {

constexpr int SPAN = 256;  // tokens of a block: all its arrays stay in the nearest cache

// One block with absent inputs filled in, so that the loops below have no branches.
struct Span {
    const float *logp, *old_logp, *advantage, *ref_logp, *entropy, *weight;
    const int32_t* on;  // all bits where unmasked
    float *grad_logp, *grad_entropy;
    int n;
};

struct Filler {
    float zero[SPAN], one[SPAN];
    int32_t all[SPAN];
    Filler() {
        for (int j = 0; j < SPAN; j++) zero[j] = 0.0f, one[j] = 1.0f, all[j] = -1;
    }
};

// `on` is written where there is a mask.
Span span_of(const PolicyInput& in, const PolicyOutput& out, const Filler& fill, int64_t at, int n,
             int32_t* on) {
    Span s;
    s.logp = in.logp + at;
    s.old_logp = in.old_logp ? in.old_logp + at : s.logp;
    s.advantage = in.advantage ? in.advantage + at : nullptr;  // else made by `each_block`
    s.ref_logp = in.ref_logp ? in.ref_logp + at : s.logp;
    s.entropy = in.entropy ? in.entropy + at : fill.zero;
    s.weight = in.weight ? in.weight + at : fill.one;
    s.on = in.mask ? on : fill.all;
    for (int j = 0; in.mask && j < n; j++) on[j] = in.mask[at + j] ? -1 : 0;
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
    int32_t on[SPAN];
    if (!in.credit) {
        for (int64_t k = 0; k < blocks; k++) {
            const int64_t at = item.start + k * SPAN, left = item.end - at;
            visit(span_of(in, out, fill, at, (int)(left < SPAN ? left : SPAN), on));
        }
        return;
    }
    float advantage[SPAN];
    CreditWalk walk(*in.credit, item.completion);
    for (int64_t k = blocks - 1; k >= 0; k--) {
        const int64_t at = item.start + k * SPAN, left = item.end - at;
        Span s = span_of(in, out, fill, at, (int)(left < SPAN ? left : SPAN), on);
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

// ratio of the token; of the completion; its value, with the token's gradient
enum Mode { OWN, SHARED, HELD };

// The inputs of LANES tokens; those of an unusable one are 0. `on`: unmasked; `good`: and finite.
// EXTRA: weights or entropies are given.
struct Tokens {
    VecI on, good;
    Vec logp, d, advantage, r, weight, entropy;
};

template <bool EXTRA>
INLINE Tokens tokens_at(const Span& s, int j) {
    const Vec x = load(s.logp + j), o = load(s.old_logp + j), a = load(s.advantage + j);
    const Vec f = load(s.ref_logp + j);
    const Vec w = EXTRA ? load(s.weight + j) : all_of<Vec>(1.0f);
    const Vec h = EXTRA ? load(s.entropy + j) : Vec{};
    Vec probe = (0.0f * x + 0.0f * o) + (0.0f * a + 0.0f * f);
    if (EXTRA) probe += 0.0f * w + 0.0f * h;
    Tokens t;
    t.on = load_bits(s.on + j);
    t.good = t.on & (probe == 0.0f);  // inf and NaN times 0 are NaN
    t.logp = where(t.good, x), t.d = where(t.good, x - o), t.r = where(t.good, f - x);
    t.advantage = where(t.good, a), t.weight = where(t.good, w), t.entropy = where(t.good, h);
    return t;
}

// Calls visit(span, j) for every LANES tokens of a block; the last, if fewer, in masked arrays.
template <typename Visit>
INLINE void each_vector(const Span& span, Visit visit) {
    const Span s = span;
    int j = 0;
    for (; j + LANES <= s.n; j += LANES) visit(s, j);
    if (j == s.n) return;
    float in[6][LANES] = {}, out[2][LANES] = {};
    int32_t on[LANES] = {};
    const float* from[6] = {s.logp, s.old_logp, s.advantage, s.ref_logp, s.entropy, s.weight};
    const int left = s.n - j;
    for (int k = 0; k < 6; k++) memcpy(in[k], from[k] + j, left * sizeof(float));
    memcpy(on, s.on + j, left * sizeof(int32_t));
    memcpy(out[0], s.grad_logp + j, left * sizeof(float));
    if (s.grad_entropy) memcpy(out[1], s.grad_entropy + j, left * sizeof(float));
    const Span tail = {
        in[0], in[1], in[2], in[3], in[4], in[5], on, out[0], s.grad_entropy ? out[1] : nullptr,
        left};
    visit(tail, 0);
    memcpy(s.grad_logp + j, out[0], left * sizeof(float));
    if (s.grad_entropy) memcpy(s.grad_entropy + j, out[1], left * sizeof(float));
}

// Sums over an item, lane by lane. In a block those that cannot cancel are float (counts are
// exact), blocks add up in double.
struct Sums {
    VecD policy, kl, ratio, entropy, moved, tokens, usable, low, high, cut, active;
    Vec top;
};

// Terms of one block. SHARED leaves the policy part of the gradient to the completion: its sum is
// `moved`.
template <int SURROGATE, int MODE, int KL, bool EXTRA>
void block(const Loss& numbers, const Span& span, const Whole& whole, Sums& sums) {
    const Loss loss = numbers;
    const float scale = (float)whole.scale, coef = loss.kl_coef, share = whole.share;
    const float eta = -loss.entropy_coef * (float)whole.entropy_scale;
    const Vec held = all_of<Vec>(whole.d), one = all_of<Vec>(1.0f), v = all_of<Vec>(whole.v);
    const Vec rho = exp_of(clamp_to(held, -EXPONENT_LIMIT, EXPONENT_LIMIT));
    Vec ratio = {}, entropy = {}, top = sums.top;
    VecD policy = {}, kl = {}, moved = {};  // of both signs: they cancel
    Vec low = {}, high = {}, cut = {};
    VecI tokens = {}, usable = {}, active = {};  // minus their counts
    each_vector(span, [&](const Span& s, int j) INLINE_BODY {
        const Tokens t = tokens_at<EXTRA>(s, j);
        Term<Vec> term;
        if (SURROGATE == GMPO) {
            term = gmpo_term(loss, t.d, t.advantage);
            term.grad = where(t.good, term.grad * share);
            term.loss = where(t.good, v);
            term.ratio = rho;
        } else {
            term = surrogate_term(loss, SURROGATE, MODE == OWN ? t.d : held, t.logp, t.advantage);
            if (EXTRA) term.loss = t.weight * term.loss, term.grad = t.weight * term.grad;
        }
        Vec k = {}, slope = {};
        if (KL >= 0) k = kl_term(KL, t.r, &slope);
        const Vec own = SURROGATE != GMPO && MODE == SHARED ? Vec{} : term.grad;
        const Vec c = (own + coef * where(t.good, slope)) * scale;
        const Vec seen = where(t.good, term.ratio);
        store(s.grad_logp + j, c);
        if (EXTRA && s.grad_entropy) store(s.grad_entropy + j, where(t.good, eta * one));
        policy += __builtin_convertvector(term.loss, VecD);
        if (KL >= 0) kl += __builtin_convertvector(k, VecD);
        ratio += seen;
        if (EXTRA) entropy += t.entropy;
        top = max_of(seen, top);
        low += term.low, high += term.high, cut += term.cut;
        tokens += t.on, usable += t.good;
        active += eta != 0.0f ? t.good : (VecI)(c != 0.0f);
        if (MODE == SHARED) moved += __builtin_convertvector(term.grad, VecD);
    });
    const auto wide = [](auto x) { return __builtin_convertvector(x, VecD); };
    sums.policy += policy, sums.kl += kl, sums.ratio += wide(ratio);
    sums.entropy += wide(entropy), sums.moved += moved, sums.top = top;
    sums.low += wide(low), sums.high += wide(high), sums.cut += wide(cut);
    sums.tokens -= wide(tokens), sums.usable -= wide(usable), sums.active -= wide(active);
}

// An item's sums, whatever its lanes.
void close(const Loss& loss, const Whole& whole, const Sums& s, double* out) {
    const double policy = sum_of(s.policy) + loss.kl_coef * sum_of(s.kl);
    out[SUM_LOSS] =
        policy * whole.scale - loss.entropy_coef * sum_of(s.entropy) * whole.entropy_scale;
    out[SUM_LOW] = sum_of(s.low), out[SUM_HIGH] = sum_of(s.high), out[SUM_CUT] = sum_of(s.cut);
    out[SUM_KL] = sum_of(s.kl), out[SUM_RATIO] = sum_of(s.ratio);
    out[SUM_TOKENS] = sum_of(s.tokens), out[SUM_ACTIVE] = sum_of(s.active);
    out[SUM_NONFINITE] = out[SUM_TOKENS] - sum_of(s.usable);
    out[SUM_RATIO_MAX] = 0.0;
    for (int k = 0; k < LANES; k++) {
        if (s.top[k] > out[SUM_RATIO_MAX]) out[SUM_RATIO_MAX] = s.top[k];
    }
}

// Means over the unmasked tokens of a completion: d, and for gmpo l, A and w.
template <bool EXTRA>
void look_ahead(const Loss& numbers, const PolicyInput& in, const PolicyOutput& out,
                const Filler& fill, const Item& item, double count, Whole* whole) {
    const Loss loss = numbers;
    VecD d = {}, l = {}, a = {}, w = {}, used = {};
    each_block(in, out, fill, item, [&](const Span& span) {
        each_vector(span, [&](const Span& s, int j) INLINE_BODY {
            const Tokens t = tokens_at<EXTRA>(s, j);
            d += __builtin_convertvector(t.d, VecD);
            l += __builtin_convertvector(gmpo_term(loss, t.d, t.advantage).loss, VecD);
            a += __builtin_convertvector(t.advantage, VecD);
            w += __builtin_convertvector(t.weight, VecD);
            used -= __builtin_convertvector(t.good, VecD);
        });
    });
    whole->d = (float)(sum_of(d) / count);
    const float mean = (float)(sum_of(l) / count);
    const float x = clamp_to(mean, -EXPONENT_LIMIT, EXPONENT_LIMIT);
    const double v = -(double)exp_of(x) * (sum_of(a) / count) * (sum_of(w) / count);
    whole->v = (float)v;
    whole->share = x == mean ? (float)(v * sum_of(used) / count) : 0.0f;
}

template <int SURROGATE, int MODE, int KL, bool EXTRA>
void completion(const Loss& loss, const PolicyInput& in, const PolicyOutput& out,
                const Filler& fill, const Item& item, Whole whole, double count, double* result) {
    if (MODE != OWN) look_ahead<EXTRA>(loss, in, out, fill, item, count, &whole);
    Sums sums = {};
    each_block(in, out, fill, item,
               [&](const Span& s) { block<SURROGATE, MODE, KL, EXTRA>(loss, s, whole, sums); });
    close(loss, whole, sums, result);
    if (SURROGATE == GMPO || MODE != SHARED) return;
    const float part = (float)(sum_of(sums.moved) / count * whole.scale);
    const bool always = loss.entropy_coef * whole.entropy_scale != 0.0;
    VecD active = {};
    each_block(in, out, fill, item, [&](const Span& span) {
        each_vector(span, [&](const Span& s, int j) INLINE_BODY {
            const VecI good = tokens_at<EXTRA>(s, j).good;
            const Vec c = where(good, load(s.grad_logp + j) + part);
            store(s.grad_logp + j, c);
            active -= __builtin_convertvector(always ? good : (VecI)(c != 0.0f), VecD);
        });
    });
    result[SUM_ACTIVE] = sum_of(active);
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

template <int SURROGATE, int MODE, int KL, bool EXTRA>
void run_all(const Loss& loss, const PolicyInput& in, const PolicyOutput& out, int threads) {
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
        completion<SURROGATE, MODE, KL, EXTRA>(loss, in, out, fill, item, whole,
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

template <int SURROGATE, int MODE, bool EXTRA>
void run_kl(const Loss& loss, const PolicyInput& in, const PolicyOutput& out, int threads) {
    const int kl = loss.kl_coef != 0.0f ? loss.kl : (int)K3;  // k3 where it is only shown
    if (!in.ref_logp) return run_all<SURROGATE, MODE, -1, EXTRA>(loss, in, out, threads);
    if (kl == K1) return run_all<SURROGATE, MODE, K1, EXTRA>(loss, in, out, threads);
    if (kl == K2) return run_all<SURROGATE, MODE, K2, EXTRA>(loss, in, out, threads);
    run_all<SURROGATE, MODE, K3, EXTRA>(loss, in, out, threads);
}

template <int SURROGATE, int MODE>
void run(const Loss& loss, const PolicyInput& in, const PolicyOutput& out, int threads) {
    const bool extra = in.weight || in.entropy || out.grad_entropy;
    extra ? run_kl<SURROGATE, MODE, true>(loss, in, out, threads)
          : run_kl<SURROGATE, MODE, false>(loss, in, out, threads);
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
