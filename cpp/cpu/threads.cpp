// The pool: idle workers on a stack, made when first needed and never ended; they sleep after a short spin, so
// that they do not take the cores of whoever computes next (NumPy's pool, say). Or OpenMP's pool, if asked to share it.
#include "threads.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "gatewise/gatewise.hpp"

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

// OpenMP as compilers call it; its implementations by GNU, Intel and LLVM all have these names.
struct OpenMP {
  void (*parallel)(void (*task)(void*), void* argument, unsigned threads, unsigned flags);  // waits for all of them
  int (*thread)();   // the number of the thread that asks
  int (*threads)();  // of the team that it is in
};
std::atomic<const OpenMP*> openmp{nullptr};

// Never destroyed: workers outlive main(). A forked child has none of its parent's threads, and perhaps a mutex
// locked by one of them, so it starts with a pool of its own; OpenMP's may wait for threads that are no more.
Pool* pool = new Pool;
const int fork_hook = pthread_atfork(nullptr, nullptr, [] { pool = new Pool, openmp = nullptr; });

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

void run_openmp(const OpenMP& omp, int size, void (*job)(const void*, Team&, int), const void* context) {
  struct Call {
    const OpenMP& omp;
    void (*job)(const void*, Team&, int);
    const void* context;
    Team team;
  } call{omp, job, context, Team(size)};
  omp.parallel(
      [](void* argument) {
        Call& own = *static_cast<Call*>(argument);
        const int id = own.omp.thread();
        if (own.omp.threads() == own.team.size) return own.job(own.context, own.team, id);
        if (id != 0) return;  // fewer came than were asked for, by a limit of OpenMP's: one does it all
        Team alone(1);
        own.job(own.context, alone, 0);
      },
      &call, unsigned(size), 0);
}

}  // namespace

bool share_openmp() {
  static const OpenMP found{reinterpret_cast<decltype(OpenMP::parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
                            reinterpret_cast<decltype(OpenMP::thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
                            reinterpret_cast<decltype(OpenMP::threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))};
  if (!found.parallel || !found.thread || !found.threads) return false;
  openmp = &found;
  return true;
}

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
  if (const OpenMP* omp = size > 1 ? openmp.load(std::memory_order_relaxed) : nullptr)
    return run_openmp(*omp, size, job, context);
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
