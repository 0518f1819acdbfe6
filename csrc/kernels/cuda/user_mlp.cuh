// The first layer of each row's own MLP: out[b, j, h] = sum_d bank[user[b], h, d] hidden[b, j, d]. NOT YET RUN ON A
// GPU.
//
// A block has 12 candidates of a row and 32 units, a warp 4 of the units, a lane every 32nd group of 8 elements of D.
// The candidates go to shared memory as float32, a step of 256 elements at a time; the bank is read where it lies, each
// element once for 12 candidates, and never gathered. Sums stay in registers and are added over the lanes at the end,
// always in the same order, so a result depends neither on the batch nor on the other candidates. Plain multiply-adds:
// for more than some 16 candidates tensor cores would be faster (to be measured first).
#pragma once

#include "../rows.h"
#include "elements.cuh"

namespace pyargs::cuda {

constexpr int kMlpThreads = 256, kMlpWarpUnits = 4, kMlpUnits = kMlpThreads / 32 * kMlpWarpUnits, kMlpCandidates = 12;

struct MlpShared {
  float candidates[kMlpCandidates * kStepFloats];
};

template <Dtype bank_dtype>
__global__ void __launch_bounds__(kMlpThreads, 2) user_mlp_kernel(UserMlpRows a, int unit_blocks, int groups) {
  PYARGS_SHARED(MlpShared, shared);
  const int64_t row = blockIdx.x / (unit_blocks * groups);
  const int part = static_cast<int>(blockIdx.x % (unit_blocks * groups));
  const int first = part / unit_blocks * kMlpCandidates;  // candidate
  const int count = static_cast<int>(a.k - first < kMlpCandidates ? a.k - first : kMlpCandidates);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t unit = static_cast<int64_t>(part % unit_blocks) * kMlpUnits + warp * kMlpWarpUnits;
  const int64_t user = a.users > 1 ? a.user[row] : 0;
  const bool unknown = user < 0 || user >= a.users;

  float sums[kMlpCandidates][kMlpWarpUnits] = {};
  for (int64_t start = 0; start < a.dim && !unknown; start += kWarpElements) {
    const int n = static_cast<int>(a.dim - start < kWarpElements ? a.dim - start : kWarpElements);
    float w[kMlpWarpUnits][kLaneElements];
#pragma unroll
    for (int u = 0; u < kMlpWarpUnits; ++u) {
      const bool there = unit + u < a.units;
      const int64_t at =
          user * a.bank_stride_u + (there ? unit + u : 0) * a.bank_stride_h + start + lane * kLaneElements;
      load_elements<bank_dtype>(a.bank, at, there ? n - lane * kLaneElements : 0, w[u]);
    }
    __syncthreads();  // everybody is done with the step before
    for (int i = static_cast<int>(threadIdx.x); i < kMlpCandidates * kWarpElements; i += kMlpThreads) {
      const int j = i / kWarpElements, d = i % kWarpElements;
      const int64_t at = row * a.hidden_stride_b + (first + j) * a.hidden_stride_k + start + d;
      shared.candidates[j * kStepFloats + place(d)] = j < count && d < n ? element(a.hidden_dtype, a.hidden, at) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kMlpCandidates; ++j) {
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) {
        const float x = shared.candidates[j * kStepFloats + e * kLanePitch + lane];
#pragma unroll
        for (int u = 0; u < kMlpWarpUnits; ++u) sums[j][u] += x * w[u][e];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kMlpCandidates; ++j) {
#pragma unroll
    for (int u = 0; u < kMlpWarpUnits; ++u) {
      float sum = sums[j][u];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (lane == 0 && j < count && unit + u < a.units) {
        a.out[(row * a.k + first + j) * a.units + unit + u] = unknown ? NAN : sum;
      }
    }
  }
}

}  // namespace pyargs::cuda
