// What one thread of a parallel region does of an op: those that a whole decoder does in turn.
#pragma once

#include <omp.h>

#include "../ops.h"

namespace reasonrl {

// Items begin .. end of `count`, as even as they divide.
struct Share {
    int64_t begin, end;
};

inline Share share_of(int64_t count, int64_t thread, int64_t team) {
    return {count * thread / team, count * (thread + 1) / team};
}

inline Share share_of(int64_t count) {
    return share_of(count, omp_get_thread_num(), omp_get_num_threads());
}

namespace ISA {

void draw_share(const DrawTask&, int64_t begin, int64_t end);

}  // namespace ISA
}  // namespace reasonrl
