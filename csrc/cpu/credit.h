// The advantages of one completion from its last token to its first, a block at a time.
#pragma once

#include "../ops.h"
#include "scan.h"

namespace reasonrl {
namespace {

class CreditWalk {
  public:
    CreditWalk(const Credit& credit, int64_t completion)
        : in(*credit.in), own(credit.relative[completion]), value(credit.value) {}

    // advantages of the tokens [at, at + n); blocks come from the end of the completion
    void back(int64_t at, int64_t n, float* out) {
        if (!own.known) {
            memset(out, 0, n * sizeof(float));
        } else if (in.token_reward) {
            tokens(at, n, out);
        } else if (in.pay == PAY_RETURN) {
            steps_returned(at, n, out);
        } else {
            for (int64_t j = 0; j < n; j++) {
                const int64_t step = in.step[at + j];
                const bool on = !in.mask || in.mask[at + j];
                out[j] = on ? (float)((step >= 0 ? value[step] : 0.0) + own.outcome) : 0.0f;
            }
        }
    }

  private:
    void tokens(int64_t at, int64_t n, float* out) {
        const Worth worth = {own.scale, own.shift, own.outcome};
        const uint8_t* mask = in.mask ? in.mask + at : nullptr;
        carry = scan<-1>(in.token_reward + at, mask, n - 1, n, in.gamma, worth, carry, out);
    }

    // a step's reward lies at its last token, and is lost where that is masked
    void steps_returned(int64_t at, int64_t n, float* out) {
        constexpr int64_t BLOCK = 256;
        const Worth as_it_is = {1.0, 0.0, own.outcome};
        double reward[BLOCK];
        for (int64_t stop = n; stop > 0; stop -= BLOCK) {
            const int64_t start = stop > BLOCK ? stop - BLOCK : 0, size = stop - start;
            const int64_t* step = in.step + at + start;
            for (int64_t j = size - 1; j >= 0; j--) {
                reward[j] = 0.0;
                if (step[j] == following) continue;
                following = step[j];
                if (following >= 0) reward[j] = value[following];
            }
            const uint8_t* mask = in.mask ? in.mask + at + start : nullptr;
            carry = scan<-1>(reward, mask, size - 1, size, in.gamma, as_it_is, carry, out + start);
        }
    }

    const CreditInput& in;
    const Relative own;
    const double* value;
    double carry = 0.0;
    int64_t following = -1;
};

}  // namespace
}  // namespace reasonrl
