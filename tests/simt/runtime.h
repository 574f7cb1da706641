// What the race detector asks the runtime: which thread is running, and since which barriers.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace simt {

struct Who {
    bool running;  // false in host code: launchers are instrumented too
    unsigned block, thread, block_epoch, warp_epoch;
    bool released;  // the block has told others, by a fence and an atomic, that it has written
    bool acquired;  // the block has taken notice, by an atomic and a fence, of those before it
    uintptr_t stack_low, stack_high;
};

Who who();
bool has_released(unsigned block);  // by its end

// implemented by race.cpp where it is linked
__attribute__((weak)) void races_begin();
__attribute__((weak)) void races_forget(const void* start, size_t bytes);
__attribute__((weak)) void races_atomic(void* place, size_t bytes);
__attribute__((weak)) const char* races_report();

}  // namespace simt
