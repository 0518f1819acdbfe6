// Top-k and log-sum-exp of rows of logits in one pass: the pieces of the kernels that do it.
//
// A row is cut into chunks of 8192, one block of 256 threads each; a thread keeps its 32 elements in registers. The
// k-th largest of the 256 thread maxima bounds the chunk's k-th largest element from below, so few elements beyond the
// k best survive it (about 80 of 8192 for k = 64). They go to the workspace as 64-bit keys; the block that finishes
// last of its row (it takes the last ticket, nobody waits) chooses among all chunks' survivors and merges the
// log-sum-exps in order. Keys are unique and chunks fixed: results are exact, repeatable, and the same for any batch.
#pragma once

#include "last_block.cuh"
#include "topk_elements.cuh"

namespace pyargs::cuda {

constexpr int kTopkKept = 128;    // survivors that a block holds, at most
constexpr int kTopkRowKeys = 10;  // that a thread of a row's last block holds: all of 160,000 elements for k = 64
constexpr int kTopkLastBit = 11;  // of a bound: those below are not looked at

struct TopkWorkspace {
  uint64_t* keys;     // [batch, chunks, topk_kept(k)]: of the survivors, then 0
  float* maxima;      // [batch, chunks]
  float* sums;        // [batch, chunks]: of 2^((x - max) log2 e)
  uint32_t* tickets;  // [batch], zero before and after
};

// Survivors of a chunk that the workspace holds.
__device__ __forceinline__ int topk_kept(int k) { return (2 * k + 31) / 32 * 32; }

struct TopkShared {
  uint32_t maxima[kTopkThreads];  // of the threads; or of each digit, how many keys have it
  uint64_t keys[kTopkKept];
  float warp_max[kTopkThreads / 32], warp_sum[kTopkThreads / 32];
  uint32_t bound, digit;
  int count, wanted, holding;
  bool last;
};

// `count`, one less where value is below `least`: what the first subtraction borrows, the second takes. Two
// instructions; a compiler makes three of the plain form.
__device__ __forceinline__ uint32_t one_less_below(uint32_t value, uint32_t least, uint32_t count) {
#ifdef __CUDA_ARCH__
  asm("{ .reg .u32 below; sub.cc.u32 below, %1, %2; subc.u32 %0, %0, 0; }" : "+r"(count) : "r"(value), "r"(least));
  return count;
#else
  return value < least ? count - 1 : count;
#endif
}

// One of the 256 thread maxima that at least k of them reach, and few more where few more can: all bits from the first
// that differ, two at a time, until no more than k / 8 + 2 are too many. Called by the first warp.
__device__ __forceinline__ uint32_t bound_of_maxima(const TopkShared& shared, int k, int last_bit) {
  uint32_t mine[8], low = 0xffffffffu, high = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    mine[i] = shared.maxima[threadIdx.x + 32 * i];
    low = mine[i] < low ? mine[i] : low;
    high = mine[i] > high ? mine[i] : high;
  }
  low = __reduce_min_sync(0xffffffffu, low);
  high = __reduce_max_sync(0xffffffffu, high);
  int shift = 30 - __clz(static_cast<int>(low ^ high));
  uint32_t threshold = shift < last_bit ? low : low & ~((4u << shift) - 1);
  const uint32_t wanted = static_cast<uint32_t>(k), enough = wanted + wanted / 8 + 2;
  for (uint32_t count = kTopkThreads; count > enough && shift >= last_bit; shift -= 2) {
    const uint32_t step = 1u << shift;
    uint32_t reach[3] = {8, 8, 8};  // how many of eight each of three thresholds
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (uint32_t t = 0; t < 3; ++t) reach[t] = one_less_below(mine[i], threshold + (t + 1) * step, reach[t]);
    }
    const uint32_t counts = __reduce_add_sync(0xffffffffu, reach[0] | reach[1] << 10 | reach[2] << 20);
#pragma unroll
    for (int i = 3; i > 0; --i) {
      const uint32_t reached = counts >> (10 * (i - 1)) & 1023u;
      if (reached < wanted) continue;
      threshold += static_cast<uint32_t>(i) * step;
      count = reached;
      break;
    }
  }
  uint32_t least = 0xffffffffu;  // by how much a maximum is above it; those below it are far above
#pragma unroll
  for (int i = 0; i < 8; ++i) least = mine[i] - threshold < least ? mine[i] - threshold : least;
  return threshold + __reduce_min_sync(0xffffffffu, least);
}

// The first warp bounds what the threads have left in shared.maxima; the others pass by. A barrier goes before and
// behind.
__device__ __forceinline__ void bound_by_first_warp(TopkShared& shared, int k, int last_bit) {
  const uint32_t bound = bound_of_maxima(shared, k, last_bit);
  if (threadIdx.x == 0) {
    shared.bound = bound;
    shared.count = 0;
  }
}

// Finds the largest digit for which `wanted` keys have it or a larger one. Called by the first warp.
__device__ __forceinline__ void choose_digit(TopkShared& shared, int wanted) {
  const int lane = static_cast<int>(threadIdx.x);
  int own = 0;
  for (int i = 0; i < 8; ++i) own += static_cast<int>(shared.maxima[8 * lane + i]);
  int reaching = own;  // digits of this lane and of those above
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_down_sync(0xffffffffu, reaching, distance);
    if (lane + distance < 32) reaching += other;
  }
  int above = reaching - own;
  if (above >= wanted || reaching < wanted) return;
  int digit = 8 * lane + 7;
  for (; above + static_cast<int>(shared.maxima[digit]) < wanted; --digit)
    above += static_cast<int>(shared.maxima[digit]);
  shared.digit = static_cast<uint32_t>(digit);
  shared.wanted = wanted - above;
  shared.holding = static_cast<int>(shared.maxima[digit]);
}

// More survivors than `kept` (many ties, sorted rows): the 64-bit keys by 8 bits a pass, from the upper ones, until k
// to `kept` are left. Rare, so it reads memory again and stays out of line, which keeps the registers of the usual path
// few. `key_at(i)`, i in 0 .. n, gives a key or 0; at least k of them are not 0.
template <class KeyAt>
__device__ __noinline__ void keep_exactly(TopkShared& shared, KeyAt key_at, int64_t n, int k, int kept) {
  uint64_t prefix = 0;
  int wanted = k, shift = 64;  // keys that are wanted of those with the prefix
  do {
    shift -= 8;
    shared.maxima[threadIdx.x] = 0;
    __syncthreads();
    uint32_t digit = 0, run = 0;  // ties have the same digits, and would meet in one place
    for (int64_t i = threadIdx.x; i < n; i += kTopkThreads) {
      const uint64_t key = key_at(i);
      if (key == 0 || key >> shift >> 8 != prefix) continue;
      const uint32_t found = static_cast<uint32_t>(key >> shift) & 255u;
      if (found != digit) {
        if (run > 0) atomicAdd(&shared.maxima[digit], run);
        digit = found;
        run = 0;
      }
      ++run;
    }
    if (run > 0) atomicAdd(&shared.maxima[digit], run);
    __syncthreads();
    if (threadIdx.x < 32) choose_digit(shared, wanted);
    __syncthreads();
    prefix = prefix << 8 | shared.digit;
    wanted = shared.wanted;
  } while (k - wanted + shared.holding > kept);
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kTopkThreads) {
    const uint64_t key = key_at(i);
    if (key == 0 || key >> shift < prefix) continue;
    shared.keys[atomicAdd(&shared.count, 1)] = key;
  }
  __syncthreads();
}

// Key i of a row's workspace.
struct SurvivorKey {
  const uint64_t* keys;
  __device__ __forceinline__ uint64_t operator()(int64_t i) const { return load_fresh(keys + i); }
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

// Those of the first `lanes` lanes, in the first.
template <int lanes>
__device__ __forceinline__ void merge_sums_of_lanes(float& max, float& sum) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const float other_max = __shfl_down_sync(0xffffffffu, max, distance);
    const float other_sum = __shfl_down_sync(0xffffffffu, sum, distance);
    merge_sums(max, sum, other_max, other_sum);
  }
}

// The (max, sum) of a row into place `at` of shared memory. Called by a whole warp.
__device__ __forceinline__ void sum_of_row(TopkShared& shared, const TopkWorkspace& work, int64_t row, int chunks,
                                           int at) {
  float max = -INFINITY, sum = 0.0f;
  for (int c = static_cast<int>(threadIdx.x) % 32; c < chunks; c += 32) {
    merge_sums(max, sum, load_fresh(work.maxima + row * chunks + c), load_fresh(work.sums + row * chunks + c));
  }
  merge_sums_of_lanes<32>(max, sum);
  if (threadIdx.x % 32 == 0) {
    shared.warp_max[at] = max;
    shared.warp_sum[at] = sum;
  }
}

// The survivors of a row among those of its chunks, into shared memory: the k best and few more. And the (max, sum) of
// this row and those behind it, `sums` in all.
__device__ __forceinline__ void survivors_of_row(TopkShared& shared, const TopkWorkspace& work, int64_t row, int chunks,
                                                 int k, int sums) {
  const int64_t places = static_cast<int64_t>(chunks) * topk_kept(k);
  const SurvivorKey key_at{work.keys + row * places};
  uint64_t keys[kTopkRowKeys];
  uint32_t own = 0;
  int64_t part = 0;  // which of them are in the registers: of most rows, all
  constexpr int64_t kPart = kTopkRowKeys * kTopkThreads;
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < kTopkRowKeys; ++i) {
      const int64_t at = part * kPart + i * kTopkThreads + threadIdx.x;
      keys[i] = at < places ? key_at(at) : 0;
    }
  };
  for (;; ++part) {
    load();
#pragma unroll
    for (int i = 0; i < kTopkRowKeys; ++i) {
      const uint32_t upper = static_cast<uint32_t>(keys[i] >> 32);
      own = upper > own ? upper : own;
    }
    if ((part + 1) * kPart >= places) break;
  }
  shared.maxima[threadIdx.x] = own;
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == 0) bound_by_first_warp(shared, k, kTopkLastBit);
  if (warp > 0 && warp <= sums) sum_of_row(shared, work, row + warp - 1, chunks, warp - 1);
  __syncthreads();
  const uint32_t bound = shared.bound;  // above 0: chunk 0 alone has k keys, each of another thread
  for (; own >= bound; load()) {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kTopkRowKeys; ++i) found |= static_cast<uint32_t>(keys[i] >> 32) >= bound ? 1u << i : 0;
    int slot = found == 0 ? 0 : atomicAdd(&shared.count, __popc(found));
#pragma unroll
    for (int i = 0; i < kTopkRowKeys; ++i) {
      if ((found >> i & 1) == 0) continue;
      if (slot < kTopkKept) shared.keys[slot] = keys[i];
      ++slot;
    }
    if (part-- == 0) break;
  }
  __syncthreads();
  if (shared.count > kTopkKept) keep_exactly(shared, key_at, places, k, kTopkKept);
}

// The logarithm of a row's sum of 2^((x - max) log2 e). The largest element's own term is 1 but for rounding, which
// must make no log-prob positive. NaN stays.
__device__ __forceinline__ float log_of_sum(float sum) { return sum < 1.0f ? 0.0f : logf(sum); }

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

// The sums of a chunk's warps, each relative to the warp's largest element, into shared memory.
template <Dtype dtype>
__device__ __forceinline__ void sums_of_warps(TopkShared& shared, const TopkElements<dtype>& elements, uint32_t own) {
  const float max = float_of(key_bits(static_cast<uint64_t>(__reduce_max_sync(0xffffffffu, own)) << 32));
  float sum = elements.sum(max);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) {
    shared.warp_max[threadIdx.x / 32] = max;
    shared.warp_sum[threadIdx.x / 32] = sum;
  }
}

// Their sum goes to the workspace. Called by a whole warp behind a barrier.
__device__ __forceinline__ void leave_sum(const TopkShared& shared, const TopkWorkspace& work, int64_t part) {
  constexpr int kWarps = kTopkThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float max = shared.warp_max[lane % kWarps], sum = shared.warp_sum[lane % kWarps];
  merge_sums_of_lanes<kWarps>(max, sum);
  if (lane == 0) {
    work.maxima[part] = max;
    work.sums[part] = sum;
  }
}

// The elements that reach the bound, of a chunk of which `first` is the id of the first, into shared memory.
template <Dtype dtype>
__device__ __forceinline__ void keep_survivors(TopkShared& shared, const TopkElements<dtype>& elements,
                                               const char* chunk, int64_t first, int n, int kept) {
  using Elements = TopkElements<dtype>;
  uint32_t found = elements.reaching(float_of(key_bits(static_cast<uint64_t>(shared.bound) << 32)));
  if (n < kTopkChunk) {  // -inf stands in the places beyond n, and may be the bound
    uint32_t beyond = 0;
    for (uint32_t rest = found; rest != 0; rest &= rest - 1) {
      if (Elements::place(rest) >= n) beyond |= rest & (~rest + 1);
    }
    found &= ~beyond;
  }
  if (found == 0) return;
  int slot = atomicAdd(&shared.count, __popc(found));
  const ChunkKey<dtype> key_at{chunk, static_cast<uint32_t>(first)};
  for (; found != 0 && slot < kept; found &= found - 1, ++slot) {
    shared.keys[slot] = key_at(Elements::place(found));
  }
}

// What a block finds in a chunk of n elements goes to the workspace: the sum and, where they are wanted, the survivors.
template <Dtype dtype>
__device__ __forceinline__ void scan_chunk(TopkShared& shared, const TopkWorkspace& work, int64_t part,
                                           const char* chunk, int64_t first, int n, int k, bool survivors) {
  const TopkElements<dtype> elements(chunk, n);
  const uint32_t own = static_cast<uint32_t>(topk_key(bits_of(elements.largest()), 0) >> 32);
  const bool first_warp = threadIdx.x < 32;
  if (survivors) {
    shared.maxima[threadIdx.x] = own;
    __syncthreads();
    if (first_warp) bound_by_first_warp(shared, k, dtype == Dtype::kBFloat16 ? 15 : kTopkLastBit);
  }
  sums_of_warps(shared, elements, own);
  __syncthreads();
  if (first_warp) leave_sum(shared, work, part);
  if (!survivors) return;
  const int kept = topk_kept(k);
  if (own >= shared.bound) keep_survivors(shared, elements, chunk, first, n, kept);
  __syncthreads();
  if (shared.count > kept) keep_exactly(shared, ChunkKey<dtype>{chunk, static_cast<uint32_t>(first)}, n, k, kept);
  const int at = static_cast<int>(threadIdx.x);
  if (at < kept) work.keys[part * kept + at] = at < shared.count ? shared.keys[at] : 0;
}

// Of the host.

inline int64_t topk_chunks(int64_t vocab) { return (vocab + kTopkChunk - 1) / kTopkChunk; }

inline TopkWorkspace topk_workspace(void* memory, int64_t rows, int64_t vocab) {
  const int64_t parts = rows * topk_chunks(vocab);
  TopkWorkspace work;
  work.keys = static_cast<uint64_t*>(memory);
  work.maxima = reinterpret_cast<float*>(work.keys + parts * kTopkKept);
  work.sums = work.maxima + parts;
  work.tickets = reinterpret_cast<uint32_t*>(work.sums + parts);
  return work;
}

}  // namespace pyargs::cuda
