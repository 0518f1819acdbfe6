// Tickets that stay on the device. Of the host.
//
// A kernel finds its tickets at 0 and leaves them so (take_ticket), so that nothing need be queued to clear them. Two
// launches may share tickets only if one has ended before the other begins. So they are given away for good:
//
// To a stream, whose kernels run one after the other. The key is the stream's number, which is never used again. Its
// handle is, while the kernels of a stream that was destroyed may still run.
//
// To one call of a recording. Replays of a CUDA graph run one after the other, but two graphs that were recorded on one
// stream may run at the same time on others, and a replay beside calls on that stream. The memory is none of torch's,
// which would give that of a recording to others between the replays.
//
// Each device has a fixed number, so that recordings and streams without end take no memory without end. When they are
// spent, and in a recording before any call outside of one, there are none: then the call clears its own. A kernel that
// was aborted leaves tickets taken, but its CUDA context takes no more work, and this memory lies in it.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "platform.h"

namespace pyargs::cuda {

constexpr int64_t kTickets = 1 << 16;
constexpr int64_t kTicketsOfStream = 256;  // at least

struct Tickets {
  bool tried = false;
  uint32_t* memory = nullptr;
  int64_t given = 0;
  std::map<unsigned long long, std::pair<uint32_t*, int64_t>> of_stream;
};

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

// `rows` tickets at 0 for a kernel that is queued on `stream` of the current device; null where there are none.
inline uint32_t* standing_tickets(int device, cudaStream_t stream, int64_t rows) {
  static std::mutex mutex;
  static std::map<int, Tickets> of_device;
  const std::lock_guard<std::mutex> lock(mutex);
  Tickets& tickets = of_device[device];
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = 0;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  const bool recording = status != cudaStreamCaptureStatusNone;
  if (error == cudaSuccess && !recording) error = cudaStreamGetId(stream, &number);
  if (error == cudaSuccess && !recording && !tickets.tried) error = allocate(tickets, stream);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the launch would report it
    return nullptr;
  }
  if (!recording) {
    const auto found = tickets.of_stream.find(number);
    if (found != tickets.of_stream.end() && found->second.second >= rows) return found->second.first;
    rows = rows > kTicketsOfStream ? rows : kTicketsOfStream;
  }
  if (tickets.memory == nullptr || tickets.given + rows > kTickets) return nullptr;
  uint32_t* given = tickets.memory + tickets.given;
  tickets.given += rows;
  if (!recording) tickets.of_stream[number] = {given, rows};
  return given;
}

// Standing tickets instead of a call's own, or those cleared by a node of their own, which a CUDA graph replays too.
inline cudaError_t set_tickets(uint32_t*& tickets, int64_t rows, int device, cudaStream_t stream) {
  uint32_t* standing = standing_tickets(device, stream, rows);
  if (standing == nullptr) return cudaMemsetAsync(tickets, 0, rows * sizeof(uint32_t), stream);
  tickets = standing;
  return cudaSuccess;
}

}  // namespace pyargs::cuda
