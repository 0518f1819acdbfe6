// Top-k and log-sum-exp of rows of logits in one pass: the pieces of the kernels that do it.
//
// A row is cut into chunks of 8192, one block of 256 threads each; a thread keeps its 32 elements in registers. The
// k-th largest of the 256 thread maxima bounds the chunk's k-th largest element from below, so few elements beyond the
// k best survive it (about 75 of 8192 for k = 64). They go to the workspace as 64-bit keys; the block that finishes
// last of its row (it takes the last ticket, nobody waits) chooses among all chunks' survivors and merges the
// log-sum-exps in order. Keys are unique and chunks fixed: results are exact, repeatable, and the same for any batch.
#pragma once

#include "elements.cuh"

namespace pyargs::cuda {

constexpr int kTopkThreads = 256, kTopkPerThread = 32, kTopkChunk = kTopkThreads * kTopkPerThread;
constexpr int kTopkKept = 128;  // survivors of a chunk that the workspace holds
constexpr float kTopkLog2E = 1.44269504f;

struct TopkWorkspace {
  uint64_t* keys;     // [batch, chunks, kTopkKept]
  float* maxima;      // [batch, chunks]
  float* sums;        // [batch, chunks]: of 2^((x - max) log2 e)
  int* counts;        // [batch, chunks]
  uint32_t* tickets;  // [batch], zero at the start
};

struct TopkShared {
  uint32_t maxima[kTopkThreads];
  uint64_t keys[kTopkKept];
  float warp_max[kTopkThreads / 32], warp_sum[kTopkThreads / 32];
  uint32_t threshold;
  int count;
  bool last;
};

// Bits of the float32 of element i (0 .. 8 or 4) of 16 bytes as they lie in memory.
template <Dtype dtype>
__device__ __forceinline__ uint32_t element_bits(const uint4& vector, int i) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  if (dtype == Dtype::kFloat32) return words[i];
  return half_bits(dtype, (words[i / 2] >> (16 * (i % 2))) & 0xffffu);
}

template <Dtype dtype>
struct TopkLoad {
  static constexpr int kSize = dtype == Dtype::kFloat32 ? 4 : 2;
  static constexpr int kVector = 16 / kSize;                 // elements of a 16-byte load
  static constexpr int kVectors = kTopkPerThread / kVector;  // loads of a thread
  static constexpr uint32_t kMinusInf = dtype == Dtype::kFloat32    ? 0xff800000u
                                        : dtype == Dtype::kBFloat16 ? 0xff80ff80u
                                                                    : 0xfc00fc00u;

  // Position in the chunk of the first element of a thread's load.
  static __device__ __forceinline__ int position(int load) {
    return (load * kTopkThreads + static_cast<int>(threadIdx.x)) * kVector;
  }

  // Elements beyond n read as -inf. A row that does not start at 16 bytes, and the end of a row, are read one by one,
  // into the same registers: the sums do not depend on where a row lies.
  static __device__ __forceinline__ uint4 read(const char* chunk, bool aligned, int n, int load) {
    const int at = position(load);
    if (aligned && at + kVector <= n) return *reinterpret_cast<const uint4*>(chunk + static_cast<int64_t>(at) * kSize);
    uint32_t words[4] = {kMinusInf, kMinusInf, kMinusInf, kMinusInf};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (at + i < n) {
        if (kSize == 4) {
          words[i] = reinterpret_cast<const uint32_t*>(chunk)[at + i];
        } else {
          const uint32_t half = reinterpret_cast<const uint16_t*>(chunk)[at + i];
          const int shift = 16 * (i % 2);
          words[i / 2] = (words[i / 2] & ~(0xffffu << shift)) | (half << shift);
        }
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// A threshold with at least k of the 256 thread maxima at or above it, close to the k-th largest of them (its upper 20
// bits). Called by all threads; the first warp works.
__device__ __forceinline__ uint32_t bound_of_maxima(TopkShared& shared, uint32_t own, int k) {
  shared.maxima[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x < 32) {
    uint32_t mine[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) mine[i] = shared.maxima[threadIdx.x + 32 * i];
    uint32_t threshold = 0;
    for (int bit = 31; bit >= 12; --bit) {
      const uint32_t tried = threshold | (1u << bit);
      uint32_t count = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) count += mine[i] >= tried ? 1u : 0u;
      if (__reduce_add_sync(0xffffffffu, count) >= static_cast<uint32_t>(k)) threshold = tried;
    }
    if (threadIdx.x == 0) {
      shared.threshold = threshold;
      shared.count = 0;
    }
  }
  __syncthreads();
  return shared.threshold;
}

__device__ __forceinline__ void keep(TopkShared& shared, uint64_t key) {
  const int slot = atomicAdd(&shared.count, 1);
  if (slot < kTopkKept) shared.keys[slot] = key;
}

// More than kTopkKept survivors (many ties, sorted rows): bisects the 64-bit keys until k to kTopkKept are left. Rare,
// so it reads memory again and stays out of line, which keeps the registers of the usual path few. `key_at(i)`, i in 0
// .. n, gives a key or 0; at least k of them are not 0.
template <class KeyAt>
__device__ __noinline__ void keep_exactly(TopkShared& shared, KeyAt key_at, int64_t n, int k) {
  uint64_t threshold = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t tried = threshold | (static_cast<uint64_t>(1) << bit);
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    int own = 0;
    for (int64_t i = threadIdx.x; i < n; i += kTopkThreads) own += key_at(i) >= tried ? 1 : 0;
    if (own > 0) atomicAdd(&shared.count, own);
    __syncthreads();
    if (shared.count >= k) {
      threshold = tried;
      if (shared.count <= kTopkKept) break;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kTopkThreads) {
    const uint64_t key = key_at(i);
    if (key >= threshold) keep(shared, key);
  }
  __syncthreads();
}

// Key of element i of a chunk, from memory.
template <Dtype dtype>
struct ChunkKey {
  const char* chunk;
  uint32_t first;
  __device__ __forceinline__ uint64_t operator()(int64_t i) const {
    uint4 vector = make_uint4(0, 0, 0, 0);
    vector.x = dtype == Dtype::kFloat32 ? reinterpret_cast<const uint32_t*>(chunk)[i]
                                        : reinterpret_cast<const uint16_t*>(chunk)[i];
    return topk_key(element_bits<dtype>(vector, 0), first + static_cast<uint32_t>(i));
  }
};

// Survivor i of a row, 0 in the empty places.
struct SurvivorKey {
  const uint64_t* keys;
  const int* counts;
  __device__ __forceinline__ uint64_t operator()(int64_t i) const {
    return i % kTopkKept < load_fresh(counts + i / kTopkKept) ? load_fresh(keys + i) : 0;
  }
};

// (max, sum) of two parts as one. Parts without a finite value have max -inf and sum 0 (or NaN).
__device__ __forceinline__ void merge_sums(float& max, float& sum, float other_max, float other_sum) {
  const float top = fmaxf(max, other_max);
  if (top == -INFINITY) {
    sum += other_sum;
    return;
  }
  const float a = max == top ? 1.0f : fast_exp2((max - top) * kTopkLog2E);
  const float b = other_max == top ? 1.0f : fast_exp2((other_max - top) * kTopkLog2E);
  sum = sum * a + other_sum * b;
  max = top;
}

__device__ __forceinline__ void merge_sums_of_warp(float& max, float& sum) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other_max = __shfl_down_sync(0xffffffffu, max, distance);
    const float other_sum = __shfl_down_sync(0xffffffffu, sum, distance);
    merge_sums(max, sum, other_max, other_sum);
  }
}

// The survivors of a row among those of its chunks, into shared memory: the k best and few more.
__device__ __forceinline__ void survivors_of_row(TopkShared& shared, const TopkWorkspace& work, int64_t row,
                                                 int64_t chunks, int k) {
  const int64_t places = chunks * kTopkKept;
  const SurvivorKey key_at{work.keys + row * places, work.counts + row * chunks};
  uint64_t own = 0;
  for (int64_t i = threadIdx.x; i < places; i += kTopkThreads) {
    const uint64_t key = key_at(i);
    own = key > own ? key : own;
  }
  const uint64_t bound = static_cast<uint64_t>(bound_of_maxima(shared, static_cast<uint32_t>(own >> 32), k)) << 32;
  for (int64_t i = threadIdx.x; i < places; i += kTopkThreads) {
    const uint64_t key = key_at(i);
    if (key != 0 && key >= bound) keep(shared, key);
  }
  __syncthreads();
  if (shared.count > kTopkKept) keep_exactly(shared, key_at, places, k);
}

// The (max, sum) of a row into place `at` of shared memory. Called by a whole warp.
__device__ __forceinline__ void sum_of_row(TopkShared& shared, const TopkWorkspace& work, int64_t row, int64_t chunks,
                                           int at) {
  float max = -INFINITY, sum = 0.0f;
  for (int64_t c = threadIdx.x % 32; c < chunks; c += 32) {
    merge_sums(max, sum, load_fresh(work.maxima + row * chunks + c), load_fresh(work.sums + row * chunks + c));
  }
  merge_sums_of_warp(max, sum);
  if (threadIdx.x % 32 == 0) {
    shared.warp_max[at] = max;
    shared.warp_sum[at] = sum;
  }
}

// The key of this thread's survivor and its rank; a rank of k or more is none of the k best.
struct Ranked {
  uint64_t key;
  int rank;
};

__device__ __forceinline__ Ranked ranked(const TopkShared& shared, int k) {
  const int n = shared.count;  // k to kTopkKept
  if (static_cast<int>(threadIdx.x) >= n) return {0, k};
  const uint64_t key = shared.keys[threadIdx.x];
  int rank = 0;
  for (int i = 0; i < n; ++i) rank += shared.keys[i] > key ? 1 : 0;
  return {key, rank};
}

// A thread's elements of a chunk, the largest, and the sum of 2^((x - max) log2 e).
template <Dtype dtype>
struct TopkElements {
  uint4 vectors[TopkLoad<dtype>::kVectors];
  float max, sum;
  bool nan;

  __device__ __forceinline__ uint32_t bits(int i) const {
    return element_bits<dtype>(vectors[i / TopkLoad<dtype>::kVector], i % TopkLoad<dtype>::kVector);
  }

  __device__ __forceinline__ TopkElements(const char* chunk, int n) {
    using Load = TopkLoad<dtype>;
    const bool aligned = reinterpret_cast<uintptr_t>(chunk) % 16 == 0;
#pragma unroll
    for (int i = 0; i < Load::kVectors; ++i) vectors[i] = Load::read(chunk, aligned, n, i);
    max = -INFINITY;
    nan = false;
#pragma unroll
    for (int i = 0; i < kTopkPerThread; ++i) {
      const float x = float_of(bits(i));
      max = fmaxf(max, x);  // passes over NaN
      nan = nan || x != x;
    }
    sum = 0.0f;
    if (max != -INFINITY) {
#pragma unroll
      for (int i = 0; i < kTopkPerThread; ++i) {
        sum += fast_exp2((float_of(bits(i)) - max) * kTopkLog2E);  // +inf - +inf is NaN, as it should be
      }
    }
    if (nan) sum = NAN;
  }
};

// The survivors of a chunk of n elements, of which `first` is the id of the first, into shared memory.
template <Dtype dtype>
__device__ __forceinline__ void survivors_of_chunk(TopkShared& shared, const TopkElements<dtype>& elements,
                                                   const char* chunk, int64_t first, int n, int k) {
  using Load = TopkLoad<dtype>;
  // Threads without an element have maximum 0, below any key.
  uint32_t own = Load::position(0) < n ? static_cast<uint32_t>(topk_key(bits_of(elements.max), 0) >> 32) : 0;
  if (elements.nan) own = 0xffffffffu;
  const uint32_t bound = bound_of_maxima(shared, own, k);
  if (own >= bound) {
#pragma unroll
    for (int i = 0; i < kTopkPerThread; ++i) {
      const int at = Load::position(i / Load::kVector) + i % Load::kVector;
      const uint64_t key = topk_key(elements.bits(i), static_cast<uint32_t>(first) + static_cast<uint32_t>(at));
      if (at < n && static_cast<uint32_t>(key >> 32) >= bound) keep(shared, key);
    }
  }
  __syncthreads();
  if (shared.count > kTopkKept) keep_exactly(shared, ChunkKey<dtype>{chunk, static_cast<uint32_t>(first)}, n, k);
}

// What a block found goes to the workspace. The sum of a thread's elements is merged with those of the others.
__device__ __forceinline__ void leave_survivors(const TopkShared& shared, const TopkWorkspace& work, int64_t part) {
  const int survivors = shared.count;
  for (int i = threadIdx.x; i < survivors; i += kTopkThreads) work.keys[part * kTopkKept + i] = shared.keys[i];
  if (threadIdx.x == 0) work.counts[part] = survivors;
}

__device__ __forceinline__ void leave_sum(TopkShared& shared, const TopkWorkspace& work, int64_t part, float max,
                                          float sum) {
  merge_sums_of_warp(max, sum);
  if (threadIdx.x % 32 == 0) {
    shared.warp_max[threadIdx.x / 32] = max;
    shared.warp_sum[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kTopkThreads / 32; ++warp)
      merge_sums(max, sum, shared.warp_max[warp], shared.warp_sum[warp]);
    work.maxima[part] = max;
    work.sums[part] = sum;
  }
}

// Whether this block is the last of the `blocks` that share a ticket; then it sees what all of them have left. The
// first thread's fences count for all: what the others left lies before the barrier of leave_sum, what they read behind
// this one's.
__device__ __forceinline__ bool is_last(TopkShared& shared, uint32_t* ticket, int64_t blocks) {
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = atomicAdd(ticket, 1u) == static_cast<uint32_t>(blocks - 1);
    if (shared.last) __threadfence();
  }
  __syncthreads();
  return shared.last;
}

// Of the host.

inline int64_t topk_chunks(int64_t vocab) { return (vocab + kTopkChunk - 1) / kTopkChunk; }

inline TopkWorkspace topk_workspace(void* memory, int64_t rows, int64_t vocab) {
  const int64_t parts = rows * topk_chunks(vocab);
  TopkWorkspace work;
  work.keys = static_cast<uint64_t*>(memory);
  work.maxima = reinterpret_cast<float*>(work.keys + parts * kTopkKept);
  work.sums = work.maxima + parts;
  work.counts = reinterpret_cast<int*>(work.sums + parts);
  work.tickets = reinterpret_cast<uint32_t*>(work.counts + parts);
  return work;
}

}  // namespace pyargs::cuda
