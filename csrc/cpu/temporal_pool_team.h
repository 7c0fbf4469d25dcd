// Threads that go through the same phases together: a phase is a number of items, and none starts before the last is done.
//
// Each member has its own share of a phase's items, the same in every phase of that size, so that the weights it reads stay
// in its own cache; who has done his share helps the others. Nobody waits for a thread that has not come: one member alone
// does everything, and a late one skips what is done. So a team works whatever number of threads the pool has to give.
// An item must not throw, and members wait by spinning: phases should last microseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace pycm::cpu {

class Team {
 public:
  explicit Team(int members) : next_(static_cast<size_t>(members)) {}
  int members() const { return static_cast<int>(next_.size()); }

 private:
  friend class Member;
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  // Items taken of each share and items done, over all phases so far.
  std::vector<Counter> next_;
  Counter done_;
};

class Member {
 public:
  Member(Team& team, int rank) : team_(team), rank_(rank), before_(static_cast<size_t>(team.members())) {}

  // f(item) once for every item in [0, items), by one member or another; `backwards`: each share from its end.
  template <class F>
  void phase(int64_t items, F&& f, bool backwards = false) {
    const int members = team_.members();
    if (members == 1) {
      for (int64_t i = 0; i < items; ++i) f(backwards ? items - 1 - i : i);
      return;
    }
    for (int k = 0; k < members; ++k) {
      const int share = (rank_ + k) % members;
      const int64_t begin = share * items / members, end = (share + 1) * items / members;
      int64_t& before = before_[static_cast<size_t>(share)];
      std::atomic<int64_t>& next = team_.next_[static_cast<size_t>(share)].value;
      int64_t taken = next.load(std::memory_order_relaxed), done = 0;
      while (taken < before + end - begin) {
        if (!next.compare_exchange_weak(taken, taken + 1, std::memory_order_relaxed)) continue;
        f(backwards ? end - 1 - (taken - before) : begin + taken - before);
        ++done;
        taken = next.load(std::memory_order_relaxed);
      }
      if (done > 0) team_.done_.value.fetch_add(done, std::memory_order_release);  // at once: it is everybody's line
      before += end - begin;
    }
    total_ += items;
    for (int spins = 0; team_.done_.value.load(std::memory_order_acquire) < total_; ++spins) {
      if (spins >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

 private:
  static constexpr int kSpins = 2000;

  Team& team_;
  int rank_;
  int64_t total_ = 0;
  std::vector<int64_t> before_;
};

}  // namespace pycm::cpu
