// Several threads for torch-free code. Baseline only. Whose threads they are is decided where a library is linked:
// csrc/torch_threads.cpp takes torch's, csrc/threads.cpp has some of its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "include/pyargs/threads.h"

namespace pyargs {

// work(context, i) for each i from 0 to count - 1, on the threads, none of which is sure to come: one of them may do
// all. Returns when all is done. `work` must not throw.
void on_threads(int64_t count, void (*work)(const void* context, int64_t i), const void* context);

template <class Work>
void in_parallel(int64_t count, const Work& work) {
  on_threads(count, [](const void* context, int64_t i) { (*static_cast<const Work*>(context))(i); }, &work);
}

// work(begin, end) for ranges of nearly one size that make up [0, count), none smaller than `grain` but the last.
template <class Work>
void in_ranges(int64_t count, int64_t grain, const Work& work) {
  const int64_t most = (count + grain - 1) / grain;
  const int64_t ranges = most > 1 ? std::min(most, thread_count()) : 1;
  if (ranges == 1) return work(0, count);
  const int64_t size = (count + ranges - 1) / ranges;
  in_parallel((count + size - 1) / size, [&](int64_t i) { work(i * size, std::min((i + 1) * size, count)); });
}

}  // namespace pyargs
