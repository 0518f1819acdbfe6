// The block of several that finishes last goes on with what all of them have found; nobody waits.
#pragma once

#include "platform.h"

namespace pyargs::cuda {

// Whether this block is the last of the `blocks` that share a ticket; then it sees what all of them have left, and the
// ticket is 0 again.
template <class Shared>
__device__ __forceinline__ bool is_last(Shared& shared, uint32_t* ticket, uint32_t blocks) {
  __syncthreads();
  if (threadIdx.x == 0) shared.last = take_ticket(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  return shared.last;
}

}  // namespace pyargs::cuda
