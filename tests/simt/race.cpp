// A race detector without threads and without luck: our own callbacks behind -fsanitize=thread.
//
// The kernels are compiled with that flag and linked without libtsan. Every access carries its
// block, thread and barrier epochs; two accesses to a byte conflict when nothing orders them, on
// any schedule. Also counts the bytes that registered buffers see, to hold kernels to their traffic
// formula.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <set>
#include <string>
#include <unordered_map>

#include "runtime.h"

extern char threadIdx, blockIdx, blockDim, gridDim;  // the scheduler's own, 12 bytes each

namespace simt {
namespace {

struct Access {
    bool given = false, write = false, atomic = false;
    Who by;
    void* pc = nullptr;
};

struct Byte {
    Access write, reads[2];
};

struct Region {
    size_t size;
    uint64_t read, written;
};

std::unordered_map<uintptr_t, Byte> memory;
std::map<uintptr_t, Region> counted;
std::set<std::pair<void*, void*>> reported;
std::string report;

bool conflict(const Access& a, const Access& b) {
    if (!a.given || (a.atomic && b.atomic)) return false;
    // blocks run one after another here, a's first: it must have told, and b have listened
    if (a.by.block != b.by.block) {
        return a.by.released || !has_released(a.by.block) || !b.by.acquired;
    }
    if (a.by.thread == b.by.thread || a.by.block_epoch != b.by.block_epoch) return false;
    return a.by.thread / 32 != b.by.thread / 32 || a.by.warp_epoch == b.by.warp_epoch;
}

std::string place(void* pc) {
    Dl_info info = {};
    dladdr(pc, &info);
    char text[64];
    snprintf(text, sizeof text, "+0x%zx", (size_t)((char*)pc - (char*)info.dli_fbase));
    return text;
}

void complain(const Access& a, const Access& b) {
    if (!reported.insert({a.pc, b.pc}).second) return;
    report += "race: " + place(a.pc) + (a.write ? " writes, " : " reads, ") + place(b.pc) +
              (b.write ? " writes" : " reads") + ", threads " + std::to_string(a.by.thread) +
              " and " + std::to_string(b.by.thread) + ", blocks " + std::to_string(a.by.block) +
              " and " + std::to_string(b.by.block) + "\n";
}

bool own(uintptr_t p) {
    for (const char* x : {&threadIdx, &blockIdx, &blockDim, &gridDim}) {
        if (p - (uintptr_t)x < 12) return true;
    }
    return false;
}

void access(void* address, size_t size, bool write, void* pc, bool atomic = false) {
    Access now;
    now.by = who();
    now.atomic = atomic;
    const uintptr_t start = (uintptr_t)address;
    if (!now.by.running || own(start)) return;
    if (start >= now.by.stack_low && start < now.by.stack_high) return;
    now.given = true, now.write = write, now.pc = pc;
    auto region = counted.upper_bound(start);
    if (region != counted.begin()) {
        --region;
        if (start < region->first + region->second.size) {
            (write ? region->second.written : region->second.read) += size;
        }
    }
    for (uintptr_t p = start; p < start + size; p++) {
        Byte& byte = memory[p];
        if (conflict(byte.write, now)) complain(byte.write, now);
        if (write) {
            for (const Access& read : byte.reads) {
                if (conflict(read, now)) complain(read, now);
            }
            byte.write = now;
        } else if (!byte.reads[0].given || byte.reads[0].by.thread == now.by.thread) {
            byte.reads[0] = now;
        } else {
            byte.reads[1] = now;
        }
    }
}

}  // namespace

void races_begin() {
    memory.clear();
    reported.clear();
    report.clear();
}

void races_forget(const void* start, size_t bytes) {
    for (uintptr_t p = (uintptr_t)start; p < (uintptr_t)start + bytes; p++) memory.erase(p);
}

void races_atomic(void* place, size_t bytes) {
    access(place, bytes, true, __builtin_return_address(0), true);
}

const char* races_report() {
    return report.c_str();
}

}  // namespace simt

#define ACCESS(n)                                               \
    extern "C" void __tsan_read##n(void* p) {                   \
        simt::access(p, n, false, __builtin_return_address(0)); \
    }                                                           \
    extern "C" void __tsan_write##n(void* p) {                  \
        simt::access(p, n, true, __builtin_return_address(0));  \
    }                                                           \
    extern "C" void __tsan_unaligned_read##n(void* p) {         \
        simt::access(p, n, false, __builtin_return_address(0)); \
    }                                                           \
    extern "C" void __tsan_unaligned_write##n(void* p) {        \
        simt::access(p, n, true, __builtin_return_address(0));  \
    }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_read_range(void* p, size_t n) {
    simt::access(p, n, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t n) {
    simt::access(p, n, true, __builtin_return_address(0));
}

extern "C" void simt_count(void* start, size_t bytes) {
    simt::counted[(uintptr_t)start] = {bytes, 0, 0};
}

extern "C" void simt_counted(void* start, uint64_t* out) {
    out[0] = simt::counted[(uintptr_t)start].read;
    out[1] = simt::counted[(uintptr_t)start].written;
}

extern "C" void simt_count_nothing() {
    simt::counted.clear();
}
