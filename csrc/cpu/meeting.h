// Where the threads of one parallel region wait for each other, often and not for long.
#pragma once

#include <sched.h>

#include <atomic>

namespace reasonrl {
namespace {

class Meeting {
  public:
    // Returns once `team` threads are here. Spins; gives the core up where another needs it.
    void wait(int team) {
        const int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int turn = 0; round_.load(std::memory_order_acquire) == round; turn++) {
            if (turn < PATIENCE) {
#ifdef __SSE2__
                __builtin_ia32_pause();
#endif
            } else {
                sched_yield();
            }
        }
    }

  private:
    static constexpr int PATIENCE = 1 << 12;
    std::atomic<int> arrived_{0}, round_{0};
};

}  // namespace
}  // namespace reasonrl
