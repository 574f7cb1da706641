// Returns of token rewards, and a credit's advantages written out; one result for any number of
// threads. Group statistics come from credit.cpp.
#include "credit.h"
#include "scan.h"

namespace reasonrl {
namespace ISA {

void returns(const float* reward, const int64_t* cu, const uint8_t* mask, int64_t batch,
             double gamma, bool forward, float* out, int threads) {
    const Worth plain = {1.0, 0.0, 0.0};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t b = 0; b < batch; b++) {
        const int64_t n = cu[b + 1] - cu[b];
        if (forward) {
            scan<1>(reward, mask, cu[b], n, gamma, plain, 0.0, out);
        } else {
            scan<-1>(reward, mask, cu[b + 1] - 1, n, gamma, plain, 0.0, out);
        }
    }
}

// Of the `count` completions that are named, the last one first: its rewards were read last.
void walk_credit(const Credit& credit, const int64_t* which, int64_t count, float* out,
                 int threads) {
    const CreditInput& in = *credit.in;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (int64_t k = count - 1; k >= 0; k--) {
        const int64_t b = which[k];
        CreditWalk(credit, b).back(in.cu[b], in.cu[b + 1] - in.cu[b], out + in.cu[b]);
    }
}

namespace {

template <bool MASKED>
double mean_of(const float* x, const uint8_t* mask, int64_t n) {
    constexpr int CHAINS = 4;  // sums side by side, to hide the time that one addition takes
    Wide part[CHAINS] = {};
    WideI counts = {};  // minus them
    int64_t i = 0;
    for (; i + CHAINS * WIDE <= n; i += CHAINS * WIDE) {
        for (int k = 0; k < CHAINS; k++) {
            const Wide value = load_wide(x + i + k * WIDE);
            if (MASKED) {
                const WideI on = load_wide_mask(mask + i + k * WIDE);
                part[k] += (Wide)((WideI)value & on);
                counts += on;
            } else {
                part[k] += value;
            }
        }
    }
    const Wide all = (part[0] + part[1]) + (part[2] + part[3]);
    double sum = 0.0;
    int64_t count = MASKED ? 0 : i;
    for (int k = 0; k < WIDE; k++) sum += all[k], count -= counts[k];
    for (; i < n; i++) {
        if (MASKED && !mask[i]) continue;
        sum += x[i];
        count++;
    }
    return count > 0 ? sum / (double)count : 0.0;
}

}  // namespace

// Mean of the unmasked of n token rewards; 0 without any.
double token_mean(const float* x, const uint8_t* mask, int64_t n) {
    return mask ? mean_of<true>(x, mask, n) : mean_of<false>(x, mask, n);
}

}  // namespace ISA
}  // namespace reasonrl
