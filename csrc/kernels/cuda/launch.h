// Host functions of the .cu files, for csrc/ops. No torch: pointers, sizes and a stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../rows.h"

namespace pyargs::cuda {

// Bytes of device memory that topk_logprobs needs beside its results.
size_t topk_workspace_bytes(int64_t batch, int64_t vocab);

// Queues the kernel on `stream` of `device`; returns null or the text of an error.
const char* topk_logprobs(const void* logits, Dtype dtype, int64_t batch, int64_t vocab, int64_t row_stride, int k,
                          float* logprobs, int64_t* ids, float* logsumexp, void* workspace, int device, void* stream);

// `workspace`: topk_workspace_bytes(2 * batch, V), for policy and rewards.
const char* tokenwise_select(const TokenwiseRows& rows, int64_t batch, void* workspace, int device, void* stream);

// Both at once: the features are what comes out of `mlp`, and are not stored. k <= 64.
size_t user_mlp_select_workspace_bytes(const UserMlpRows& mlp, int64_t batch);
const char* user_mlp_select(const ScoreRows& rows, const UserMlpRows& mlp, int64_t batch, void* workspace, int device,
                            void* stream);

// These need no workspace. k <= 64 for score_select.
const char* score_select(const ScoreRows& rows, int64_t batch, int device, void* stream);
const char* user_mlp(const UserMlpRows& rows, int64_t batch, int device, void* stream);
const char* commit(const CommitRows& rows, int64_t capacity, int device, void* stream);

// `workspace`: branch_workspace_bytes, at a multiple of 16 bytes. Heads of keys, values and queries start at multiples
// of 16 bytes, and have at most 256 elements.
size_t branch_workspace_bytes(const BranchRows& rows);
const char* branch_attention(const BranchRows& rows, void* workspace, int device, void* stream);

}  // namespace pyargs::cuda
