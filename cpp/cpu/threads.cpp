// The pool: idle workers on a stack, made when first needed and never ended; they sleep after a short spin, so
// that they do not take the cores of whoever computes next (NumPy's or torch's own pools).
#include "threads.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace gatewise {
namespace {

constexpr int kSpins = 2000;  // a few microseconds: longer than the gap between two barriers, shorter than a tick

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Worker {
 public:
  Worker() : thread_([this] { serve(); }) { thread_.detach(); }

  void start(void (*job)(const void*, Team&, int), const void* context, Team* team, int id) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job, context_ = context, team_ = team, id_ = id;
      busy_.store(true, std::memory_order_release);
    }
    wake_.notify_one();
  }
  void wait() const {
    for (int spin = 0; busy_.load(std::memory_order_acquire);)
      spin < kSpins ? (++spin, relax()) : std::this_thread::yield();
  }

 private:
  void serve() {
    for (;;) {
      for (int spin = 0; spin < kSpins && !busy_.load(std::memory_order_acquire); ++spin) relax();
      if (!busy_.load(std::memory_order_acquire)) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return busy_.load(std::memory_order_acquire); });
      }
      job_(context_, *team_, id_);
      busy_.store(false, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> busy_{false};
  void (*job_)(const void*, Team&, int) = nullptr;
  const void* context_ = nullptr;
  Team* team_ = nullptr;
  int id_ = 0;
  std::thread thread_;
};

struct Pool {
  std::mutex mutex;
  std::vector<Worker*> idle;
};

// Never destroyed: workers outlive main(). A forked child has none of its parent's threads, and perhaps a mutex
// locked by one of them, so it starts with a pool of its own.
Pool* pool = new Pool;
const int fork_hook = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

Worker* borrow() {
  {
    std::lock_guard<std::mutex> lock(pool->mutex);
    if (!pool->idle.empty()) {
      Worker* worker = pool->idle.back();
      pool->idle.pop_back();
      return worker;
    }
  }
  try {
    return new Worker;
  } catch (const std::system_error&) {  // no more threads to be had
    return nullptr;
  }
}

void give_back(const std::vector<Worker*>& workers) {
  std::lock_guard<std::mutex> lock(pool->mutex);
  pool->idle.insert(pool->idle.end(), workers.begin(), workers.end());
}

}  // namespace

void Team::barrier() {
  if (size == 1) return;
  const int generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spin = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation;)
    spin < kSpins ? (++spin, relax()) : std::this_thread::yield();
}

void run_team(int size, void (*job)(const void*, Team&, int), const void* context) {
  (void)fork_hook;
  std::vector<Worker*> workers;
  for (int id = 1; id < size; ++id) {
    Worker* worker = borrow();
    if (worker == nullptr) break;
    workers.push_back(worker);
  }
  Team team(int(workers.size()) + 1);
  for (int id = 1; id < team.size; ++id) workers[id - 1]->start(job, context, &team, id);
  job(context, team, 0);
  for (const Worker* worker : workers) worker->wait();
  if (!workers.empty()) give_back(workers);
}

}  // namespace gatewise
