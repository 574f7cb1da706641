// PRIME's advantage (arXiv 2502.01456, eq. 5, 7, 8) in one call, and whitening.
//
//   A_t = R_t + outcome part,  R_t the discounted return of (r_t - base) / scale over unmasked
//   tokens; base and scale come from the group's mean token rewards, the outcome part from its
//   outcomes.
// Sums are double, in an order fixed by the sizes alone.
#include <math.h>

#include <algorithm>
#include <vector>

#include "../ops.h"

namespace reasonrl {
namespace {

constexpr int64_t CHUNK = 4096;

// Sum of f(i) over [0, n), by chunks, for any number of threads.
template <typename F>
double chunked_sum(int64_t n, int threads, F f) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    std::vector<double> part(chunks, 0.0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        double total = 0.0;
        for (int64_t i = c * CHUNK; i < std::min(n, (c + 1) * CHUNK); i++) total += f(i);
        part[c] = total;
    }
    double total = 0.0;
    for (const double x : part) total += x;
    return total;
}

// Where a completion stands in its group: what is subtracted, what divides, whether it counts.
struct Relative {
    double base = 0.0, scale = 1.0;
    bool alive = false;
    double others = 1.0;
};

void relate(const std::vector<double>& x, const int64_t* member, int64_t n, int form, double ddof,
            std::vector<Relative>& out) {
    double sum = 0.0, square = 0.0;
    bool equal = true;
    for (int64_t k = 0; k < n; k++) {
        sum += x[member[k]];
        equal = equal && x[member[k]] == x[member[0]];
    }
    const double mean = sum / (double)n;
    for (int64_t k = 0; k < n; k++) square += (x[member[k]] - mean) * (x[member[k]] - mean);
    for (int64_t k = 0; k < n; k++) {
        Relative& r = out[member[k]];
        r.others = std::max((double)n - 1.0, 1.0);
        r.alive = form == PRIME_REINFORCE || (n > 1 && (form == PRIME_RLOO || !equal));
        if (form == PRIME_RLOO) r.base = (sum - x[member[k]]) / r.others;
        if (form == PRIME_GRPO) {
            r.base = mean;
            r.scale = sqrt(square / std::max((double)n - ddof, 1.0));
        }
    }
}

}  // namespace

void whiten(const float* value, const uint8_t* mask, int64_t n, double eps, float* out,
            int threads) {
    const auto on = [mask](int64_t i) { return !mask || mask[i]; };
    const double count = chunked_sum(n, threads, [&](int64_t i) { return on(i) ? 1.0 : 0.0; });
    const double sum =
        chunked_sum(n, threads, [&](int64_t i) { return on(i) ? (double)value[i] : 0.0; });
    const double mean = count > 0.0 ? sum / count : 0.0;
    const double square = chunked_sum(n, threads, [&](int64_t i) {
        const double x = on(i) ? value[i] - mean : 0.0;
        return x * x;
    });
    const double scale = 1.0 / sqrt(square / std::max(count - 1.0, 1.0) + eps);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const double x = on(i) ? value[i] - mean : 0.0;
        out[i] = x == 0.0 ? 0.0f : (float)(x * scale);
    }
}

void prime_advantage(const PrimeInput& in, float* out, int threads) {
    std::vector<double> process(in.batch, 0.0), outcome(in.batch, 0.0);
    std::vector<uint8_t> keep(in.tokens, 0);
    std::vector<int64_t> member;
    for (int64_t b = 0; b < in.batch; b++) {
        if (!in.scored || in.scored[b]) member.push_back(b);
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t k = 0; k < (int64_t)member.size(); k++) {
        const int64_t b = member[k];
        double sum = 0.0, count = 0.0;
        for (int64_t i = in.cu[b]; i < in.cu[b + 1]; i++) {
            keep[i] = !in.mask || in.mask[i];
            if (!keep[i]) continue;
            sum += in.reward[i];
            count += 1.0;
        }
        process[b] = sum / std::max(count, 1.0);
        outcome[b] = in.outcome[b];
    }
    std::vector<Relative> tokens(in.batch), whole(in.batch);
    std::stable_sort(member.begin(), member.end(),
                     [&](int64_t a, int64_t b) { return in.group[a] < in.group[b]; });
    const int64_t n = (int64_t)member.size();
    for (int64_t at = 0, end; at < n; at = end) {
        for (end = at + 1; end < n && in.group[member[end]] == in.group[member[at]]; end++) {
        }
        relate(process, member.data() + at, end - at, in.form, in.ddof, tokens);
        relate(outcome, member.data() + at, end - at, in.form, in.ddof, whole);
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t b = 0; b < in.batch; b++) {
        const Relative t = tokens[b], w = whole[b];
        const double last = w.alive ? (outcome[b] - w.base) / w.scale : 0.0;
        double carry = 0.0;
        for (int64_t i = in.cu[b + 1] - 1; i >= in.cu[b]; i--) {
            if (!keep[i]) {
                out[i] = 0.0f;
                continue;
            }
            double r = (in.reward[i] - t.base) / t.scale;
            if (in.verl_baseline) r += (in.reward[i] - process[b]) / t.others;
            carry = (t.alive ? r : 0.0) + in.gamma * carry;
            out[i] = (float)(carry + last);
        }
    }
    if (in.whiten) whiten(out, keep.data(), in.tokens, 1e-8, out, threads);
}

}  // namespace reasonrl
