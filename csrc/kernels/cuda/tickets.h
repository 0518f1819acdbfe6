// Tickets that stay on the device. Of the host.
//
// A kernel finds its tickets at 0 and leaves them so (take_ticket), so that nothing need be queued to clear them. Two
// launches may share tickets only if one has ended before the other begins. So they are given:
//
// To a stream, whose kernels run one after the other, for good. The key is the stream's number, which is never used
// again. Its handle is, while the kernels of a stream that was destroyed may still run.
//
// To a recording, for each stream that it records. Replays of a CUDA graph run one after the other, and so do in each
// the calls of one stream. But two graphs that were recorded on one stream may run at the same time on others, and a
// replay beside calls on that stream. The memory is none of torch's, which would give that of a recording to others
// between the replays. CUDA says when the graphs that were made of a recording are gone and no replay of theirs runs:
// then its tickets are given to others.
//
// Sizes are powers of 2, so that a batch that grows seldom needs others. Each device has a fixed number, so that
// streams and recordings without end take no memory without end. When they are spent, and in a recording before any
// call outside of one, there are none: then the call clears its own. A kernel that was aborted leaves tickets taken,
// but its CUDA context takes no more work, and this memory lies in it.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "platform.h"

namespace pyargs::cuda {

constexpr int64_t kTickets = 1 << 16;
constexpr int64_t kTicketsAtOnce = 256;  // at least

struct Some {
  uint32_t* first = nullptr;
  int64_t count = 0;
};

// Whether it is a recording; the number of it or of the stream; in a recording the stream's handle.
using Owner = std::tuple<bool, unsigned long long, cudaStream_t>;

struct Tickets {
  bool tried = false;
  uint32_t* memory = nullptr;
  int64_t given = 0;  // from the beginning of the memory
  std::map<Owner, Some> of;
  std::multimap<int64_t, uint32_t*> back;  // what recordings have had, by count
};

// What the graphs of a recording hold.
struct Held {
  Held* next;
  int device;
  Owner owner;
  Some tickets;
};

inline std::atomic<Held*> returned{nullptr};

// CUDA calls it, in a thread in which nothing may wait, and nothing of CUDA may be called.
inline void give_back(void* held) {
  Held* one = static_cast<Held*>(held);
  one->next = returned.load();
  while (!returned.compare_exchange_weak(one->next, one)) {
  }
}

inline void take_back(std::map<int, Tickets>& of_device) {
  for (Held* one = returned.exchange(nullptr); one != nullptr;) {
    Tickets& tickets = of_device[one->device];
    tickets.back.emplace(one->tickets.count, one->tickets.first);
    tickets.of.erase(one->owner);
    delete std::exchange(one, one->next);
  }
}

inline cudaError_t allocate(Tickets& tickets, cudaStream_t stream) {
  tickets.tried = true;
  // Another thread may be recording, which forbids allocations to all threads that do not say this.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  void* memory = nullptr;
  error = cudaMalloc(&memory, kTickets * sizeof(uint32_t));
  if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, kTickets * sizeof(uint32_t), stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);  // other streams use them too
  if (error == cudaSuccess) tickets.memory = static_cast<uint32_t*>(memory);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return error;
}

// At least so many that nobody has; none where there are not so many in one piece.
inline Some take(Tickets& tickets, int64_t rows) {
  int64_t count = kTicketsAtOnce;
  while (count < rows) count *= 2;
  const bool room = tickets.memory != nullptr && tickets.given + count <= kTickets;
  const auto found = tickets.back.lower_bound(count);
  if (found != tickets.back.end() && (found->first == count || !room)) {
    const Some some{found->second, found->first};
    tickets.back.erase(found);
    return some;
  }
  if (!room) return {};
  const Some some{tickets.memory + tickets.given, count};
  tickets.given += count;
  return some;
}

// Whether the graph, and what is made of it, holds the tickets from now on; otherwise they have been given back.
inline bool hold(cudaGraph_t graph, int device, const Owner& owner, const Some& tickets) {
  Held* held = new Held{nullptr, device, owner, tickets};
  cudaUserObject_t object;
  if (cudaUserObjectCreate(&object, held, give_back, 1, cudaUserObjectNoDestructorSync) != cudaSuccess) {
    give_back(held);
  } else if (cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) != cudaSuccess) {
    cudaUserObjectRelease(object, 1);
  } else {
    return true;
  }
  cudaGetLastError();  // or the launch would report it
  return false;
}

// `rows` tickets at 0 for a kernel that is queued on `stream` of the current device; null where there are none.
inline uint32_t* standing_tickets(int device, cudaStream_t stream, int64_t rows) {
  static std::mutex mutex;
  static std::map<int, Tickets> of_device;
  const std::lock_guard<std::mutex> lock(mutex);
  take_back(of_device);
  Tickets& tickets = of_device[device];
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = 0;
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &number, &graph);
  if (error == cudaSuccess && status == cudaStreamCaptureStatusNone) {
    error = cudaStreamGetId(stream, &number);
    if (error == cudaSuccess && !tickets.tried) error = allocate(tickets, stream);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the launch would report it
    return nullptr;
  }
  const bool recording = status != cudaStreamCaptureStatusNone;
  if (recording && status != cudaStreamCaptureStatusActive) return nullptr;  // it has failed, and has no graph
  const Owner owner(recording, number, recording ? stream : nullptr);
  const auto found = tickets.of.find(owner);
  if (found != tickets.of.end() && found->second.count >= rows) return found->second.first;
  const Some some = take(tickets, rows);
  if (some.count == 0 || (recording && !hold(graph, device, owner, some))) return nullptr;
  return (tickets.of[owner] = some).first;
}

// Standing tickets instead of a call's own, or those cleared by a node of their own, which a CUDA graph replays too.
inline cudaError_t set_tickets(uint32_t*& tickets, int64_t rows, int device, cudaStream_t stream) {
  uint32_t* standing = standing_tickets(device, stream, rows);
  if (standing == nullptr) return cudaMemsetAsync(tickets, 0, rows * sizeof(uint32_t), stream);
  tickets = standing;
  return cudaSuccess;
}

}  // namespace pyargs::cuda
