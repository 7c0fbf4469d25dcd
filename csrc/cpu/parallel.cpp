#include "cpu/parallel.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "core/check.h"

namespace pycm::cpu {
namespace {

constexpr std::chrono::microseconds kSpin{500};

int processors() {
  static const int count = static_cast<int>(std::thread::hardware_concurrency());  // those this process may use
  return count;
}

std::atomic<bool (*)()> interrupt_check{nullptr};
thread_local bool in_pool = false;  // this thread is one of the pool's: it may not ask for interrupts

// One call of run_parallel. Threads take tasks from `next` until none is left.
struct Job {
  Job(const ParallelBody& job_body, int64_t job_tasks) : body(job_body), tasks(job_tasks) {}
  const ParallelBody& body;
  const int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  std::exception_ptr error;
  std::mutex error_mutex;

  void fail(std::exception_ptr e) {
    std::lock_guard<std::mutex> lock(error_mutex);
    if (!error) error = e;
    stop = true;
  }

  void work(int slot) {
    using Clock = std::chrono::steady_clock;
    const auto check = !in_pool && tasks > 1 ? interrupt_check.load() : nullptr;
    auto checked = check != nullptr ? Clock::now() : Clock::time_point();
    try {
      while (!stop.load(std::memory_order_relaxed)) {
        const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks) return;
        body(task, slot);
        if (check != nullptr && Clock::now() - checked > std::chrono::milliseconds(50)) {
          if (check()) throw Interrupted();
          checked = Clock::now();
        }
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }
};

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a moment for a condition that another thread is about to meet: regions of one call follow each other within
// microseconds, and a thread that sleeps between them pays for its waking, often on another processor, each time.
template <class Condition>
void spin(Condition&& met) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (met()) return;
      pause();
    }
  } while (Clock::now() < end);
}

// The processor that the calling thread is on; -1 where that is not known.
int current_processor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Systems tend to wake a thread on the processor of whoever wakes it, and move it milliseconds later: until then the two
// take turns.
void leave_processor(int processor) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (processor < 0 || sched_getcpu() != processor || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&others) == 0) return;
  sched_setaffinity(0, sizeof others, &others);
  sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)processor;
#endif
}

class Pool {
 public:
  // Runs the job on the caller and up to helpers threads; false when another job holds the pool.
  bool run(Job& job, int helpers) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int>(threads_.size()) < helpers) {
          const int slot = static_cast<int>(threads_.size()) + 1;
          threads_.emplace_back([this, slot, seen = epoch_.load()] { serve(slot, seen); });
        }
      } catch (const std::system_error&) {
        helpers = static_cast<int>(threads_.size());  // the system grants no more: go on with those there are
      }
      job_ = &job;
      caller_ = current_processor();
      helpers_ = helpers;
      spins_ = helpers < processors();
      ++epoch_;
    }
    start_.notify_all();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // who has not come by now is not waited for
    if (spins_ && working_ > 0) {
      lock.unlock();
      spin([this] { return working_.load(std::memory_order_acquire) == 0; });
      lock.lock();
    }
    done_.wait(lock, [this] { return working_ == 0; });
    return true;
  }

 private:
  void serve(int slot, uint64_t seen) {
    in_pool = true;
    const DefaultFloatMode float_mode;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (spins_) {
        lock.unlock();
        spin([&] { return epoch_.load(std::memory_order_relaxed) != seen; });
        lock.lock();
      }
      start_.wait(lock, [&] { return epoch_ != seen; });
      seen = epoch_;
      Job* job = job_;
      if (job == nullptr || slot > helpers_) continue;
      ++working_;
      const int caller = spins_ ? caller_ : -1;
      lock.unlock();
      leave_processor(caller);
      job->work(slot);
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int caller_ = -1;  // the processor of the thread that brought the job
  int helpers_ = 0;
  bool spins_ = false;           // there is a processor for every thread
  std::atomic<int> working_{0};  // helpers that have taken up the job
  std::atomic<uint64_t> epoch_{0};
};

// Never destroyed: its threads wait until the process ends, and a forked child abandons its parent's.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
  (void)registered;
  Pool* existing = pool.load();
  if (existing == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(existing, fresh)) return *fresh;
    delete fresh;
  }
  return *existing;
}

}  // namespace

void run_parallel(int64_t tasks, int num_threads, const ParallelBody& body) {
  if (tasks <= 0) return;
  const int helpers = static_cast<int>(std::min<int64_t>(tasks, num_threads)) - 1;
  Job job(body, tasks);
  const DefaultFloatMode float_mode;
  if (helpers <= 0 || !the_pool().run(job, helpers)) job.work(0);
  if (job.error) std::rethrow_exception(job.error);
}

void set_interrupt_check(bool (*check)()) { interrupt_check = check; }

#if defined(__x86_64__)
DefaultFloatMode::DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
DefaultFloatMode::~DefaultFloatMode() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
DefaultFloatMode::DefaultFloatMode() : saved_(0) {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
}
DefaultFloatMode::~DefaultFloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
DefaultFloatMode::DefaultFloatMode() : saved_(0) {}
DefaultFloatMode::~DefaultFloatMode() {}
#endif

}  // namespace pycm::cpu
