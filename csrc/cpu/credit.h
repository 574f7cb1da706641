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
        } else {
            in.mask ? steps<true>(at, n, out) : steps<false>(at, n, out);
        }
    }

  private:
    void tokens(int64_t at, int64_t n, float* out) {
        const Worth worth = {own.scale, own.shift, own.outcome};
        const uint8_t* mask = in.mask ? in.mask + at : nullptr;
        carry = scan<-1>(in.token_reward + at, mask, n - 1, n, in.gamma, worth, carry, out);
    }

    template <bool MASKED>
    void steps(int64_t at, int64_t n, float* out) {
        const double outcome = own.outcome, gamma = in.gamma;
        const bool returned = in.pay == PAY_RETURN;
        for (int64_t j = n - 1; j >= 0; j--) {
            const int64_t step = in.step[at + j];
            const bool on = !MASKED || in.mask[at + j];
            double worth = 0.0;
            if (step >= 0 && (step != following || !returned)) worth = value[step];
            following = step;
            if (on) carry = worth + (returned ? gamma * carry : 0.0);
            out[j] = on ? (float)(carry + outcome) : 0.0f;
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
