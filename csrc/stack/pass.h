// What a pass through a decoder stack is told: packed weights, the cache, the queries, memory to work in. Plain data:
// the files that are compiled for AVX2 or AVX-512 see nothing else.
#pragma once

#include "../kernels/common.h"

namespace pyargs::stack {

constexpr int kPanel = 32;  // outputs of a matrix side by side in memory, and rows are padded to a multiple of it

constexpr int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

constexpr int64_t kGroup = 32;  // of depths that share a scale

// How numbers stand in memory: weights, and what they are multiplied with. Panels of weights are
//   kFloat32   float [depth][kPanel]
//   kBFloat16  in pairs of depth: uint16 [depth / 2][kPanel][2]
//   kInt8      groups of kGroup depths: float16 scale [kPanel], int8 q [kGroup / 4][kPanel][4]; scale * q
//   kInt4      groups: float16 scale [kPanel], float16 offset [kPanel], four bits q [kGroup / 8][kPanel][8]; scale * q
//   +
//              offset, with the first depth in the lowest bits
enum class Format : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

// Bytes of a panel of weights. depth: a multiple of kGroup for kInt8 and kInt4.
constexpr int64_t panel_bytes(Format format, int64_t depth) {
  return format == Format::kFloat32    ? depth * kPanel * 4
         : format == Format::kBFloat16 ? depth * kPanel * 2
         : format == Format::kInt8     ? depth / kGroup * kPanel * (2 + kGroup)
                                       : depth / kGroup * kPanel * (4 + kGroup / 2);
}

// Of a row that is multiplied with int8 weights: scale * value; sum: that of the values.
struct Int8Group {
  float scale;
  int32_t sum;
  int8_t value[kGroup];
};

// Bytes of a row that is multiplied with weights. n: a multiple of kGroup.
constexpr int64_t row_bytes(Format inputs, int64_t n) {
  return inputs == Format::kFloat32    ? n * 4
         : inputs == Format::kBFloat16 ? n * 2
                                       : n / kGroup * static_cast<int64_t>(sizeof(Int8Group));
}

// y = x W^T + bias (+ x A^T B for the queries that want the delta). A panel is read from its first byte to its last.
struct Matrix {
  Format format;
  int64_t columns, depth, rank;  // columns: a multiple of kPanel; depth: of 2 in kBFloat16, of kGroup in kInt8, kInt4
  const void* weight;
  const float *bias, *a, *b;  // [columns] or null; [rank, depth] and panels [rank][kPanel], or null
};

// A matrix in eight bits, enough to tell which few of its outputs can be the largest. Panels of groups of kGroup
// depths: a scale of each column, float [kPanel], and int8 [kGroup / 4][kPanel][4]. What it gives for x differs from
// the matrix's product, as computed, by error * |x| at most.
struct Screen {
  const char* panels;
  const float* error;  // [columns]; infinite where it is not known
};

struct Layer {
  Matrix qkv, o, gate_up, down;  // panels of gate and up take turns
  const float *attention_norm, *mlp_norm;
  const float *q_norm, *k_norm;  // of each head, [head_dim], or null
  float attention_scale, residual_scale;
  bool rotary;  // whether queries and keys are turned by their positions
};

// One token that goes through the stack. It sees the places [0, seen) of its sequence's cache and itself; its keys and
// values are written to `place`. So a prompt's tokens have place == seen, and the branches behind a prefix have one
// `seen` and different places. Its position is `seen`.
struct Query {
  int64_t token, row, place, seen, out;  // row of the cache, row of the states
  bool delta;
};

// Queries [begin, end) of one sequence, which attend together.
struct Group {
  int32_t begin, end;
};

// How many tasks of a worker's share in a phase were taken; and how many of the whole phase are done.
struct alignas(64) Phase {
  int64_t taken, done;
};

struct Pass {
  Format
      inputs;  // of rows that are multiplied with weights: kInt8 ones with kInt8 rows or, as kInt4, with kFloat32 ones
  int64_t dim, heads, kv_heads, head_dim, inner, layers;
  float epsilon, embedding_scale;
  const Layer* layer;
  const float* norm;
  const void* embedding;  // [vocabulary, dim]
  Dtype embedding_dtype;

  // Keys [layers, rows, kv_heads, capacity / kPanel, head_dim, kPanel], values [..., capacity, padded(head_dim)]: both
  // as panels of a matrix, since that is what attention multiplies with.
  float *keys, *values;
  int64_t rows, capacity;
  const float *cosine, *sine;  // [capacity, head_dim / 2]

  const Query* query;
  int64_t queries;
  const Group* group;
  int64_t groups;
  bool any_delta;
  float* states;  // [*, dim]

  // Of all queries: residual stream, normed input of a matrix, q|k|v, input of o and down, x A^T. Of each worker:
  // scratch.
  float *residual, *qkv, *low, *scratch;
  void *x, *y;
  int64_t scratch_size, workers;
  Phase* phase;
};

// logits [rows, vocabulary] = states W^T. With `top` the largest ones only: the others are those of the screen, and
// smaller than these.
struct Projection {
  Format inputs;
  Matrix matrix;
  Screen screen;
  int64_t rows, dim, vocabulary, top, workers;
  const float* states;
  float* logits;
  void* x;
  float *floats, *length;  // for the screen: x, if it is not in float32, and its length
  float* best;             // [workers, rows, top], minus infinity at first
  Phase* phase;
};

constexpr int64_t kGroupBytes = kPanel * (4 + kGroup);  // of a screen
constexpr int64_t kTop = 64;                            // the most outputs that are looked for with a screen, and
constexpr int64_t kScreenRows = 8;    // the most rows: for more, computing takes as long as reading the whole matrix
constexpr int64_t kScreenRows16 = 2;  // the same in bfloat16
constexpr float kShortest = 0x1p-40f, kLongest = 0x1p60f;  // of states and columns: what is lost below normal numbers
                                                           // is then nothing beside the rounding of their products

constexpr int64_t kTaskRows = 48;          // of a matrix product, and
constexpr int64_t kTaskDepth = 1024;       // of a panel that stays in the second-level cache for all of them
constexpr int kPhasesPerLayer = 13;        // at most
constexpr int64_t kAttentionRows = 24;     // of queries times heads in a group: two blocks of the AVX-512 kernel
constexpr int64_t kAttentionPlaces = 512;  // of keys at a time
constexpr int64_t kQueriesPerPass = 512;   // longer prompts go in parts, which bounds the memory to work in

}  // namespace pyargs::stack
