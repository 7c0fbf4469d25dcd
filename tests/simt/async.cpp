// What happens later: cp.async, TMA and bulk copies, st.async, and the mbarriers that tell when it has happened.
#include <algorithm>
#include <unordered_map>

#include "executor.h"

namespace simt {

struct Async {  // a copy under way
  Thread* owner;
  int group;
  const void* at;
  std::function<void()> perform;  // moves the bytes; called once, at any time
  std::function<void()> finish;   // when the program knows: the bytes are its own again
  bool performed = false, finished = false;
};

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

uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

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

// An asynchronous write to shared memory, announced to the barrier of the same block: in flight until it is performed.
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

}  // namespace

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

// ---- TMA ----

void fence_proxy_async() {
  current->async_fence = current->tick++;
  current->async_fence_base = current->base;
}

namespace {

// f(offset in the packed box, source row or null, bytes of it in bounds at the left that are missing, bytes in bounds)
template <typename F>
void for_box_rows(const TensorMapFields& map, const int (&at)[3], F f) {
  const int row_bytes = map.box[0] * map.element_bytes;
  int offset = 0;
  for (int z = 0; z < (map.rank == 3 ? map.box[2] : 1); ++z)
    for (int y = 0; y < map.box[1]; ++y, offset += row_bytes) {
      const int64_t row = int64_t{at[1]} + y, plane = map.rank == 3 ? int64_t{at[2]} + z : 0;
      const bool inside = row >= 0 && row < map.size[1] && plane >= 0 && (map.rank < 3 || plane < map.size[2]);
      const int64_t left = std::max<int64_t>(0, -int64_t{at[0]}),
                    right = std::min<int64_t>(map.box[0], map.size[0] - at[0]);
      const char* source = map.data + plane * (map.rank == 3 ? map.stride[2] : 0) + row * map.stride[1] +
                           (at[0] + left) * map.element_bytes;
      if (inside && right > left) f(offset, source, left * map.element_bytes, (right - left) * map.element_bytes);
    }
}

int64_t box_bytes(const TensorMapFields& map) {
  return int64_t{map.box[0]} * map.element_bytes * map.box[1] * (map.rank == 3 ? map.box[2] : 1);
}

char* swizzled(const TensorMapFields& map, char* base, int64_t offset) {
  const uintptr_t address = address_of(base) + static_cast<uintptr_t>(offset);
  return reinterpret_cast<char*>(map.swizzled ? address ^ (address >> 3 & 0x70) : address);
}

}  // namespace

void tma_load(void* shared, const TensorMapFields* pointer, uint64_t* barrier, const int (&at)[3], int rank,
              uint32_t blocks) {
  const void* from = SIMT_CALLER;
  const TensorMapFields map = *pointer;
  if (map.rank != rank) fail("tma_load: the tensor map has " + std::to_string(map.rank) + " dimensions", from);
  const size_t bytes = static_cast<size_t>(box_bytes(map));
  shared_region(shared, bytes, map.swizzled ? 1024 : 128, "tma_load", from);
  for_box_rows(map, at, [&](int64_t, const char* source, int64_t, int64_t count) {
    check(address_of(source), static_cast<size_t>(count), kRead, from);
  });
  const uint32_t own = 1u << current->block->rank;
  const std::array<int, 3> corner{at[0], at[1], at[2]};
  for (uint32_t to = 0; to < run_state->blocks.size(); ++to) {
    if (!((blocks == 0 ? own : blocks) >> to & 1)) continue;
    start_write(
        static_cast<char*>(map_shared(shared, to)), bytes, static_cast<uint64_t*>(map_shared(barrier, to)),
        [=](char* target) {
          std::memset(target, 0, bytes);
          const int place[3] = {corner[0], corner[1], corner[2]};
          for_box_rows(map, place, [&](int64_t offset, const char* source, int64_t skip, int64_t count) {
            for (int64_t i = 0; i < count; ++i) *swizzled(map, target, offset + skip + i) = source[i];
          });
        },
        "tma_load", from);
  }
  if (blocks >> run_state->blocks.size() != 0)
    fail("tma_load_2d_multicast: the mask names blocks beyond the cluster", from);
}

void tma_store(const TensorMapFields* pointer, const void* shared, const int (&at)[3], int rank) {
  const void* from = SIMT_CALLER;
  const TensorMapFields map = *pointer;
  if (map.rank != rank) fail("tma_store: the tensor map has " + std::to_string(map.rank) + " dimensions", from);
  const size_t bytes = static_cast<size_t>(box_bytes(map));
  Region& region = shared_region(shared, bytes, map.swizzled ? 1024 : 128, "tma_store", from);
  check(address_of(shared), bytes, kRead | kAsync, from);
  for_box_rows(map, at, [&](int64_t, const char* target, int64_t, int64_t count) {
    check(address_of(target), static_cast<size_t>(count), kWrite, from);
  });
  const uintptr_t offset = address_of(shared) - region.begin;
  mark(region.reading, offset, bytes, 1);
  const std::array<int, 3> corner{at[0], at[1], at[2]};
  char* base = static_cast<char*>(const_cast<void*>(shared));
  current->stores.push_back(start(
      [=] {
        const int place[3] = {corner[0], corner[1], corner[2]};
        for_box_rows(map, place, [&](int64_t in_box, const char* target, int64_t skip, int64_t count) {
          for (int64_t i = 0; i < count; ++i) const_cast<char*>(target)[i] = *swizzled(map, base, in_box + skip + i);
        });
      },
      [=, &region] { mark(region.reading, offset, bytes, -1); }, current->store_groups, from));
}

void tma_store_commit() { ++current->store_groups; }

void tma_store_wait(int groups) {
  auto& stores = current->stores;
  const int until = current->store_groups - groups;
  size_t kept = 0;
  for (auto& store : stores) {
    if (store->group < until) finish(*store);
    else stores[kept++] = store;
  }
  stores.resize(kept);
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  const void* at = SIMT_CALLER;
  if (bytes == 0 || bytes % 16 != 0 || address_of(global) % 16 != 0)
    fail("bulk_load: bytes and the global address must be multiples of 16", at);
  shared_region(shared, bytes, 16, "bulk_load", at);
  check(address_of(global), bytes, kRead, at);
  start_write(
      static_cast<char*>(shared), bytes, barrier, [=](char* to) { std::memcpy(to, global, bytes); }, "bulk_load", at);
}

// ---- clusters ----

void* map_shared(const void* pointer, uint32_t rank) {
  const uintptr_t offset = address_of(pointer) - address_of(shared_window(0));
  if (offset >= kMaxCluster * kSharedWindow) fail("map_shared: not a shared address", SIMT_CALLER);
  if (rank >= run_state->blocks.size())
    fail("map_shared: the cluster has no rank " + std::to_string(rank), SIMT_CALLER);
  if (run_state->blocks[rank].alive == 0)
    fail("map_shared: block " + std::to_string(rank) + " of the cluster has exited", SIMT_CALLER);
  return shared_window(static_cast<int>(rank)) + offset % kSharedWindow;
}

void store_async(void* pointer, uint64_t bits, int bytes, uint64_t* barrier, uint32_t rank) {
  const void* at = SIMT_CALLER;
  char* to = static_cast<char*>(map_shared(pointer, rank));
  shared_region(to, static_cast<size_t>(bytes), static_cast<size_t>(bytes), "store_async", at);
  start_write(
      to, static_cast<size_t>(bytes), static_cast<uint64_t*>(map_shared(barrier, rank)),
      [=](char* target) { std::memcpy(target, &bits, static_cast<size_t>(bytes)); }, "store_async", at);
}

}  // namespace simt
