// The first layer of each row's own MLP: out[b, j, h] = sum_d bank[user[b], h, d] hidden[b, j, d]. NOT YET RUN ON A
// GPU.
//
// A block has 16 units and some of a row's candidates. The bank is read where it lies, each element once for all of
// them, and never gathered. The warps divide D among themselves; the sums of each are added at the end, always in the
// same order, so a result depends neither on the batch nor on the other candidates.
//
// More than 12 candidates of one 16-bit dtype with the bank go through tensor cores, 64 to a block: the products are
// exact and the sums float32. All others are multiplied and added one by one, 12 to a block. The two round otherwise,
// so that a result depends on whether the row has more than 12 candidates.
#pragma once

#include "../rows.h"
#include "elements.cuh"

namespace pyargs::cuda {

constexpr int kMlpThreads = 256, kMlpWarps = kMlpThreads / 32;
constexpr int kMlpUnits = 16, kMlpCandidates = 12, kMmaCandidates = 64;               // of a block
constexpr int kMlpWarpUnits = 4, kMlpSlices = kMlpWarps * kMlpWarpUnits / kMlpUnits;  // without tensor cores

union MlpShared {
  float candidates[kMlpSlices * kMlpCandidates * kWarpElements];
  float sums[kMlpWarps][kMmaCandidates][kMlpUnits];  // of each part of D
};

// What a block has of a row: `count` candidates from `first` on, kMlpUnits units from `unit` on.
struct MlpPart {
  int64_t row, first, unit, user;
  int count;

  __device__ __forceinline__ int64_t candidate_at(const UserMlpRows& a, int j) const {
    return row * a.hidden_stride_b + (first + j) * a.hidden_stride_k;
  }
  __device__ __forceinline__ int64_t unit_at(const UserMlpRows& a, int64_t h) const {
    return user * a.bank_stride_u + h * a.bank_stride_h;
  }
};

PYARGS_HD bool by_tensor_cores(const UserMlpRows& a, int64_t candidates) {
  return a.bank_dtype != Dtype::kFloat32 && a.hidden_dtype == a.bank_dtype && candidates > kMlpCandidates;
}

// Adds each of the sums over the lanes. A lane gives half of what it has to another one and goes on with the other
// half; 3 are left, of which it returns the place of the first. Two lanes have the same.
constexpr int kMlpWarpSums = kMlpCandidates * kMlpWarpUnits;

__device__ __forceinline__ int add_over_lanes(float (&sums)[kMlpWarpSums]) {
  static_assert(kMlpWarpSums % 16 == 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int first = 0;
#pragma unroll
  for (int step = 2; step <= 16; step *= 2) {
    const int half = kMlpWarpSums / step, distance = 32 / step;
    const bool upper = (lane & distance) != 0;
    first += upper ? half : 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? sums[i + half] : sums[i], given = upper ? sums[i] : sums[i + half];
      sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, distance);
    }
  }
#pragma unroll
  for (int i = 0; i < kMlpWarpSums / 16; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 1);
  return first;
}

// A warp has 4 of the units and every second step of 256 elements of D, a lane 8 of them. The candidates go to shared
// memory as float32, the sums stay in registers.
template <Dtype dtype>
__device__ __forceinline__ void multiply(MlpShared& shared, const UserMlpRows& a, const MlpPart& part) {
  constexpr int kStep = kMlpSlices * kWarpElements;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int slice = warp % kMlpSlices, own = warp / kMlpSlices * kMlpWarpUnits;
  float sums[kMlpWarpSums] = {};  // [candidate, unit]
  for (int64_t start = 0; start < a.dim; start += kStep) {
    const int64_t at = start + slice * kWarpElements + lane * kLaneElements;
    float w[kMlpWarpUnits][kLaneElements];
#pragma unroll
    for (int u = 0; u < kMlpWarpUnits; ++u) {
      const int64_t unit = part.unit + own + u;
      const bool there = unit < a.units;
      const auto found = load_elements<dtype>(a.bank, part.unit_at(a, there ? unit : 0) + at, there ? a.dim - at : 0);
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) w[u][e] = found[e];
    }
    __syncthreads();  // everybody is done with the step before
    for (int i = static_cast<int>(threadIdx.x); i < kMlpCandidates * kStep / kLaneElements; i += kMlpThreads) {
      const int j = i / (kStep / kLaneElements), d = i % (kStep / kLaneElements) * kLaneElements;
      const bool there = j < part.count;
      to_lane(shared.candidates + i / 32 * kWarpElements, i % 32, a.hidden_dtype, a.hidden,
              part.candidate_at(a, there ? j : 0) + start + d, there ? a.dim - start - d : 0);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kMlpCandidates; ++j) {
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) {
        const float x = shared.candidates[j * kStep + slice * kWarpElements + 32 * e + lane];
#pragma unroll
        for (int u = 0; u < kMlpWarpUnits; ++u) sums[j * kMlpWarpUnits + u] += x * w[u][e];
      }
    }
  }
  __syncthreads();  // what follows lies where the candidates did
  const int first = add_over_lanes(sums);
#pragma unroll
  for (int i = 0; i < kMlpWarpSums / 16; ++i) {
    const int at = first + i;
    if (lane % 2 == 0) shared.sums[slice][at / kMlpWarpUnits][own + at % kMlpWarpUnits] = sums[i];
  }
}

// A warp has all units and every eighth step of 32 elements of D, of which a lane loads 8 of a candidate or unit. That
// is in what order the matrices of a product want them if D is counted otherwise, the same for both.
template <Dtype dtype>
__device__ __forceinline__ void multiply_by_tensor_cores(MlpShared& shared, const UserMlpRows& a, const MlpPart& part) {
  constexpr int kStep = 4 * kLaneElements, kRows = kMmaCandidates / 16, kColumns = kMlpUnits / 8;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4, within = lane % 4;
  float sums[kRows][kColumns][4] = {};
  for (int64_t start = warp * kStep; start < a.dim; start += kMlpWarps * kStep) {
    const int64_t at = start + within * kLaneElements;
    Elements<dtype> w[kColumns], x[kRows][2];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t unit = part.unit + 8 * c + group;
      const bool there = unit < a.units;
      w[c] = load_elements<dtype>(a.bank, part.unit_at(a, there ? unit : 0) + at, there ? a.dim - at : 0);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (16 * r >= part.count) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 16 * r + 8 * half + group;
        const bool there = j < part.count;
        x[r][half] = load_elements<dtype>(a.hidden, part.candidate_at(a, there ? j : 0) + at, there ? a.dim - at : 0);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (16 * r >= part.count) continue;
#pragma unroll
      for (int word = 0; word < 4; word += 2) {
        const uint32_t rows[4] = {x[r][0].words[word], x[r][1].words[word], x[r][0].words[word + 1],
                                  x[r][1].words[word + 1]};
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const uint32_t columns[2] = {w[c].words[word], w[c].words[word + 1]};
          multiply_16_8_16<dtype>(sums[r][c], rows, columns);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (16 * r >= part.count) continue;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared.sums[warp][16 * r + 8 * (i / 2) + group][8 * c + 2 * within + i % 2] = sums[r][c][i];
      }
    }
  }
}

// The block's products, for a row of so many candidates. Returns the parts of D whose sums are then in shared memory.
template <Dtype dtype>
__device__ __forceinline__ int multiply_part(MlpShared& shared, const UserMlpRows& a, const MlpPart& part,
                                             int64_t candidates) {
  int parts = kMlpSlices;
  if (by_tensor_cores(a, candidates)) {
    if constexpr (dtype != Dtype::kFloat32) multiply_by_tensor_cores<dtype>(shared, a, part);
    parts = kMlpWarps;
  } else {
    multiply<dtype>(shared, a, part);
  }
  __syncthreads();
  return parts;
}

__device__ __forceinline__ float sum_of_parts(const MlpShared& shared, int parts, int j, int u) {
  float sum = shared.sums[0][j][u];
  for (int i = 1; i < parts; ++i) sum += shared.sums[i][j][u];
  return sum;
}

template <Dtype bank_dtype>
__global__ void __launch_bounds__(kMlpThreads, 2) user_mlp_kernel(UserMlpRows a, int unit_blocks, int groups) {
  PYARGS_SHARED(MlpShared, shared);
  const int per_group = by_tensor_cores(a, a.k) ? kMmaCandidates : kMlpCandidates;
  MlpPart part;
  part.row = blockIdx.x / (unit_blocks * groups);
  part.first = blockIdx.x / unit_blocks % groups * per_group;
  part.unit = static_cast<int64_t>(blockIdx.x % unit_blocks) * kMlpUnits;
  part.count = static_cast<int>(a.k - part.first < per_group ? a.k - part.first : per_group);
  part.user = a.users > 1 ? a.user[part.row] : 0;
  const bool unknown = part.user < 0 || part.user >= a.users;
  const int parts = unknown ? 0 : multiply_part<bank_dtype>(shared, a, part, a.k);
  for (int i = static_cast<int>(threadIdx.x); i < part.count * kMlpUnits; i += kMlpThreads) {
    const int j = i / kMlpUnits, u = i % kMlpUnits;
    if (part.unit + u >= a.units) continue;
    a.out[(part.row * a.k + part.first + j) * a.units + part.unit + u] =
        unknown ? NAN : sum_of_parts(shared, parts, j, u);
  }
}

// Of the host.

inline int64_t mlp_unit_blocks(const UserMlpRows& a) { return (a.units + kMlpUnits - 1) / kMlpUnits; }

inline int64_t mlp_groups(const UserMlpRows& a) {
  const int per_group = by_tensor_cores(a, a.k) ? kMmaCandidates : kMlpCandidates;
  return (a.k + per_group - 1) / per_group;
}

}  // namespace pyargs::cuda
