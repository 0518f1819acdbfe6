// The threads of the extension are torch's, or fewer of them.
#include "torch_threads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "parallel.h"

namespace pyargs {
namespace {

std::atomic<int64_t> most{std::numeric_limits<int64_t>::max()};

}  // namespace

void limit_threads(int64_t threads) { most = std::max<int64_t>(threads, 1); }

int64_t thread_count() { return std::min<int64_t>(torch::stable::get_num_threads(), most); }

void on_threads(int64_t count, void (*work)(const void*, int64_t), const void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(context, i);
  });
}

}  // namespace pyargs
