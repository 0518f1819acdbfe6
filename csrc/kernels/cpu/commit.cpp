// commit: the chosen branch becomes the prefix's next token in the states of all layers. See pyargs/ops/commit.py for
// the contract.

#include "launch.h"

namespace pyargs {
namespace PYARGS_CPU {

// Copies of a few hundred bytes: memcpy chooses by itself for this CPU.
void commit(const CommitRows& rows) {
  for (int64_t i = 0; i < rows.batch * rows.heads; ++i) {
    const int64_t b = i / rows.heads, h = i % rows.heads, slot = rows.slot[b];
    if (slot <= 0) continue;
    const int64_t to = b * rows.stride_b + h * rows.stride_h + rows.length[b] * rows.stride_t;
    for (int64_t t = 0; t < rows.count; ++t) {
      char* states = static_cast<char*>(rows.states[t]);
      std::memcpy(states + to, states + to + slot * rows.stride_t, rows.bytes);
    }
  }
}

}  // namespace PYARGS_CPU
}  // namespace pyargs
