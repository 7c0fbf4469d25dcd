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
  unsigned saved_;
};

// Uninitialised scratch on a 64-byte boundary.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reserve(count); }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  // The contents are lost when it grows.
  void reserve(int64_t count) {
    if (count <= size_) return;
    std::free(data_);
    size_ = 0;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = count;
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace pycm::cpu
