// The reward of a row's candidates by its user's own MLP, combination and choice: user_mlp and score_select in one
// launch. NOT YET RUN ON A GPU.
//
// Blocks go over units and candidates as user_mlp.cuh says; what the first layer computes never leaves them. Each
// leaves its units' part of the candidates' rewards in the workspace, and the block that finishes last of its row adds
// the parts in order and chooses. A row's result depends neither on the batch nor on its other candidates, but for the
// rounding of user_mlp.cuh, of which the row's own count decides.
#pragma once

#include "last_block.cuh"
#include "rewards.cuh"
#include "user_mlp.cuh"

namespace pyargs::cuda {

struct MlpSelectWorkspace {
  float* parts;       // [batch, unit blocks, k]
  uint32_t* tickets;  // [batch], zero before and after
};

struct MlpSelectShared {
  MlpShared mlp;
  RewardsShared rewards;
  bool last;
};

// A block's part of its candidates' rewards, into the workspace.
__device__ __forceinline__ void leave_rewards(const MlpShared& shared, int parts, const ScoreRows& a,
                                              const UserMlpRows& mlp, const MlpPart& part, const ScoreUser& user,
                                              float* out) {
  // A warp has two candidates.
  for (int i = static_cast<int>(threadIdx.x); i < (part.count + 1) / 2 * 32; i += kMlpThreads) {
    const int j = i / kMlpUnits, u = i % kMlpUnits;
    const int64_t unit = part.unit + u;
    float sum = 0.0f;
    if (j < part.count && unit < mlp.units) {
      const float bias = a.bias ? element(a.bias_dtype, a.bias, user.bias_row * a.bias_stride + unit) : 0.0f;
      sum = element(a.weight_dtype, a.weight, user.weight_row * a.weight_stride + unit) *
            activated(a.activation, sum_of_parts(shared, parts, j, u) + bias);
    }
#pragma unroll
    for (int distance = kMlpUnits / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (u == 0 && j < part.count) out[part.first + j] = sum;
  }
}

template <Dtype bank_dtype>
__global__ void __launch_bounds__(kMlpThreads, 2)
    user_mlp_select_kernel(ScoreRows a, UserMlpRows mlp, int unit_blocks, int groups, MlpSelectWorkspace work) {
  PYARGS_SHARED(MlpSelectShared, shared);
  const int blocks = unit_blocks * groups, block = static_cast<int>(blockIdx.x) % blocks;
  MlpPart part;
  part.row = blockIdx.x / blocks;
  if (a.finished[part.row]) {
    if (block == 0) pad_row(a, part.row, static_cast<int>(threadIdx.x), kMlpThreads);
    return;
  }
  const bool unknown = user_of(a, part.row, mlp.users).unknown;  // the rest is read again: registers are few meanwhile
  const int count = count_by_block(shared.rewards, a, part.row);
  // One group has all candidates where tensor cores may be used.
  const int per_group = groups == 1 ? kMmaCandidates : kMlpCandidates;
  part.first = block / unit_blocks * per_group;
  part.unit = static_cast<int64_t>(block % unit_blocks) * kMlpUnits;
  part.user = mlp.users > 1 && !unknown ? a.user[part.row] : 0;
  part.count = static_cast<int>(count - part.first < per_group ? count - part.first : per_group);
  if (part.count > 0 && !unknown) {
    const int slices = multiply_part<bank_dtype>(shared.mlp, mlp, part, count);
    float* own = work.parts + (part.row * unit_blocks + block % unit_blocks) * a.k;
    leave_rewards(shared.mlp, slices, a, mlp, part, user_of(a, part.row, mlp.users), own);
  }
  if (!is_last(shared, work.tickets + part.row, static_cast<uint32_t>(blocks))) return;
  const float* parts = work.parts + part.row * unit_blocks * a.k;
  for (int j = static_cast<int>(threadIdx.x); j < a.k; j += kMlpThreads) {
    float sum = 0.0f;
    for (int i = 0; i < unit_blocks && j < count && !unknown; ++i) sum += load_fresh(parts + i * a.k + j);
    set_reward(shared.rewards, a, part.row, j, count, unknown, sum);
  }
  choose_of_rewards(shared.rewards, a, part.row, count, unknown);
}

}  // namespace pyargs::cuda
