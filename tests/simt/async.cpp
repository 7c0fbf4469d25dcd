// What happens later, the mbarriers that tell when it has happened, and cp.async; tma.cpp has the other copies.
#include <algorithm>
#include <unordered_map>

#include "async.h"

namespace simt {

namespace {

struct MBarrier {
  uint32_t count, pending, phase = 0;
  int64_t bytes = 0;  // announced and not yet in
  SyncClock clock;
  ClockRef done;
  std::vector<Thread*> waiting;
};

std::unordered_map<uintptr_t, MBarrier> mbarriers;
std::vector<std::shared_ptr<Async>> pending;
std::vector<uint32_t> agent_ticks;
int spins = 0, elected = 0;

void perform(Async& copy) {
  if (copy.performed) return;
  copy.performed = true;
  copy.perform();
}
// ---- mbarriers ----

void complete(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.done = barrier.clock.of;
  spins = 0;
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

MBarrier& barrier_at(const void* pointer, const char* what, const void* at) {
  check(address_of(pointer), 8, kWrite | kAtomic, at);
  auto found = mbarriers.find(address_of(pointer));
  if (found == mbarriers.end()) fail(std::string(what) + ": the mbarrier was not initialised", at);
  return found->second;
}

void arrive(MBarrier& barrier, const void* at) {
  if (barrier.pending == 0)
    fail("mbarrier_arrive: more arrivals than the count of " + std::to_string(barrier.count), at);
  publish(barrier.clock);
  --barrier.pending;
  complete(barrier);
}

}  // namespace

void finish(Async& copy) {
  perform(copy);
  if (copy.finished) return;
  copy.finished = true;
  if (copy.finish) copy.finish();
}

std::shared_ptr<Async> start(std::function<void()> perform, std::function<void()> finish, int group, const void* at) {
  auto copy = std::make_shared<Async>();
  copy->owner = current;
  copy->group = group;
  copy->at = at;
  copy->perform = std::move(perform);
  copy->finish = std::move(finish);
  pending.push_back(copy);
  return copy;
}

Region& shared_region(const void* pointer, size_t bytes, size_t alignment, const char* what, const void* at) {
  Region* region = region_of(address_of(pointer));
  if (region == nullptr || region->block == nullptr || address_of(pointer) + bytes > region->end)
    fail(std::string(what) + ": out of bounds: " + std::to_string(bytes) + " bytes that are not all in shared memory",
         at);
  if (address_of(pointer) % alignment != 0)
    fail(std::string(what) + ": misaligned: the shared address must be a multiple of " + std::to_string(alignment), at);
  return *region;
}

void mark(uint8_t* counts, uintptr_t offset, size_t bytes, int change) {
  for (size_t i = 0; i < bytes; ++i) counts[offset + i] = static_cast<uint8_t>(counts[offset + i] + change);
}

void start_write(char* to, size_t bytes, uint64_t* barrier_pointer, std::function<void(char*)> write, const char* what,
                 const void* at) {
  Region& region = shared_region(to, bytes, 1, what, at);
  check(address_of(to), bytes, kWrite, at);
  barrier_at(barrier_pointer, what, at);
  const uintptr_t offset = address_of(to) - region.begin;
  const uintptr_t key = address_of(barrier_pointer);
  const int agent =
      static_cast<int>(run_state->threads.size()) + region.block->rank * kAgents + static_cast<int>(key / 8 % 8);
  mark(region.writing, offset, bytes, 1);
  std::memset(to, 0xA5, bytes);
  start(
      [=, &region] {
        write(to);
        mark(region.writing, offset, bytes, -1);
        const uint32_t tick = ++agent_ticks[agent];
        record_async_write(address_of(to), bytes, agent, tick);
        MBarrier& barrier = mbarriers[key];
        Thread* const self = current;
        current = &run_state->threads[0];  // only the size of its clock is used
        barrier.clock.set(agent, tick);
        current = self;
        barrier.bytes -= static_cast<int64_t>(bytes);
        complete(barrier);
      },
      nullptr, 0, at);
}

void async_begin() {
  mbarriers.clear();
  pending.clear();
  agent_ticks.assign(run_state->threads.size() + run_state->blocks.size() * kAgents, 0);
  spins = 0;
  elected = static_cast<int>(random_bits() % 32);
}

bool async_step() {
  while (!pending.empty()) {
    const size_t pick = random_bits() % pending.size();
    const std::shared_ptr<Async> copy = pending[pick];
    pending[pick] = pending.back();
    pending.pop_back();
    if (copy->performed) continue;  // somebody waited for it
    Thread* const self = current;
    current = copy->owner;
    perform(*copy);
    current = self;
    spins = 0;
    return true;
  }
  return false;
}

void async_thread_exit() {
  for (auto& copy : current->copies) finish(*copy);
  for (auto& store : current->stores)
    if (!store->finished)
      fail("exits while its TMA stores may still read shared memory: tma_store_wait_read is missing", store->at);
}

bool elect_one() {
  warp_collective(0xffffffffu, "elect_one", nullptr, [](uint32_t, void**) {}, SIMT_CALLER);
  return current->lane == elected;
}

void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8 != 0)
    fail("setmaxnreg: must be a multiple of 8 in [24, 256], got " + std::to_string(count), SIMT_CALLER);
}

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(address_of(pointer) - address_of(shared_window(current->block->rank)));
}

// ---- cp.async ----

void cp_async(void* shared, const void* global, int bytes, int source_bytes) {
  const void* at = SIMT_CALLER;
  if (source_bytes < 0 || source_bytes > bytes)
    fail("cp_async: the source must have 0 to " + std::to_string(bytes) + " bytes, got " + std::to_string(source_bytes),
         at);
  Region& region = shared_region(shared, static_cast<size_t>(bytes), static_cast<size_t>(bytes), "cp_async", at);
  if (source_bytes > 0) {
    if (address_of(global) % static_cast<uintptr_t>(bytes) != 0)
      fail("cp_async: misaligned: the global address must be a multiple of " + std::to_string(bytes), at);
    check(address_of(global), static_cast<size_t>(source_bytes), kRead, at);
  }
  check(address_of(shared), static_cast<size_t>(bytes), kWrite, at);
  const uintptr_t offset = address_of(shared) - region.begin;
  mark(region.writing, offset, static_cast<size_t>(bytes), 1);
  std::memset(shared, 0xA5, static_cast<size_t>(bytes));
  current->copies.push_back(start(
      [=] {
        std::memset(shared, 0, static_cast<size_t>(bytes));
        if (source_bytes > 0) std::memcpy(shared, global, static_cast<size_t>(source_bytes));
      },
      [=, &region] {
        mark(region.writing, offset, static_cast<size_t>(bytes), -1);
        check(address_of(shared), static_cast<size_t>(bytes), kWrite, at);
      },
      current->copy_groups, at));
}

void cp_async_commit() { ++current->copy_groups; }

void cp_async_wait(int groups) {
  auto& copies = current->copies;
  const int until = current->copy_groups - groups;
  size_t kept = 0;
  for (auto& copy : copies) {
    if (copy->group < until) finish(*copy);
    else copies[kept++] = copy;
  }
  copies.resize(kept);
}

void cp_async_arrive(uint64_t* barrier) {
  const void* at = SIMT_CALLER;
  barrier_at(barrier, "cp_async_arrive", at);
  auto copies = std::make_shared<std::vector<std::shared_ptr<Async>>>(std::move(current->copies));
  current->copies.clear();
  start(
      [=] {
        for (auto& copy : *copies) finish(*copy);
        arrive(mbarriers[address_of(barrier)], at);
      },
      nullptr, 0, at);
}

// ---- mbarrier ----

void mbarrier_init(uint64_t* barrier, uint32_t count) {
  shared_region(barrier, 8, 8, "mbarrier_init", SIMT_CALLER);
  if (count == 0 || count >= 1u << 20)
    fail("mbarrier_init: the count must be in [1, 2^20), got " + std::to_string(count), SIMT_CALLER);
  check(address_of(barrier), 8, kWrite, SIMT_CALLER);
  MBarrier& state = mbarriers[address_of(barrier)];
  if (!state.waiting.empty()) fail("mbarrier_init: threads wait on this mbarrier", SIMT_CALLER);
  state = {};
  state.count = state.pending = count;
}

void mbarrier_arrive(uint64_t* barrier, uint32_t bytes, int rank) {
  const void* at = SIMT_CALLER;
  if (rank >= 0) barrier = static_cast<uint64_t*>(map_shared(barrier, static_cast<uint32_t>(rank)));
  MBarrier& state = barrier_at(barrier, "mbarrier_arrive", at);
  state.bytes += bytes;
  arrive(state, at);
}

void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  MBarrier& state = barrier_at(barrier, "mbarrier_expect_tx", SIMT_CALLER);
  state.bytes += bytes;
  complete(state);
}

bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  MBarrier& state = barrier_at(barrier, "mbarrier_try_wait", SIMT_CALLER);
  if ((state.phase & 1) == parity) {
    if (++spins > 1000000) fail("mbarrier_try_wait: polled a million times while nothing happened", SIMT_CALLER);
    yield();
  }
  if ((state.phase & 1) == parity) return false;
  if (state.done != nullptr) acquire(*current, state.done);
  return true;
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  const void* at = SIMT_CALLER;
  if (parity > 1) fail("mbarrier_wait: the parity must be 0 or 1, got " + std::to_string(parity), at);
  MBarrier& state = barrier_at(barrier, "mbarrier_wait", at);
  while ((state.phase & 1) == parity) {
    state.waiting.push_back(current);
    wait_here(parity ? "mbarrier_wait (parity 1)" : "mbarrier_wait (parity 0)", at);
  }
  if (state.done != nullptr) acquire(*current, state.done);
}

}  // namespace simt
