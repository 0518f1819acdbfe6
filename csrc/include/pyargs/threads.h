// The threads that kernels and stacks work on: one team in a process, made where it is first needed. Who finds it busy
// does his work alone.
#pragma once

#include <cstdint>

namespace pyargs {

// How many threads work on a call, the caller's included: at first as many as the machine has.
int64_t thread_count();

// At least 1; std::invalid_argument otherwise. Not while another thread computes.
void set_thread_count(int64_t count);

}  // namespace pyargs
