// The scheduler: one fiber per CUDA thread, blocks one after another, a schedule chosen by the
// test.
//
// A thread runs until it waits at a barrier or a warp operation; which ready thread goes next is
// the schedule: first, last, or random by seed. Never compiled with a sanitizer itself.
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "simt.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" {
void simt_switch(void** save, void* next);
#ifdef SIMT_ASAN
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
#endif
}

#ifndef __x86_64__
#error "the SIMT shim switches stacks in x86-64 assembly"
#endif
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
)");

namespace simt {
namespace {

constexpr size_t STACK = 256 * 1024, PAGE = 4096, SHARED_LIMIT = 48 * 1024;
constexpr int FAILED = 719;  // cudaErrorLaunchFailure

struct Fiber {
    char* stack = nullptr;
    void* at = nullptr;
    void* asan = nullptr;
    Site site = {};
    bool fenced = false;
    enum { READY, BARRIER, WARP, DONE } state = DONE;
};

struct Warp {
    unsigned pending = 0, arrived = 0, generation = 0, epoch = 0;
    Site site = {};
    uint64_t slot[2][32];
};

struct Buffer {
    void* data;
    size_t bytes;
};

std::vector<Fiber> fibers;
std::vector<int> ready;  // kept: under ASan an allocation a switch would cost minutes
std::vector<Warp> warps;
std::map<const void*, Buffer> buffers;
const std::function<void()>* body;
void* scheduler;
int current = -1, threads, waiting, finished;
unsigned epoch, block_number, launches;
std::set<unsigned> releasers;
bool told, released, acquired;  // an atomic was made; after a fence; a fence was made after it
Site barrier_site;
std::string error;
std::string schedule = "first";
std::mt19937 generator;
#ifdef SIMT_ASAN
void* scheduler_asan;
const void* host_stack;
size_t host_size;
#endif

std::string where(const Site& site) {
    return std::string(site.file) + ":" + std::to_string(site.line);
}

void to_scheduler() {
    Fiber& self = fibers[current];
#ifdef SIMT_ASAN
    void** keep = self.state == Fiber::DONE ? nullptr : &self.asan;
    __sanitizer_start_switch_fiber(keep, host_stack, host_size);
#endif
    simt_switch(&self.at, scheduler);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(self.asan, &host_stack, &host_size);
#endif
}

void entry() {
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_size);
#endif
    (*body)();
    fibers[current].state = Fiber::DONE;
    finished++;
    to_scheduler();
    abort();
}

void prepare(Fiber& fiber) {
    if (!fiber.stack) {
        fiber.stack = (char*)mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(fiber.stack, PAGE, PROT_NONE);
    }
    void** top = (void**)(fiber.stack + PAGE + STACK - 16);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = (void*)entry;
    for (int k = 0; k < 6; k++) *--top = nullptr;
    fiber.at = top;
    fiber.fenced = false;
    fiber.state = Fiber::READY;
}

void resume(int thread) {
    current = thread;
    threadIdx = dim3((unsigned)thread % blockDim.x, 0, 0);
    Fiber& fiber = fibers[thread];
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&scheduler_asan, fiber.stack + PAGE, STACK);
#endif
    simt_switch(&scheduler, fiber.at);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(scheduler_asan, nullptr, nullptr);
#endif
    current = -1;
}

int pick() {
    if (schedule == "first") return ready.front();
    if (schedule == "last") return ready.back();
    return ready[generator() % ready.size()];
}

void run_block() {
    fibers.resize(std::max<size_t>(fibers.size(), threads));
    warps.assign((threads + 31) / 32, Warp());
    epoch = waiting = finished = 0;
    told = released = acquired = false;
    for (int t = 0; t < threads; t++) prepare(fibers[t]);
    while (error.empty()) {
        ready.clear();
        for (int t = 0; t < threads; t++) {
            if (fibers[t].state == Fiber::READY) ready.push_back(t);
        }
        if (ready.empty()) break;
        resume(pick());
    }
    for (int t = 0; t < threads && error.empty(); t++) {
        if (fibers[t].state == Fiber::DONE) continue;
        const bool warp = fibers[t].state == Fiber::WARP;
        fail(("deadlock: thread " + std::to_string(t) + " waits at " + where(fibers[t].site) +
              (warp ? " (warp)" : " (block)"))
                 .c_str());
    }
    for (auto& [key, buffer] : buffers) {
        if (races_forget) races_forget(buffer.data, buffer.bytes);
        free(buffer.data);
    }
    buffers.clear();
}

}  // namespace

void fail(const char* text) {
    if (error.empty()) error = text;
}

int lane() {
    return (int)threadIdx.x % 32;
}

Who who() {
    Who w = {};
    w.running = current >= 0;
    if (!w.running) return w;
    w.block = block_number, w.thread = (unsigned)current;
    w.block_epoch = epoch, w.warp_epoch = warps[current / 32].epoch;
    w.released = released, w.acquired = acquired;
    w.stack_low = (uintptr_t)fibers[current].stack;
    w.stack_high = w.stack_low + STACK + PAGE;
    return w;
}

void fence() {
    fibers[current].fenced = true;
    acquired = acquired || told;
}

int add(int* place, int value) {
    if (races_atomic) races_atomic(place, sizeof(int));
    const int before = *place;
    *place = before + value;
    told = true;
    released = released || fibers[current].fenced;
    if (released) releasers.insert(block_number);
    return before;
}

bool has_released(unsigned block) {
    return releasers.count(block) != 0;
}

void barrier(Site site) {
    Fiber& self = fibers[current];
    if (finished) fail(("barrier at " + where(site) + " after a thread returned").c_str());
    if (waiting && site.id != barrier_site.id) {
        fail(("divergent barriers: " + where(barrier_site) + " and " + where(site)).c_str());
    }
    barrier_site = self.site = site;
    self.state = Fiber::BARRIER;
    if (++waiting == threads) {
        waiting = 0;
        epoch++;
        for (int t = 0; t < threads; t++) fibers[t].state = Fiber::READY;
    }
    to_scheduler();
}

const uint64_t* exchange(Site site, unsigned mask, uint64_t value) {
    Fiber& self = fibers[current];
    Warp& warp = warps[current / 32];
    const unsigned bit = 1u << (current % 32);
    if (!(mask & bit)) fail(("lane not in its mask at " + where(site)).c_str());
    if (warp.pending && (warp.pending != mask || warp.site.id != site.id)) {
        fail(("warp operations meet at " + where(warp.site) + " and " + where(site)).c_str());
    }
    warp.pending = mask, warp.site = self.site = site;
    uint64_t* slot = warp.slot[warp.generation & 1];
    slot[current % 32] = value;
    warp.arrived |= bit;
    self.state = Fiber::WARP;
    if (warp.arrived == mask) {
        const int first = current / 32 * 32;
        warp.pending = warp.arrived = 0;
        warp.generation++;
        warp.epoch += mask == 0xffffffffu;  // a partial mask orders nothing for the race detector
        for (int t = first; t < first + 32 && t < threads; t++) {
            if ((mask >> (t - first)) & 1u) fibers[t].state = Fiber::READY;
        }
    }
    to_scheduler();
    return slot;
}

void* shared(const void* key, size_t bytes) {
    Buffer& buffer = buffers[key];
    if (!buffer.data) {
        size_t total = bytes;
        for (auto& [other, b] : buffers) total += b.bytes;
        if (total > SHARED_LIMIT) fail("more than 48 KiB of static shared memory");
        buffer = {malloc(bytes), bytes};
        memset(buffer.data, 0xff, bytes);  // NaN, and -1 in integers
    }
    return buffer.data;
}

int run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
    const dim3 g = config.gridDim, b = config.blockDim;
    error.clear();
    launches++;
    releasers.clear();
    if (g.x == 0 || g.y != 1 || g.z != 1 || b.x == 0 || b.x > 1024 || b.y != 1 || b.z != 1)
        return 9;
    if (config.dynamicSmemBytes != 0) return 1;
    gridDim = g, blockDim = b, body = &kernel, threads = (int)b.x;
    std::vector<unsigned> order(g.x);
    for (unsigned k = 0; k < g.x; k++) order[k] = schedule == "last" ? g.x - 1 - k : k;
    if (schedule != "first" && schedule != "last")
        std::shuffle(order.begin(), order.end(), generator);
    if (races_begin) races_begin();
    for (unsigned number : order) {
        blockIdx = dim3(number, 0, 0), block_number = number;
        run_block();
        if (!error.empty()) return FAILED;
    }
    if (races_report) error = races_report();
    return error.empty() ? 0 : FAILED;
}

}  // namespace simt

// "first", "last", or a number: random by that seed
extern "C" void simt_schedule(const char* name) {
    simt::schedule = name;
    simt::generator.seed((unsigned)atoi(name));
}

// kernels launched since the last call
extern "C" unsigned simt_launches() {
    const unsigned n = simt::launches;
    simt::launches = 0;
    return n;
}

extern "C" const char* simt_error() {
    return simt::error.c_str();
}
