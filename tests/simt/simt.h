// CUDA C++ on a CPU: just enough of the language for csrc/cuda, threads as hand-switched fibers.
//
// Included by csrc/cuda/device.h under -DSIMT instead of cuda_runtime.h. Semantics come from
// runtime.cpp: barriers that must be met by all threads at one place, warp operations that check
// their mask, shared memory that starts as NaN. Not shown: speed, memory order between blocks,
// nvcc's own code.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>

#define __CUDACC__  // after the headers above, which know the name
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define ROLLED
#define UNROLLED

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef int cudaError_t;
typedef void* cudaStream_t;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

struct Site {  // where a barrier or warp operation stands in the source
    const char* file;
    int line, id;
};

int run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
void barrier(Site site);
const uint64_t* exchange(Site site, unsigned mask, uint64_t value);  // the values of all 32 lanes
void* shared(const void* key, size_t bytes);
void fail(const char* text);
int lane();
void fence();
int add(int* place, int value);  // atomic

template <typename T>
T shuffle(Site site, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    const uint64_t* all = exchange(site, mask, bits);
    if (source < 0 || source > 31) return value;
    if (!((mask >> source) & 1u)) fail("shuffle from a lane outside the mask");
    memcpy(&value, &all[source], sizeof(T));
    return value;
}

template <typename T>
T shuffle_down(Site site, unsigned mask, T value, int delta) {
    return shuffle(site, mask, value, lane() + delta);
}

template <typename T>
T shuffle_up(Site site, unsigned mask, T value, int delta) {
    return shuffle(site, mask, value, lane() - delta);
}

template <typename T>
T shuffle_to(Site site, unsigned mask, T value, int source) {
    return shuffle(site, mask, value, source & 31);
}

}  // namespace simt

#define SIMT_SITE                       \
    simt::Site {                        \
        __FILE__, __LINE__, __COUNTER__ \
    }
#define __syncthreads() simt::barrier(SIMT_SITE)
#define __threadfence() simt::fence()
#define atomicAdd(place, value) simt::add(place, value)
#define __shfl_down_sync(...) simt::shuffle_down(SIMT_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle_up(SIMT_SITE, __VA_ARGS__)
#define __shfl_sync(...) simt::shuffle_to(SIMT_SITE, __VA_ARGS__)
#define SHARED(type, name, count)     \
    static const char name##_key = 0; \
    type* const name = (type*)simt::shared(&name##_key, sizeof(type) * (count))

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    std::tuple<Parameters...> values(arguments...);
    return simt::run(*config, [&] { std::apply(kernel, values); });
}
