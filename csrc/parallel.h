// Several threads for torch-free code. Baseline only. Whose threads they are is decided where a library is linked:
// csrc/torch_threads.cpp takes torch's.
#pragma once

#include <cstdint>

namespace pyargs {

// How many threads there are.
int64_t thread_count();

// work(context, i) for each i from 0 to count - 1, on the threads, none of which is sure to come: one of them may do
// all. Returns when all is done. `work` must not throw.
void on_threads(int64_t count, void (*work)(const void* context, int64_t i), const void* context);

template <class Work>
void in_parallel(int64_t count, const Work& work) {
  on_threads(count, [](const void* context, int64_t i) { (*static_cast<const Work*>(context))(i); }, &work);
}

}  // namespace pyargs
