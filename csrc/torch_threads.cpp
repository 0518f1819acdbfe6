// The threads of the extension are torch's.
#include <torch/csrc/stable/ops.h>

#include "parallel.h"

namespace pyargs {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void on_threads(int64_t count, void (*work)(const void*, int64_t), const void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(context, i);
  });
}

}  // namespace pyargs
