// Completions of one prompt: who belongs together, and what is computed of them.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace reasonrl {

struct TrustInput {
    const float *outcome, *thinking;  // (B)
    const int64_t* group;             // (B)
    const uint8_t* known;             // (B) whose thinking is known, or null: all
    int64_t batch;
    double weight;    // alpha * exp(-step / T)
    float threshold;  // of a right outcome
    bool trust, score_wrong, keep_degenerate;
    int kind;
    double ddof, eps;
};

// one(member, n) for every group, its members in their own order; only those with `scored`.
template <class One>
void each_group(const int64_t* group, const uint8_t* scored, int64_t batch, const One& one) {
    std::vector<int64_t> member;
    member.reserve(batch);
    for (int64_t b = 0; b < batch; b++) {
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
        one(member.data() + at, end - at);
    }
}

bool use_isa(const char* name);  // false where this CPU cannot run it; for tests

// Members of one group, those that are scored: their rewards relative to it.
void normalise(const float* reward, const int64_t* member, int64_t n, int kind, double ddof,
               double eps, float* out);
void trust(const TrustInput&, float* advantage, float* reward, float* gamma);

}  // namespace reasonrl
