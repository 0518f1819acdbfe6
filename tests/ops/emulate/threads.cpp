// An OS thread for each CUDA thread, all blocks at once, for ThreadSanitizer: what it calls a race is one on the
// device, in whatever order the threads happen to run. It is told of no order but the device's:
// - __syncthreads and __syncwarp order what their threads did before and do after;
// - shuffles, reductions over lanes and atomicAdd order nothing but their values;
// - take_ticket tells who takes a later one what its thread knew, which is also what a __syncthreads before it told.
// Written for x86, where relaxed atomics come in the order of the program.

#include <linux/futex.h>
#include <sanitizer/tsan_interface.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

#include "cuda_runtime.h"

namespace pyargs::emulate {
namespace {

constexpr auto relaxed = std::memory_order_relaxed;  // of which ThreadSanitizer concludes no order
constexpr timespec kPatience{60, 0};
constexpr unsigned kMaxThreads = 4096;  // ThreadSanitizer knows 8128

[[noreturn]] void stop(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::_Exit(1);
}

// A mutex that orders nothing.
class Lock {
 public:
  explicit Lock(std::atomic<bool>& taken) : taken_(taken) {
    while (taken_.exchange(true, relaxed)) sched_yield();
  }
  ~Lock() { taken_.store(false, relaxed); }

 private:
  std::atomic<bool>& taken_;
};

// Where threads wait for each other; that alone orders nothing.
class Meeting {
 public:
  explicit Meeting(unsigned expected) : expected_(expected) {}

  uint32_t number() const { return number_.load(relaxed); }

  void wait() {
    const uint32_t now = number();
    {
      const Lock lock(taken_);
      arrived_.fetch_add(1, relaxed);
      end_if_complete();
    }
    while (number() == now) {
      const long woken = syscall(SYS_futex, &number_, FUTEX_WAIT_PRIVATE, now, &kPatience, nullptr, 0);
      if (woken != 0 && errno == ETIMEDOUT) stop("threads of a block wait at different barriers");
    }
  }

  void leave() {  // nobody waits for a thread that has ended
    const Lock lock(taken_);
    if (expected_.fetch_sub(1, relaxed) > 1) end_if_complete();
  }

 private:
  void end_if_complete() {
    if (arrived_.load(relaxed) < expected_.load(relaxed)) return;
    arrived_.store(0, relaxed);
    number_.fetch_add(1, relaxed);
    syscall(SYS_futex, &number_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }

  std::atomic<bool> taken_{false};
  std::atomic<uint32_t> number_{0};
  std::atomic<unsigned> arrived_{0}, expected_;
};

// A place for which ThreadSanitizer remembers what it was told, and teaches who asks.
struct Memory {
  char address;
  void tell() { __tsan_release(&address); }
  void ask() { __tsan_acquire(&address); }
};

// A barrier that orders memory. Two memories in turn: who is quick tells the next one, which no straggler asks.
class Barrier {
 public:
  explicit Barrier(unsigned expected) : meeting(expected) {}
  void wait() {
    Memory& before = before_[meeting.number() % 2];
    before.tell();
    meeting.wait();
    before.ask();
  }
  Meeting meeting;

 private:
  Memory before_[2];
};

struct Warp {
  Barrier barrier{32};
  Meeting meeting{32};
  std::atomic<uint64_t> values[32];
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(new Warp[threads / 32]) {
    std::memset(memory, kGarbage, sizeof memory);
  }

  Barrier barrier;
  std::unique_ptr<Warp[]> warps;
  alignas(16) char memory[kMaxShared];
};

struct Thread {
  Block* block;
  Warp& warp() const { return block->warps[threadIdx.x / 32]; }
};
thread_local Thread self;

}  // namespace

void* shared(size_t bytes) {
  if (bytes > kMaxShared) stop("more shared memory than a block may have");
  return self.block->memory;
}

void wait_for_block() { self.block->barrier.wait(); }

void wait_for_warp(uint32_t mask) {
  if (mask != 0xffffffffu) stop("only whole warps");
  self.warp().barrier.wait();
}

std::array<uint64_t, 32> exchange(uint32_t mask, uint64_t own) {
  if (mask != 0xffffffffu) stop("only whole warps");
  Warp& warp = self.warp();
  warp.values[lane()].store(own, relaxed);
  warp.meeting.wait();
  std::array<uint64_t, 32> found;
  for (int i = 0; i < 32; ++i) found[i] = warp.values[i].load(relaxed);
  warp.meeting.wait();  // before anybody writes the next one
  return found;
}

uint32_t atomic_add(uint32_t* at, uint32_t value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

uint32_t atomic_inc(uint32_t* at, uint32_t last, bool release, bool acquire) {
  static std::atomic<bool> taken{false};
  const Lock lock(taken);  // nobody asks for what is told but not yet there to see
  if (release) __tsan_release(at);
  const uint32_t before = __atomic_load_n(at, __ATOMIC_RELAXED);
  __atomic_store_n(at, before >= last ? 0 : before + 1, __ATOMIC_RELAXED);
  if (acquire) __tsan_acquire(at);
  return before;
}

void launch(dim3 blocks, dim3 size, const std::function<void()>& kernel) {
  const unsigned count = blocks.x * blocks.y * blocks.z;
  if (count * size.x > kMaxThreads) stop("too many threads to run all of them at once");
  std::vector<std::unique_ptr<Block>> running;
  std::vector<std::thread> threads;
  for (unsigned b : in_order(count)) {
    running.push_back(std::make_unique<Block>(size.x));
    for (unsigned t : in_order(size.x)) {
      threads.emplace_back([&, b, t, block = running.back().get()] {
        blockDim = size, gridDim = blocks;
        blockIdx = dim3(b % blocks.x, b / blocks.x % blocks.y, b / (blocks.x * blocks.y)), threadIdx = dim3(t);
        self.block = block;
        kernel();
        block->barrier.meeting.leave();
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace pyargs::emulate
