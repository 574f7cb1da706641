// What the race detector asks the runtime: which thread is running, and since which barriers.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace simt {

struct Who {
    bool running;  // false in host code: launchers are instrumented too
    unsigned block, thread, block_epoch, warp_epoch;
    uintptr_t stack_low, stack_high;
};

Who who();

// implemented by race.cpp where it is linked
__attribute__((weak)) void races_begin();
__attribute__((weak)) void races_forget(const void* start, size_t bytes);
__attribute__((weak)) const char* races_report();

}  // namespace simt
