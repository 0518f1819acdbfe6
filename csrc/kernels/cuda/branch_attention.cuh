// Attention of k branches behind each row's prefix: query j of row b sees the keys 0 .. length[b] and the key length[b]
// + j. Lengths are read on the device, and there is no mask. NOT YET RUN ON A GPU.
//
// A block has 16 queries of a row's group (the k queries of all query heads that share a head of keys, by head and
// branch) and a part of the row's prefix; its four warps take 16 keys each in turn. So a prefix is read from memory
// once for all queries of a group: their blocks start side by side and find it in the second-level cache. Products are
// those of tensor cores, of bfloat16 or float16; a float32 is the sum of three bfloat16. Keys and values go from memory
// to the lane that multiplies them, 16 bytes at a time: a product stays the same when elements change places in both
// factors, so a lane takes eight in a row.
//
// The prefix is cut into at most 16 parts by its own length alone, of whole tiles of 64 keys. A block leaves what it
// found in its part; the one that finishes last (it takes the last ticket, nobody waits) merges the parts in order. A
// row's result depends on the row alone: not on the batch, the room behind its prefix, or the number of its branches.
#pragma once

#include "../rows.h"
#include "elements.cuh"
#include "topk.cuh"

namespace pyargs::cuda {

constexpr int kBranchQueries = 16, kBranchKeys = 16, kBranchWarps = 4, kBranchThreads = 32 * kBranchWarps;
constexpr int kBranchTile = kBranchKeys * kBranchWarps, kBranchParts = 16;
constexpr int kBranchWidth = 64;  // elements of a head that are computed together: 8 of each of 8 lanes

struct BranchWorkspace {
  float* sums;        // [units, parts, 16, width of a head]: of 2^(score - max) value
  float* maxima;      // [units, parts, 16]
  float* totals;      // [units, parts, 16]: of 2^(score - max)
  uint32_t* tickets;  // [units], zero before and after
};

template <Dtype dtype>
constexpr int kTerms = dtype == Dtype::kFloat32 ? 3 : 1;

// Two numbers of 16 bits, or each term of two float32: 8 of its 24 bits, so that the three sum to it exactly.
template <Dtype dtype>
struct Pair {
  uint32_t terms[kTerms<dtype>];

  __device__ __forceinline__ void set(uint32_t low, uint32_t high) {
    terms[0] = low | high << 16;
    if constexpr (dtype == Dtype::kFloat32) {
      const bool finite = (low & 0x7f800000u) != 0x7f800000u, other_finite = (high & 0x7f800000u) != 0x7f800000u;
      for (uint32_t& term : terms) {
        term = low >> 16 | (high & 0xffff0000u);
        low = finite ? bits_of(float_of(low) - float_of(low & 0xffff0000u)) : 0;
        high = other_finite ? bits_of(float_of(high) - float_of(high & 0xffff0000u)) : 0;
      }
    }
  }
  __device__ __forceinline__ void round(float low, float high) {
    if constexpr (dtype == Dtype::kFloat32) {
      set(bits_of(low), bits_of(high));
    } else {
      terms[0] = rounded_pair<dtype>(low, high);
    }
  }
};

// c += a b of a warp's tiles [16, 16] and [16, 8], with all products of terms that a float32 can feel, smallest first.
template <Dtype dtype>
__device__ __forceinline__ void multiply_pairs(float (&c)[4], const Pair<dtype> (&a)[4], const Pair<dtype> (&b)[2]) {
#pragma unroll
  for (int both = kTerms<dtype> - 1; both >= 0; --both) {
#pragma unroll
    for (int i = both; i >= 0; --i) {
      const int j = both - i;
      const uint32_t rows[4] = {a[0].terms[i], a[1].terms[i], a[2].terms[i], a[3].terms[i]};
      const uint32_t columns[2] = {b[0].terms[j], b[1].terms[j]};
      multiply_16_8_16<dtype == Dtype::kFloat16 ? dtype : Dtype::kBFloat16>(c, rows, columns);
    }
  }
}

template <Dtype dtype>
struct alignas(16) QueryTile {
  Pair<dtype> pairs[4];  // of elements 0, 1 of a lane's first query and its second, and of elements 8, 9
};

template <Dtype dtype, int widths>
struct BranchShared {
  QueryTile<dtype> queries[widths * 4][32];  // of 16 elements of a head
  float sums[widths * 32][32];               // of the warps that are done, as lanes have them
  float maxima[kBranchWarps][kBranchQueries], totals[kBranchWarps][kBranchQueries];
  bool last;
};

// What a lane has found for its two queries, group and group + 8 of the block, where group is lane / 4: the largest
// score, the total of 2^(score - max) over its own keys, and the sums of 2^(score - max) value. Of width w, element 16
// (lane % 4) + 8 half + i of the first query is sums[8 w + i][half], that of the second sums[8 w + i][2 + half].
template <int widths>
struct Found {
  float max[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[widths * 8][4] = {};
};

// What scores are taken from before the power, so that -inf has no weight and NaN stays.
__device__ __forceinline__ float base_of(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float max_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// A query's own key, behind the prefix, where the others' stand too: each is read by its own query alone.
template <Dtype dtype, int widths>
__device__ __forceinline__ void see_own_key(const BranchRows& a, int64_t query_at, int64_t key_at, int64_t value_at,
                                            int which, float scale, Found<widths>& found) {
  const int first = static_cast<int>(threadIdx.x) % 4 * 16;
  float score = 0.0f;
#pragma unroll
  for (int i = 0; i < widths * 2; ++i) {
    const int at = i / 2 * kBranchWidth + first + i % 2 * 8;
    const auto query = load_aligned<dtype>(a.query, query_at + at, at < a.dim);
    const auto key = load_aligned<dtype>(a.key, key_at + at, at < a.dim);
#pragma unroll
    for (int e = 0; e < 8; ++e) score += query[e] * key[e];
  }
  score = sum_of_four(score) * scale;
  const float max = fmaxf(score, -INFINITY), weight = fast_exp2(score - base_of(max));
  found.max[which] = max;
  found.total[which] = first == 0 ? weight : 0.0f;
#pragma unroll
  for (int i = 0; i < widths * 2; ++i) {
    const int at = i / 2 * kBranchWidth + first + i % 2 * 8;
    const auto value = load_aligned<dtype>(a.value, value_at + at, at < a.dim);
#pragma unroll
    for (int e = 0; e < 8; ++e) found.sums[i / 2 * 8 + e][2 * which + i % 2] = weight * value[e];
  }
}

// The lane's four of 16 values, of which `count` are there.
template <Dtype dtype>
__device__ __forceinline__ void load_values(const BranchRows& a, int64_t value_at, int count, int width,
                                            Elements<dtype> (&values)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, at = width * kBranchWidth + lane / 4 * 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = lane % 4 * 2 + i % 2 + i / 2 * 8;
    values[i] = load_aligned<dtype>(a.value, value_at + key * a.value_stride_t + at, key < count && at < a.dim);
  }
}

// The first `count` of 16 keys of the prefix, at key_at and value_at.
template <Dtype dtype, int widths>
__device__ __forceinline__ void see_keys(const BranchRows& a, const QueryTile<dtype> (*queries)[32], int64_t key_at,
                                         int64_t value_at, int count, float scale, Found<widths>& found) {
  // Values are on their way while scores are computed, where the registers hold them.
  constexpr bool kAhead = widths * kTerms<dtype> <= 2;
  [[maybe_unused]] constexpr int kUnrolled = widths < 4 ? widths * 2 : 1;
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, four = lane % 4;
  Elements<dtype> values[kAhead ? widths : 1][4];
  if constexpr (kAhead) {
#pragma unroll
    for (int width = 0; width < widths; ++width) load_values(a, value_at, count, width, values[width]);
  }
  float scores[2][4] = {};
#pragma unroll kUnrolled
  for (int i = 0; i < widths * 2; ++i) {
    const int at = i * 32 + 8 * four;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = 8 * half + group;
      const auto key = load_aligned<dtype>(a.key, key_at + own * a.key_stride_t + at, own < count && at < a.dim);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        Pair<dtype> pairs[2];
#pragma unroll
        for (int p = 0; p < 2; ++p) pairs[p].set(key.bits(4 * step + 2 * p), key.bits(4 * step + 2 * p + 1));
        multiply_pairs(scores[half], queries[2 * i + step][lane].pairs, pairs);
      }
    }
  }
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float max = found.max[which];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[i / 2][2 * which + i % 2];
      score = 8 * (i / 2) + 2 * four + i % 2 < count ? score * scale : -INFINITY;
      max = fmaxf(max, score);
    }
    max = max_of_four(max);
    const float base = base_of(max), before = fast_exp2(found.max[which] - base);
    found.max[which] = max;
    found.total[which] *= before;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[i / 2][2 * which + i % 2];
      score = fast_exp2(score - base);
      found.total[which] += score;
    }
#pragma unroll
    for (int i = 0; i < widths * 8; ++i) found.sums[i][2 * which] *= before, found.sums[i][2 * which + 1] *= before;
  }
  Pair<dtype> weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) weights[i].round(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
#pragma unroll
  for (int width = 0; width < widths; ++width) {
    if constexpr (!kAhead) load_values(a, value_at, count, width, values[0]);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const auto& rows = values[kAhead ? width : 0];
      Pair<dtype> pairs[2];
#pragma unroll
      for (int p = 0; p < 2; ++p) pairs[p].set(rows[2 * p].bits(e), rows[2 * p + 1].bits(e));
      multiply_pairs(found.sums[width * 8 + e], weights, pairs);
    }
  }
}

// Eight elements of the result.
template <Dtype dtype>
__device__ __forceinline__ void write_eight(void* out, int64_t at, const float (&x)[8]) {
  if constexpr (dtype == Dtype::kFloat32) {
    uint4* to = reinterpret_cast<uint4*>(static_cast<float*>(out) + at);
    to[0] = make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
    to[1] = make_uint4(bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7]));
  } else {
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + at) =
        make_uint4(rounded_pair<dtype>(x[0], x[1]), rounded_pair<dtype>(x[2], x[3]), rounded_pair<dtype>(x[4], x[5]),
                   rounded_pair<dtype>(x[6], x[7]));
  }
}

template <Dtype dtype, int widths>
__global__ void __launch_bounds__(kBranchThreads, widths* kTerms<dtype> > 3 ? 2 : 3)
    branch_attention_kernel(BranchRows a, BranchWorkspace work) {
  using Shared = BranchShared<dtype, widths>;
  PYARGS_SHARED(Shared, shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4;
  const int tiles = (a.k * a.groups + kBranchQueries - 1) / kBranchQueries;
  const int unit = static_cast<int>(blockIdx.x), tile = unit % tiles;
  const int row = unit / tiles / a.heads, head = unit / tiles % a.heads;
  const bool known = a.length[row] >= 0 && a.length[row] <= a.places - a.k;
  const int length = known ? static_cast<int>(a.length[row]) : 0;
  const int key_tiles = (length + kBranchTile - 1) / kBranchTile;
  const int in_part = (key_tiles + kBranchParts - 1) / kBranchParts * kBranchTile;  // keys
  const int part = static_cast<int>(blockIdx.y), parts = length > in_part ? (length + in_part - 1) / in_part : 1;
  if (part >= parts) return;
  const int begin = part * in_part, end = length < begin + in_part ? length : begin + in_part;

  // The lane's two queries: of which head of the group, and which branch.
  bool there[2];
  int own_head[2], branch[2];
  int64_t query_at[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = tile * kBranchQueries + group + 8 * i;
    there[i] = query < a.k * a.groups;
    own_head[i] = head * a.groups + query / a.k;
    branch[i] = query % a.k;
    query_at[i] = there[i] ? row * a.query_stride_b + own_head[i] * a.query_stride_h + branch[i] * a.query_stride_k : 0;
  }
  for (int i = warp; i < widths * 2; i += kBranchWarps) {
    const int at = i * 32 + 8 * (lane % 4);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const auto query = load_aligned<dtype>(a.query, query_at[which] + at, there[which] && at < a.dim);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        shared.queries[2 * i + p / 2][lane].pairs[p % 2 * 2 + which].set(query.bits(2 * p), query.bits(2 * p + 1));
      }
    }
  }
  __syncthreads();

  const int64_t key_at = row * a.key_stride_b + head * a.key_stride_h;
  const int64_t value_at = row * a.value_stride_b + head * a.value_stride_h;
  const float scale = a.scale * 1.44269504f;  // powers of 2
  Found<widths> found;
  if (part == 0 && warp == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t own = length + (there[i] ? branch[i] : 0);
      see_own_key<dtype>(a, query_at[i], key_at + own * a.key_stride_t, value_at + own * a.value_stride_t, i, scale,
                         found);
    }
  }
  for (int first = begin + warp * kBranchKeys; first < end; first += kBranchTile) {
    const int count = end - first < kBranchKeys ? end - first : kBranchKeys;
    see_keys<dtype>(a, shared.queries, key_at + first * a.key_stride_t, value_at + first * a.value_stride_t, count,
                    scale, found);
  }

  // The warps' sums become one, in order.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = sum_of_four(found.total[i]);
    if (lane % 4 == 0) {
      shared.maxima[warp][group + 8 * i] = found.max[i];
      shared.totals[warp][group + 8 * i] = total;
    }
  }
  __syncthreads();
  float max[2], total[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    max[i] = -INFINITY;
#pragma unroll
    for (int w = 0; w < kBranchWarps; ++w) max[i] = fmaxf(max[i], shared.maxima[w][group + 8 * i]);
    const float base = base_of(max[i]), own = fast_exp2(found.max[i] - base);
#pragma unroll
    for (int w = 0; w < kBranchWarps; ++w) {
      total[i] += shared.totals[w][group + 8 * i] * fast_exp2(shared.maxima[w][group + 8 * i] - base);
    }
#pragma unroll
    for (int e = 0; e < widths * 8; ++e) found.sums[e][2 * i] *= own, found.sums[e][2 * i + 1] *= own;
  }
#pragma unroll
  for (int w = 0; w < kBranchWarps; ++w) {
    if (warp == w) {
#pragma unroll
      for (int e = 0; e < widths * 32; ++e) {
        shared.sums[e][lane] = found.sums[e / 4][e % 4] + (w == 0 ? 0.0f : shared.sums[e][lane]);
      }
    }
    __syncthreads();
  }

  // Two warps have the block's first eight queries, two the others; each has half of the elements.
  const int which = warp / 2, half = warp % 2, at = 16 * (lane % 4) + 8 * half;
  float top = which ? max[1] : max[0], sum = which ? total[1] : total[0];
  float result[widths][8];
#pragma unroll
  for (int i = 0; i < widths * 8; ++i) result[i / 8][i % 8] = shared.sums[4 * i + 2 * which + half][lane];
  if (parts > 1) {
    constexpr int kWidth = widths * kBranchWidth;
    const int64_t first = (static_cast<int64_t>(unit) * gridDim.y) * kBranchQueries + group + 8 * which;
    const int64_t place = first + part * kBranchQueries;
    if (at == 0) {
      work.maxima[place] = top;
      work.totals[place] = sum;
    }
#pragma unroll
    for (int width = 0; width < widths; ++width) {
      write_eight<Dtype::kFloat32>(work.sums, place * kWidth + width * kBranchWidth + at, result[width]);
    }
    if (!is_last(shared, work.tickets + unit, static_cast<uint32_t>(parts))) return;
    top = -INFINITY;
    for (int p = 0; p < parts; ++p) top = fmaxf(top, load_fresh(work.maxima + first + p * kBranchQueries));
    const float base = base_of(top);
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < widths * 8; ++i) result[i / 8][i % 8] = 0.0f;
#pragma unroll 2
    for (int p = 0; p < parts; ++p) {
      const int64_t there = first + p * kBranchQueries;
      const float weight = fast_exp2(load_fresh(work.maxima + there) - base);
      sum += load_fresh(work.totals + there) * weight;
      const uint4* sums = reinterpret_cast<const uint4*>(work.sums + there * kWidth + at);
#pragma unroll
      for (int width = 0; width < widths; ++width) {
        const uint4 one = load_fresh(sums + width * kBranchWidth / 4),
                    two = load_fresh(sums + width * kBranchWidth / 4 + 1);
        const uint32_t words[8] = {one.x, one.y, one.z, one.w, two.x, two.y, two.z, two.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) result[width][e] += weight * float_of(words[e]);
      }
    }
  }
  if (which ? !there[1] : !there[0]) return;
  const int of_head = which ? own_head[1] : own_head[0], of_branch = which ? branch[1] : branch[0];
  const int64_t out_at = ((static_cast<int64_t>(row) * a.k + of_branch) * a.heads * a.groups + of_head) * a.dim + at;
  const float inverse = known ? 1.0f / sum : NAN;
#pragma unroll
  for (int width = 0; width < widths; ++width) {
    if (width * kBranchWidth + at >= a.dim) break;
#pragma unroll
    for (int e = 0; e < 8; ++e) result[width][e] *= inverse;
    write_eight<dtype>(a.out, out_at + width * kBranchWidth, result[width]);
  }
}

// Of the host.

inline int64_t branch_units(const BranchRows& a) {
  return a.batch * a.heads * ((static_cast<int64_t>(a.k) * a.groups + kBranchQueries - 1) / kBranchQueries);
}

inline int64_t branch_parts(const BranchRows& a) {  // the most of any row
  const int64_t tiles = (static_cast<int64_t>(a.places) + kBranchTile - 1) / kBranchTile;
  return tiles < kBranchParts ? tiles : kBranchParts;
}

inline BranchWorkspace branch_workspace(void* memory, const BranchRows& a) {
  const int64_t queries = branch_units(a) * branch_parts(a) * kBranchQueries;
  const int64_t width = (a.dim + kBranchWidth - 1) / kBranchWidth;
  BranchWorkspace work;
  work.sums = static_cast<float*>(memory);
  work.maxima = work.sums + queries * (width > 2 ? 4 : width) * kBranchWidth;
  work.totals = work.maxima + queries;
  work.tickets = reinterpret_cast<uint32_t*>(work.totals + queries);
  return work;
}

}  // namespace pyargs::cuda
