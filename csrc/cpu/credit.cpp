// Rewards measured against their group, and the advantages that follow; the fused core.
//
// Steps: (r - mean) / (std + eps), r - mean or r minus the mean of the others, over the group's
// scored steps. Tokens: PRIME (arXiv 2502.01456, eq. 5, 7, 8); the group's mean token rewards are
// the baselines. Both are then scale * r + shift. Sums are double, in an order fixed by the sizes.
#include <math.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"
#include "groups.h"

namespace reasonrl {
namespace {

struct Prepared {
    std::vector<Relative> relative;
    std::vector<double> value;
};

// What takes a reward to its place in its group: scale * x + shift.
struct Against {
    double scale = 0.0, shift = 0.0;
};

// PRIME's part of one group: x against the others' means. Parts with nothing to compare are 0.
void prime_group(const std::vector<double>& x, const int64_t* member, int64_t n,
                 const CreditInput& in, bool tokens, Against* out) {
    double sum = 0.0, square = 0.0;
    bool equal = true;
    for (int64_t k = 0; k < n; k++) {
        sum += x[member[k]];
        equal = equal && x[member[k]] == x[member[0]];
    }
    const double mean = sum / (double)n, others = std::max((double)n - 1.0, 1.0);
    for (int64_t k = 0; k < n; k++) square += (x[member[k]] - mean) * (x[member[k]] - mean);
    const double spread = sqrt(square / std::max((double)n - in.ddof, 1.0));
    for (int64_t k = 0; k < n; k++) {
        const double own = x[member[k]];
        Against& a = out[member[k]];
        a = {0.0, 0.0};
        if (in.kind == PRIME_REINFORCE) a = {1.0, 0.0};
        if (in.kind == PRIME_RLOO && n > 1) a = {1.0, -(sum - own) / others};
        if (in.kind == PRIME_GRPO && n > 1 && !equal) a = {1.0 / spread, -mean / spread};
        if (tokens && in.verl_baseline && n > 1) {
            a.scale += 1.0 / others;
            a.shift -= own / others;
        }
    }
}

// The known completions of each group, one group behind the other.
struct Groups {
    std::vector<int64_t> member, first;  // first: where a group begins in member, and the end

    explicit Groups(const CreditInput& in) {
        each_group(in.group, in.scored, in.batch, [&](const int64_t* own, int64_t n) {
            first.push_back((int64_t)member.size());
            member.insert(member.end(), own, own + n);
        });
        first.push_back((int64_t)member.size());
    }
};

// Of every completion what its group makes of it; with `advantage` also its tokens' advantages, a
// group at a time, so that its rewards are read from memory once. Unknown ones get 0.
void relate_tokens(const CreditInput& in, int threads, Prepared& out, float* advantage) {
    const Groups groups(in);
    const int64_t count = (int64_t)groups.first.size() - 1;
    const int inside = count >= 2 * threads ? 1 : threads;  // few groups: their own completions
    std::vector<double> process(in.batch, 0.0), outcome(in.batch, 0.0);
    std::vector<Against> part(in.batch), whole(in.batch);
    const Credit credit = {&in, out.relative.data(), nullptr};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (inside == 1)
    for (int64_t g = 0; g < count; g++) {
        const int64_t* member = groups.member.data() + groups.first[g];
        const int64_t n = groups.first[g + 1] - groups.first[g];
#pragma omp parallel for num_threads(inside) schedule(dynamic, 1) if (inside > 1)
        for (int64_t k = 0; k < n; k++) {
            const int64_t b = member[k], at = in.cu[b];
            const uint8_t* mask = in.mask ? in.mask + at : nullptr;
            process[b] = ops().token_mean(in.token_reward + at, mask, in.cu[b + 1] - at);
            outcome[b] = in.outcome[b];
        }
        prime_group(process, member, n, in, true, part.data());
        prime_group(outcome, member, n, in, false, whole.data());
        for (int64_t k = 0; k < n; k++) {
            const int64_t b = member[k];
            Relative& r = out.relative[b];
            r.outcome = in.outcome_weight * (whole[b].scale * outcome[b] + whole[b].shift);
            r.scale = in.process_weight * part[b].scale;
            r.shift = in.process_weight * part[b].shift;
        }
        if (advantage) ops().walk_credit(credit, member, n, advantage, inside);
    }
    for (int64_t b = 0; b < in.batch && advantage; b++) {
        if (!out.relative[b].known) ops().walk_credit(credit, &b, 1, advantage, 1);
    }
}

// Which steps are compared with which: the group's number, or one for each place in it.
std::vector<int64_t> peers(const CreditInput& in) {
    std::vector<int64_t> id(in.batch), order(in.batch), out(in.steps);
    for (int64_t b = 0; b < in.batch; b++) order[b] = b;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return in.group[a] < in.group[b]; });
    int64_t groups = 0, places = 1;
    for (int64_t k = 0; k < in.batch; k++) {
        if (k > 0 && in.group[order[k]] != in.group[order[k - 1]]) groups++;
        id[order[k]] = groups;
        places = std::max(places, in.step_cu[k + 1] - in.step_cu[k]);
    }
    for (int64_t b = 0; b < in.batch; b++) {
        for (int64_t s = in.step_cu[b]; s < in.step_cu[b + 1]; s++) {
            out[s] = in.by_place ? id[b] * places + (s - in.step_cu[b]) : id[b];
        }
    }
    return out;
}

void prepare_steps(const CreditInput& in, Prepared& out) {
    std::vector<float> outcome(in.batch), worth(in.steps);
    group_advantage(in.outcome, in.group, in.scored, in.batch, in.kind, in.ddof, in.eps,
                    outcome.data());
    const std::vector<int64_t> peer = peers(in);
    group_advantage(in.step_reward, peer.data(), in.step_scored, in.steps, in.kind, in.ddof, in.eps,
                    worth.data());
    out.value.resize(in.steps);
    for (int64_t b = 0; b < in.batch; b++) {
        const int64_t first = in.step_cu[b], last = in.step_cu[b + 1];
        const double share = in.divide && last > first ? (double)(last - first) : 1.0;
        for (int64_t s = first; s < last; s++) out.value[s] = in.process_weight * worth[s] / share;
        out.relative[b] = {in.outcome_weight * outcome[b], 0.0, 0.0, true};
    }
}

// The first token whose step is not of its completion, or begins a second run of a step; -1.
int64_t first_bad(const CreditInput& in, int threads) {
    std::vector<uint8_t> seen(in.steps, 0);
    std::vector<int64_t> bad(in.batch, -1);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < in.batch; b++) {
        int64_t before = -1;
        for (int64_t i = in.cu[b]; i < in.cu[b + 1]; i++) {
            const int64_t step = in.step[i];
            if (step == before) continue;
            before = step;
            if (step == -1) continue;
            if (step < in.step_cu[b] || step >= in.step_cu[b + 1] || seen[step]) {
                bad[b] = i;
                break;
            }
            seen[step] = 1;
        }
    }
    for (const int64_t i : bad) {
        if (i >= 0) return i;
    }
    return -1;
}

void check_steps(const CreditInput& in, int threads) {
    const int64_t at = first_bad(in, threads);
    if (at < 0) return;
    const int64_t b = std::upper_bound(in.cu, in.cu + in.batch + 1, at) - in.cu - 1;
    const int64_t step = in.step[at], first = in.step_cu[b], last = in.step_cu[b + 1];
    if (step < first || step >= last) {
        throw std::invalid_argument("step must lie in [" + std::to_string(first) + ", " +
                                    std::to_string(last) + "), the steps of completion " +
                                    std::to_string(b) + ", got " + std::to_string(step) + " at " +
                                    std::to_string(at));
    }
    throw std::invalid_argument("step must be one run of neighbouring tokens each, got " +
                                std::to_string(step) + " again at " + std::to_string(at));
}

Prepared prepare(const CreditInput& in, int threads, float* advantage) {
    if (!in.token_reward) check_steps(in, threads);
    Prepared out;
    out.relative.resize(in.batch);
    for (int64_t b = 0; b < in.batch; b++) {
        out.relative[b] = {0.0, 0.0, 0.0, !in.scored || in.scored[b] != 0};
    }
    if (in.token_reward) {
        relate_tokens(in, threads, out, advantage);
    } else {
        prepare_steps(in, out);
    }
    return out;
}

}  // namespace

void credit_advantage(const CreditInput& in, float* out, int threads) {
    const Prepared ready = prepare(in, threads, out);
    if (in.token_reward) return;  // written on the way
    const Credit credit = {&in, ready.relative.data(), ready.value.data()};
    std::vector<int64_t> every(in.batch);
    for (int64_t b = 0; b < in.batch; b++) every[b] = b;
    ops().walk_credit(credit, every.data(), in.batch, out, threads);
}

void credit_loss(const Loss& loss, PolicyInput policy, const CreditInput& in,
                 const PolicyOutput& out, int threads) {
    const Prepared ready = prepare(in, threads, nullptr);
    const Credit credit = {&in, ready.relative.data(), ready.value.data()};
    policy.credit = &credit;
    ops().policy_loss(loss, policy, out, threads);
}

}  // namespace reasonrl
