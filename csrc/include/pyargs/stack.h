// A decoder stack of the Llama family on a CPU: packed weights, and passes over the cached keys and values of several
// sequences. pyargs/lm/stack/run.py says what it is for.
//
// A token's state does not depend on what else is in its pass: it is the same, bit by bit, in a prompt, as an ordinary
// step, among branches, and for any number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "view.h"

namespace pyargs {

// Keys and values of `rows` sequences, in float32. A row has a prefix of length[row] tokens.
//
// Errors are std::runtime_error, or std::bad_alloc, and leave the cache as it was. Any thread may call any function;
// but a pass writes to the keys and values of its rows, so that nobody else may use these rows meanwhile.
class Cache {
 public:
  // cosine, sine: float32 [places, head_dim / 2], copied: the rotary table of the most tokens that a row may have,
  // branches included.
  Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t rows, const View& cosine, const View& sine);
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache();

  // The branch in column slots[i] of the last pass becomes the next token of cache row rows[i] (or i); a negative slot
  // leaves its row alone. slots: int64 [count]; rows: int64 [count], none twice.
  void commit(const View& slots, const std::optional<View>& rows = std::nullopt);

  // Row `to` becomes the first `tokens` of row `from` of this cache or of another one of the same model.
  void copy(const Cache& other, int64_t to, int64_t from, int64_t tokens);

  int64_t rows() const;
  std::vector<int64_t> length() const;
  // Of each row; what is cut off is forgotten.
  void set_length(std::vector<int64_t> length);

 private:
  friend class Stack;
  struct State;
  std::unique_ptr<State> state_;
};

// A packed decoder. Packing comes first: every layer's matrices and norms, and the embedding.
//
// Errors are std::runtime_error, std::out_of_range (a layer) or std::bad_alloc, and a pass that failed leaves no trace.
// Any thread may call `forward` and `logits`, which wait for each other; packing has the stack for itself.
class Stack {
 public:
  // Where a weight goes: row n of `weight`, float32 or bfloat16 [outputs, inputs], or with `block` uint8 [outputs,
  // bytes], the blocks "Q4_0", "Q4_1" or "Q8_0" of a GGUF file, becomes column offset + n of a layer's matrix "qkv",
  // "o", "gate_up" or "down", or of "head"; `alternate`: with every second panel of 32 columns left out, for gate
  // (offset 0) and up (offset 32) take turns.
  struct Part {
    std::string matrix;
    int64_t offset;
    bool alternate;
    View weight;
    std::string block = "";
  };

  // dtype: what weights are multiplied with: "float32", "bfloat16", or "int8", rounded in groups of 32. inner: of the
  // MLP. unembedding: whether there is a "head". epsilon: of the RMS norms. formats: how the weights are packed, of the
  // matrices qkv, o, gate_up and down of each layer, and of the head; all as `dtype` where it is empty. With "float32"
  // also "int8" (for blocks of Q8_0) and "int4" (for Q4_0 and Q4_1).
  Stack(const std::string& dtype, int64_t dim, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t inner,
        int64_t layers, int64_t vocabulary, bool unembedding, float epsilon,
        const std::vector<std::string>& formats = {});
  ~Stack();

  // A second stack on the same weights, for a delta of its own.
  std::unique_ptr<Stack> twin() const;

  // The weights are copied.
  void pack(int64_t layer, const std::vector<Part>& parts);
  // values: float32 [columns], columns padded to a multiple of 32; copied.
  void bias(int64_t layer, const std::string& matrix, const View& values);
  // A low-rank addition for the rows of a pass that want it; copied. a: float32 [rank, inputs]; b: float32
  // [columns / 32, rank, 32].
  void delta(int64_t layer, const std::string& matrix, const View& a, const View& b);
  // Both float32 [dim]; copied.
  void norms(int64_t layer, const View& attention, const View& mlp);
  // Of each head's queries and keys, before they are turned, where a layer has them. Both float32 [head_dim]; copied.
  void head_norms(int64_t layer, const View& queries, const View& keys);
  // scale: of the scores, 1 / sqrt(head_dim) by default. residual_scale: of what attention and MLP add, 1 by default.
  // rotary: whether queries and keys are turned by their positions, true by default.
  void attention(int64_t layer, float scale, float residual_scale, bool rotary);
  // embedding: float32 or bfloat16 [vocabulary, dim], not copied: it must live as long as the stack and its twins,
  // which keep `owner` until then. norm: float32 [dim], the last one; copied. scale: of what a token has of it.
  void embedding(const View& embedding, const View& norm, std::shared_ptr<const void> owner = nullptr,
                 float scale = 1.0f);

  // Last-layer states, normed, of tokens behind what the cache holds.
  // ids: int64 [B, n]. mask: bool [B, n], false where there is no token: its state is left alone. rows: int64 [B], the
  // row of the cache that each row of ids continues, none twice; the first B by default. delta: bool [B], whether the
  // row wants the delta; nobody does by default. states: float32 [B, n, dim], written to.
  // branches: false: the tokens of a row follow each other and become part of its prefix. true: each sees the prefix
  // and itself, as its next token; Cache::commit then says which stays, and the others are written over.
  void forward(Cache& cache, const View& ids, const std::optional<View>& mask, const std::optional<View>& rows,
               const std::optional<View>& delta, bool branches, const View& states);

  // The output layer. states: float32 [rows, dim]. logits: float32 [rows, n], written to: those of the first n tokens.
  // top: how many of a row's largest logits must be exact (0: all); the others may be estimates, smaller than these.
  void logits(const View& states, int64_t top, const View& logits);

 private:
  struct State;
  explicit Stack(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace pyargs
