// The threads of the C++ package: helpers that wait for work, beside the thread that has some.
#include "include/pyargs/threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "parallel.h"

namespace pyargs {
namespace {

struct Job {
  int64_t count;
  void (*work)(const void* context, int64_t i);
  const void* context;
};

class Team {
 public:
  explicit Team(int64_t size) {
    try {
      for (int64_t i = 1; i < size; ++i) helpers_.emplace_back([this] { help(); });
    } catch (...) {  // the system gives no more: a thread that nobody joins would end the process
      end();
      throw;
    }
  }
  ~Team() { end(); }

  int64_t size() const { return static_cast<int64_t>(helpers_.size()) + 1; }

  void run(const Job& job) {
    if (job.count <= 1 || helpers_.empty() || busy_.exchange(true)) {
      for (int64_t i = 0; i < job.count; ++i) job.work(job.context, i);
      return;
    }
    std::unique_lock lock(mutex_);
    job_ = &job;
    next_ = 0;
    ++turn_;
    lock.unlock();
    wake_.notify_all();
    take(job);
    lock.lock();
    job_ = nullptr;  // who comes now comes too late
    left_.wait(lock, [this] { return inside_ == 0; });
    busy_ = false;
  }

 private:
  void take(const Job& job) {
    for (int64_t i; (i = next_++) < job.count;) job.work(job.context, i);
  }

  void end() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  void help() {
    std::unique_lock lock(mutex_);
    for (uint64_t seen = 0;; seen = turn_) {
      wake_.wait(lock, [&] { return over_ || (turn_ != seen && job_); });
      if (over_) return;
      const Job& job = *job_;
      ++inside_;
      lock.unlock();
      take(job);
      lock.lock();
      if (--inside_ == 0) left_.notify_one();
    }
  }

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  const Job* job_ = nullptr;
  std::atomic<int64_t> next_{0};
  uint64_t turn_ = 0;
  int64_t inside_ = 0;  // helpers that work on the job
  bool over_ = false;
  std::vector<std::thread> helpers_;
};

int64_t wanted = std::max<int64_t>(1, std::thread::hardware_concurrency());
std::unique_ptr<Team> team;
std::mutex making;

Team& the_team() {
  const std::lock_guard lock(making);
  if (!team || team->size() != wanted) team = std::make_unique<Team>(wanted);
  return *team;
}

}  // namespace

int64_t thread_count() { return wanted; }

void set_thread_count(int64_t count) {
  if (count < 1) throw std::invalid_argument("pyargs: there must be at least one thread");
  wanted = count;
}

void on_threads(int64_t count, void (*work)(const void*, int64_t), const void* context) {
  the_team().run({count, work, context});
}

}  // namespace pyargs
