// One small pool of threads for the whole library.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace pycm::cpu {

// Calls body(task, slot) once for every task in [0, tasks). A slot in [0, num_threads) belongs to one thread at a time,
// so per-slot scratch needs no lock; which slot runs which task is unspecified, and no result may depend on it.
// The first exception a body throws is rethrown here. When the pool is busy with another caller the tasks run on the
// calling thread. Survives fork(): a child starts a pool of its own.
class ParallelBody {
 public:
  virtual void operator()(int64_t task, int slot) const = 0;

 protected:
  ~ParallelBody() = default;
};
void run_parallel(int64_t tasks, int num_threads, const ParallelBody& body);

template <class F>
void parallel_for(int64_t tasks, int num_threads, F&& f) {
  struct Body final : ParallelBody {
    explicit Body(F& function) : f(function) {}
    void operator()(int64_t task, int slot) const override { f(task, slot); }
    F& f;
  };
  run_parallel(tasks, num_threads, Body(f));
}

// The threads worth waking for `work` steps of which one thread should have at least `share`.
inline int threads_for(double work, double share, int num_threads) {
  return work / share >= num_threads ? num_threads : work < 2 * share ? 1 : static_cast<int>(work / share);
}

// Asked now and then on the calling thread during long work; true stops it with Interrupted.
void set_interrupt_check(bool (*check)());

// Rounding to nearest, subnormals kept: a framework may have changed either on the calling thread.
class DefaultFloatMode {
 public:
  DefaultFloatMode();
  ~DefaultFloatMode();
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  uint64_t saved_;
};

// Uninitialised scratch on a 64-byte boundary. (malloc and a manual offset: aligned_alloc costs several times as much.)
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reserve(count); }
  Buffer(Buffer&& other) noexcept
      : block_(std::exchange(other.block_, nullptr)),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(block_); }

  // The contents are lost when it grows.
  void reserve(int64_t count, size_t alignment = 64) {
    if (count <= size_) return;
    std::free(block_);
    size_ = 0;
    block_ = std::malloc(static_cast<size_t>(count) * sizeof(T) + alignment);
    if (block_ == nullptr) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block_) + alignment - 1) / alignment * alignment);
    size_ = count;
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  void* block_ = nullptr;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace pycm::cpu
