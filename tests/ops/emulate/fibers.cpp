// A block's threads are fibers that run one after the other, in a seeded order, from one rendezvous to the next; so do
// the blocks. It finds wrong indices, tails, ties, missing barriers that a shuffled order can tell, and threads that
// wait at different barriers; not races within a warp, nor what a memory model allows.

#include <ucontext.h>

#include <memory>
#include <vector>

#include "cuda_runtime.h"

namespace pyargs::emulate {
namespace {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;

  bool arrive(unsigned expected) {  // true for the last, who lets the others go
    if (++arrived < expected) return false;
    arrived = 0;
    ++generation;
    return true;
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  bool done = false;
  const Barrier* waits = nullptr;
  uint64_t generation = 0;  // of that barrier when the wait began

  bool ready() const { return !done && (waits == nullptr || waits->generation != generation); }
};

struct Warp {
  Barrier barrier;
  std::array<uint64_t, 32> values;
};

ucontext_t scheduler;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
Barrier block;
unsigned alive = 0;
Thread* current = nullptr;
const std::function<void()>* body = nullptr;
std::unique_ptr<char[]> memory;  // what the block shares

void wait(Barrier& barrier, unsigned expected) {
  current->waits = &barrier;
  current->generation = barrier.generation;
  if (!barrier.arrive(expected)) swapcontext(&current->context, &scheduler);
  current->waits = nullptr;
}

void run_thread() {
  (*body)();
  current->done = true;
  --alive;
  if (block.arrived > 0 && block.arrived == alive) {  // those who wait need not wait for a thread that has ended
    block.arrived = 0;
    ++block.generation;
  }
  swapcontext(&current->context, &scheduler);
}

void run_block(dim3 index, dim3 size) {
  const unsigned count = size.x * size.y * size.z;
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  warps.assign((count + 31) / 32, Warp{});
  for (Warp& warp : warps) warp.values.fill(0xdeadbeefdeadbeefull);
  block = Barrier{};
  memory.reset();
  alive = count;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = *threads[i];
    thread.index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    thread.done = false;
    thread.waits = nullptr;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  blockIdx = index;
  while (alive > 0) {
    bool moved = false;
    for (unsigned i : in_order(count)) {
      Thread& thread = *threads[i];
      if (!thread.ready()) continue;
      moved = true;
      current = &thread;
      threadIdx = thread.index;
      swapcontext(&scheduler, &thread.context);
    }
    if (!moved) {
      error = "emulation: threads of a block wait at different barriers";
      return;
    }
  }
}

}  // namespace

void* shared(size_t bytes) {  // as many as asked for, so that a sanitizer sees their end
  if (!memory) std::memset((memory = std::make_unique<char[]>(bytes)).get(), kGarbage, bytes);
  return memory.get();
}

void wait_for_block() { wait(block, alive); }

void wait_for_warp(uint32_t mask) {
  wait(warps[threadIdx.x / 32].barrier, static_cast<unsigned>(__builtin_popcount(mask)));
}

std::array<uint64_t, 32> exchange(uint32_t mask, uint64_t own) {
  Warp& warp = warps[threadIdx.x / 32];
  warp.values[lane()] = own;
  wait_for_warp(mask);
  const auto found = warp.values;
  wait_for_warp(mask);  // before anybody writes the next one
  return found;
}

uint32_t atomic_add(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at = before + value;
  return before;
}

uint32_t atomic_inc(uint32_t* at, uint32_t last, bool, bool) {
  const uint32_t before = *at;
  *at = before >= last ? 0 : before + 1;
  return before;
}

void launch(dim3 blocks, dim3 size, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim = size;
  gridDim = blocks;
  for (unsigned i : in_order(blocks.x * blocks.y * blocks.z)) {
    if (!error.empty()) return;
    run_block(dim3(i % blocks.x, i / blocks.x % blocks.y, i / (blocks.x * blocks.y)), size);
  }
}

}  // namespace pyargs::emulate
