// CUDA as far as the kernels use it, on the host. What runs the threads is fibers.cpp, or threads.cpp for
// ThreadSanitizer.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define PYARGS_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)stream, ::pyargs::emulate::launch(blocks, threads, [=] { kernel(__VA_ARGS__); }))
#define PYARGS_SHARED(type, name) type& name = *static_cast<type*>(::pyargs::emulate::shared(sizeof(type)))

struct alignas(16) uint4 {  // as on the device: a wide load elsewhere is an error
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

namespace pyargs::emulate {

// The one that is used, the recording that it belongs to if any, and whether its device has memory.
struct Stream {
  unsigned long long number = 0;
  unsigned long long recording = 0;
  int device = 0;
  bool memory = true;
};
inline Stream stream;

// Runs all threads of all blocks. An error is kept for cudaGetLastError.
void launch(dim3 blocks, dim3 threads, const std::function<void()>& kernel);
inline std::string error;

// 0 to count, shuffled by the seed where there is one.
std::vector<unsigned> in_order(unsigned count);

// The block's shared memory: garbage at first, NaN to whom it is floats.
void* shared(size_t bytes);
constexpr size_t kMaxShared = 48 * 1024;
constexpr int kGarbage = 0xff;

void wait_for_block();
void wait_for_warp(uint32_t mask);
// What the lanes of the warp give; orders nothing but these values.
std::array<uint64_t, 32> exchange(uint32_t mask, uint64_t own);
uint32_t atomic_add(uint32_t* at, uint32_t value);
// One more, or 0 after `last`. As a release it tells who acquires later what this thread knew.
uint32_t atomic_inc(uint32_t* at, uint32_t last, bool release, bool acquire);

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
  const auto values = exchange(mask, pack(own));
  return lane >= 0 && lane < 32 ? unpack<T>(values[lane]) : own;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T, class Combine>
T over_lanes(uint32_t mask, T own, Combine combine) {
  const auto values = exchange(mask, pack(own));
  T found{};
  bool first = true;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    found = first ? unpack<T>(values[i]) : combine(found, unpack<T>(values[i]));
    first = false;
  }
  return found;
}

inline float float_of_half(uint32_t half, bool bfloat16) {
  const uint32_t bits = bfloat16 ? half << 16 : ::pyargs::float16_to_float32_bits(half);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// mma.m16n8k16 of the whole warp: which lane has which elements is as platform.h says. The products are exact and are
// added up in order, in double; how a device rounds meanwhile is not documented.
inline void multiply_16_8_16(float (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2], bool bfloat16) {
  const auto pair = [](uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; };
  const auto near = exchange(0xffffffffu, pair(rows[0], rows[1])), far = exchange(0xffffffffu, pair(rows[2], rows[3]));
  const auto other = exchange(0xffffffffu, pair(columns[0], columns[1]));
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), column = lane() % 4 * 2 + i % 2;
    double sum = sums[i];
    for (int d = 0; d < 16; ++d) {
      const int within = d % 8 / 2, shift = 16 * (d % 2);
      const uint64_t a = (d < 8 ? near : far)[row % 8 * 4 + within] >> (32 * (row / 8) + shift);
      const uint64_t b = other[column * 4 + within] >> (32 * (d / 8) + shift);
      sum += static_cast<double>(float_of_half(a & 0xffffu, bfloat16)) * float_of_half(b & 0xffffu, bfloat16);
    }
    sums[i] = static_cast<float>(sum);
  }
}

}  // namespace pyargs::emulate

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
inline cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
// A graph is known by the number of its recording.
using cudaGraph_t = struct Graph*;
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* number,
                                            cudaGraph_t* graph) {
  *number = pyargs::emulate::stream.recording;
  *graph = reinterpret_cast<cudaGraph_t>(*number);
  *status = *number ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* number) {
  *number = pyargs::emulate::stream.number;
  return cudaSuccess;
}
// Of garbage, and not while somebody may be recording.
inline cudaError_t cudaMalloc(void** at, size_t bytes) {
  if (capture_mode != cudaStreamCaptureModeRelaxed || !pyargs::emulate::stream.memory) return 1;
  std::memset(*at = ::operator new(bytes), 0xdd, bytes);
  return cudaSuccess;
}

// What is called when the graphs that hold it are gone: pyargs_emulate_destroy.
struct UserObject {
  void* given;
  void (*destroy)(void*);
};
using cudaUserObject_t = UserObject;
using cudaHostFn_t = void (*)(void*);
inline std::multimap<cudaGraph_t, UserObject> user_objects;
constexpr unsigned cudaUserObjectNoDestructorSync = 1, cudaGraphUserObjectMove = 1;
inline cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* given, cudaHostFn_t destroy, unsigned,
                                        unsigned) {
  *object = {given, destroy};
  return cudaSuccess;
}
inline cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned) {
  if (!pyargs::emulate::stream.memory) return 1;
  user_objects.emplace(graph, object);
  return cudaSuccess;
}
inline cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  object.destroy(object.given);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return pyargs::emulate::error.empty() ? cudaSuccess : 1; }
inline const char* cudaGetErrorString(cudaError_t) {
  static std::string text;
  text.swap(pyargs::emulate::error);
  pyargs::emulate::error.clear();
  return text.c_str();
}

inline void __syncthreads() { pyargs::emulate::wait_for_block(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { pyargs::emulate::wait_for_warp(mask); }

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
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  return pyargs::emulate::over_lanes(mask, value, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  return pyargs::emulate::over_lanes(mask, value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}

inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }

template <class T>
T atomicAdd(T* at, T value) {
  static_assert(sizeof(T) == 4);
  return static_cast<T>(pyargs::emulate::atomic_add(reinterpret_cast<uint32_t*>(at), static_cast<uint32_t>(value)));
}

namespace pyargs::cuda {

// A kernel uses the first. With the others, which order less, it must be found to be wrong (.ci/emulate.py).
inline uint32_t take_ticket(uint32_t* at, uint32_t last) { return emulate::atomic_inc(at, last, true, true); }
inline uint32_t take_ticket_release(uint32_t* at, uint32_t last) { return emulate::atomic_inc(at, last, true, false); }
inline uint32_t take_ticket_acquire(uint32_t* at, uint32_t last) { return emulate::atomic_inc(at, last, false, true); }

}  // namespace pyargs::cuda
