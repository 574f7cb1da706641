// SophiaVL-R1's combined reward and its advantage, a group at a time: the statistics, the trust
// weight, the reward and the normalised reward in one walk over the group's members.
#include <math.h>

#include <algorithm>
#include <vector>

#include "../ops.h"
#include "groups.h"

namespace reasonrl {

namespace {

struct Mean {
    double sum = 0.0;
    int64_t count = 0;
    void add(double x) { sum += x, count++; }
    double value() const { return count ? sum / (double)count : 0.0; }
};

// What a member's thinking counts as; false where nobody knows.
bool thought(const TrustInput& in, int64_t b, double* value) {
    const bool unasked = !in.score_wrong && in.outcome[b] < 0.2f;
    *value = unasked ? 0.0 : (double)in.thinking[b];
    return unasked || !in.known || in.known[b];
}

double trust_of(const TrustInput& in, const int64_t* member, int64_t n, Mean* every) {
    Mean right, wrong;
    for (int64_t k = 0; k < n; k++) {
        double value;
        if (!thought(in, member[k], &value)) continue;
        every->add(value);
        (in.outcome[member[k]] >= in.threshold ? right : wrong).add(value);
    }
    if (!in.trust || !right.count || !wrong.count) return 1.0;
    return exp(std::min(right.value() - wrong.value(), 0.0));
}

bool one_sided(const float* outcome, const int64_t* member, int64_t n) {
    bool right = true, wrong = true;
    for (int64_t k = 0; k < n; k++) {
        right = right && outcome[member[k]] >= 0.9f;
        wrong = wrong && outcome[member[k]] <= 0.1f;
    }
    return right || wrong;
}

}  // namespace

void trust(const TrustInput& in, float* advantage, float* reward, float* gamma) {
    each_group(in.group, nullptr, in.batch, [&](const int64_t* member, int64_t n) {
        Mean every;
        const float weight = (float)trust_of(in, member, n, &every);
        const bool silent = !in.keep_degenerate && one_sided(in.outcome, member, n);
        for (int64_t k = 0; k < n; k++) {
            const int64_t b = member[k];
            double value;
            if (!thought(in, b, &value)) value = every.value();
            gamma[b] = weight;
            reward[b] = (float)((double)in.outcome[b] +
                                (double)weight * in.weight * (silent ? 0.0 : value));
            advantage[b] = 0.0f;
        }
        normalise(reward, member, n, in.kind, in.ddof, in.eps, advantage);
    });
}

}  // namespace reasonrl
