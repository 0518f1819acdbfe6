// CUDA as far as the kernels use it, on the host: a block's threads are fibers that run one after the other, in a
// seeded order, from one rendezvous to the next. It finds wrong indices, tails, ties, missing barriers that a shuffled
// order can tell, and threads that wait at different barriers; not races within a warp, nor what a memory model allows.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other
#define PYARGS_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)stream, ::pyargs::emulate::launch(blocks, threads, [=] { kernel(__VA_ARGS__); }))

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

namespace pyargs::emulate {

// Runs the blocks in a seeded order. An error is kept for cudaGetLastError.
void launch(dim3 blocks, dim3 threads, const std::function<void()>& kernel);
cudaError_t last_error();
const char* error_text();

void wait_for_block();
void wait_for_warp(uint32_t mask);
// Puts 8 bytes where the lanes of the warp see them, once all of `mask` have; `done` lets go of them again.
const uint64_t* exchange(uint32_t mask, uint64_t own);

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T from_lane(uint32_t mask, T own, int lane) {
  const uint64_t* values = exchange(mask, pack(own));
  const T value = lane >= 0 && lane < 32 ? unpack<T>(values[lane]) : own;
  wait_for_warp(mask);  // before anybody writes the next one
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T, class Combine>
T over_lanes(uint32_t mask, T own, Combine combine) {
  const uint64_t* values = exchange(mask, pack(own));
  T found{};
  bool first = true;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    found = first ? unpack<T>(values[i]) : combine(found, unpack<T>(values[i]));
    first = false;
  }
  wait_for_warp(mask);
  return found;
}

}  // namespace pyargs::emulate

inline cudaError_t cudaGetLastError() { return pyargs::emulate::last_error(); }
inline const char* cudaGetErrorString(cudaError_t) { return pyargs::emulate::error_text(); }

inline void __syncthreads() { pyargs::emulate::wait_for_block(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { pyargs::emulate::wait_for_warp(mask); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return pyargs::emulate::from_lane(mask, value, lane);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int distance) {
  return pyargs::emulate::from_lane(mask, value, pyargs::emulate::lane() + distance);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int other) {
  return pyargs::emulate::from_lane(mask, value, pyargs::emulate::lane() ^ other);
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) {
  return pyargs::emulate::over_lanes(mask, value, [](uint32_t a, uint32_t b) { return a + b; });
}

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
