#include "csrc/cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace zsq {
namespace {

// PyTorch's threads wait for its next operator by spinning, and threads of our own would have to share the cores with
// them for milliseconds. So the loop runs on PyTorch's threads where their OpenMP runtime can be found in the process
// (GNU's, or LLVM's or Intel's, which answer to the same name), and on a pool of our own elsewhere.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
const auto openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t n, grain;
  std::atomic<int64_t> next{0};

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      (*body)(begin, std::min(begin + grain, n));
    }
  }
};

class Pool {
 public:
  // One job at a time: a second caller finds the pool taken and works alone.
  std::mutex taken;

  void run(Job& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < helpers; ++workers_) std::thread(&Pool::loop, this, workers_).detach();
      job_ = &job;
      wanted_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    job.work();
    // Closed to helpers that have not woken yet: on a busy machine they may come long after the work is done.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void loop(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ && round_ != seen && index < wanted_; });
      seen = round_;
      Job* job = job_;
      ++active_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  uint64_t round_ = 0;
  int workers_ = 0, wanted_ = 0, active_ = 0;
};

// Never destroyed: its threads sleep in it until the process ends. A forked child has no threads but its own and cannot
// start those of OpenMP again, so it starts a pool.
Pool* pool = new Pool;
bool forked = false;
const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  forked = true;
});

}  // namespace

void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  const int64_t pieces = (n + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
  if (helpers < 1) return body(0, n);
  Job job{&body, n, grain};
  if (openmp && !forked) return openmp([](void* job) { static_cast<Job*>(job)->work(); }, &job, helpers + 1, 0);
  std::unique_lock<std::mutex> turn(pool->taken, std::defer_lock);
  if (!turn.try_lock()) return body(0, n);
  pool->run(job, helpers);
}

}  // namespace zsq
