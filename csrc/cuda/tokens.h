// A token of the policy loss as it is read, and what is added up over tokens.
#pragma once

#include "device.h"
#include "launch.h"

namespace reasonrl {
namespace {

struct Token {
    bool on, good;
    float logp, d, advantage, r, weight, entropy;
};

// A token as it lies in memory; reads alone, so that those of several tokens are under way at once.
struct Raw {
    bool on;
    float logp, old, advantage, ref, weight, entropy;
};

__device__ bool is_on(const PolicyTask& task, int64_t i, int64_t end) {
    return i < end && (task.mask == nullptr || task.mask[i] != 0);
}

__device__ Raw read(const PolicyTask& task, int64_t i, bool on, const float* made) {
    const auto at = [&](const float* x, float absent) { return x && on ? x[i] : absent; };
    Raw raw;
    raw.on = on;
    raw.logp = at(task.logp, 0.0f);
    raw.old = at(task.old_logp, raw.logp);
    raw.advantage = made ? *made : at(task.advantage, 0.0f);
    raw.ref = at(task.ref_logp, raw.logp);
    raw.weight = at(task.weight, 1.0f);
    raw.entropy = at(task.entropy, 0.0f);
    return raw;
}

// Masked and non-finite tokens hold zeros: selected away, never multiplied.
__device__ Token token_of(const Raw& x) {
    Token t = {};
    t.on = x.on;
    t.good = x.on && is_finite(x.logp) && is_finite(x.old) && is_finite(x.advantage) &&
             is_finite(x.ref) && is_finite(x.weight) && is_finite(x.entropy);
    if (!t.good) return t;
    t.logp = x.logp;
    t.d = x.logp - x.old;
    t.advantage = x.advantage;
    t.r = x.ref - x.logp;
    t.weight = x.weight;
    t.entropy = x.entropy;
    return t;
}

// `made`: an advantage that does not lie in memory.
__device__ Token load(const PolicyTask& task, int64_t i, const float* made) {
    return token_of(read(task, i, is_on(task, i, task.tokens), made));
}

// What a thread adds up; in fp32 over a few tokens, in float64 over all of them.
template <class Real>
struct Tally {
    Real policy, entropy, kl, ratio, even;
    float top;
    unsigned tokens, lost, low, high, cut, active;

    __device__ void add(const Token& t, const Term<float>& term, float kl_loss, float k,
                        bool acts) {
        policy += term.loss + kl_loss;
        entropy += t.entropy;
        kl += k;
        ratio += term.ratio;
        even += term.grad;
        top = max_of(top, term.ratio);
        low += term.low != 0.0f;
        high += term.high != 0.0f;
        cut += term.cut != 0.0f;
        active += acts;
    }
};

__device__ void gather(Tally<double>* all, const Tally<float>& few) {
    all->policy += few.policy;
    all->entropy += few.entropy;
    all->kl += few.kl;
    all->ratio += few.ratio;
    all->top = max_of(all->top, few.top);
    all->tokens += few.tokens;
    all->lost += few.lost;
    all->low += few.low;
    all->high += few.high;
    all->cut += few.cut;
    all->active += few.active;
}

}  // namespace
}  // namespace reasonrl
