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

void walk_credit(const Credit& credit, float* out, int threads) {
    const CreditInput& in = *credit.in;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t b = 0; b < in.batch; b++) {
        CreditWalk(credit, b).back(in.cu[b], in.cu[b + 1] - in.cu[b], out + in.cu[b]);
    }
}

// Mean of the unmasked of n token rewards; 0 without any.
double token_mean(const float* x, const uint8_t* mask, int64_t n) {
    double sum = 0.0, count = 0.0;
#pragma omp simd reduction(+ : sum, count)
    for (int64_t i = 0; i < n; i++) {
        const bool on = !mask || mask[i];
        sum += on ? (double)x[i] : 0.0;
        count += on ? 1.0 : 0.0;
    }
    return count > 0.0 ? sum / count : 0.0;
}

}  // namespace ISA
}  // namespace reasonrl
