// Every load and store of a kernel comes here (by hooks.cpp): bounds, initialisation, asynchronous copies under way,
// races.
#include <link.h>

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "executor.h"

namespace simt {

namespace {

// Atomics order what came before a fence of theirs before what comes after one: by address.
struct AtomicSync {
  SyncClock clock;
  uint32_t clock_run = 0;
  std::vector<uint32_t> runs;
};
std::unordered_map<uintptr_t, AtomicSync> atomic_sync;
std::unordered_set<uint32_t> acquired_runs;  // whose writes the present block may read

struct Segment {
  uintptr_t begin, end;
};
std::vector<Segment> constants;  // what the program's files map read-only, and initialised data: tables, literals

bool is_constant(uintptr_t address) {
  if (constants.empty())
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (info->dlpi_phdr[i].p_type == PT_LOAD)
              constants.push_back({info->dlpi_addr + info->dlpi_phdr[i].p_vaddr,
                                   info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz});
          return 0;
        },
        nullptr);
  for (const Segment& segment : constants)
    if (address >= segment.begin && address < segment.end) return true;
  return false;
}

}  // namespace

std::string access_text(size_t size, uint8_t flags) {
  return std::string(flags & kAtomic  ? "atomic"
                     : flags & kWrite ? "write"
                                      : "read") +
         " of " + std::to_string(size) + " bytes";
}

namespace {

bool ordered(const Cell& cell, const Thread& self) {
  if (cell.run < run_state->launch_serial) return true;
  if (cell.run != run_state->serial) return acquired_runs.count(cell.run) != 0;
  return cell.thread == self.id || (*self.base)[cell.thread] >= cell.tick;
}

[[noreturn]] void race(const Cell& cell, uintptr_t address, size_t size, uint8_t flags, const void* at) {
  const uintptr_t high = reinterpret_cast<uintptr_t>(at) & ~uintptr_t{0xffffffff};
  std::string other = cell.flags & kWrite ? "an asynchronous copy" : "a wgmma";
  if (cell.run != run_state->serial) other = "another block";
  else if (cell.thread < run_state->threads.size()) other = name_of(run_state->threads[cell.thread]);
  std::string text = "race: " + access_text(size, flags) + ", " + place(address) + ", not ordered after the " +
                     (cell.flags & kAtomic  ? "atomic"
                      : cell.flags & kWrite ? "write"
                                            : "read") +
                     " by " + other;
  if (cell.pc != 0) text += " at " + where(reinterpret_cast<const void*>(high | cell.pc));
  fail(text, at);
}

void record(Region& region, uintptr_t address, size_t size, uint8_t flags, Thread& self, const void* at, int agent,
            uint32_t agent_tick) {
  const uint8_t kind = flags & (kWrite | kAtomic);
  const Cell now{agent < 0 ? self.tick : agent_tick,
                 run_state->serial,
                 static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at)),
                 static_cast<uint16_t>(agent < 0 ? self.id : agent),
                 0,
                 kind};
  const uintptr_t end = address + size;
  for (uintptr_t granule = address / 8; granule * 8 < end; ++granule) {
    const unsigned low = granule * 8 < address ? static_cast<unsigned>(address - granule * 8) : 0;
    const unsigned high = end - granule * 8 < 8 ? static_cast<unsigned>(end - granule * 8) : 8;
    const uint8_t mask = static_cast<uint8_t>((1u << high) - (1u << low));
    Cell* cells = region.cells + (granule - region.begin / 8) * 4;
    int slot = -1;
    for (int i = 0; i < 4; ++i) {
      const Cell& cell = cells[i];
      if (cell.run == 0 || (region.block != nullptr && cell.run != run_state->serial)) {
        slot = slot < 0 ? i : slot;
        continue;
      }
      if (!(cell.mask & mask)) continue;
      const bool clash = ((cell.flags | kind) & kWrite) && !(cell.flags & kind & kAtomic);
      const bool before = ordered(cell, self);
      if ((flags & kAsync) && before && cell.run == run_state->serial && (cell.flags & kWrite) &&
          !(cell.flags & kAsync) && run_state->threads[cell.thread].async_fence < cell.tick &&
          (*self.async_fence_base)[cell.thread] < cell.tick)
        fail("no fence_proxy_async between the write of " + place(address) + " by " +
                 name_of(run_state->threads[cell.thread]) + " and this asynchronous read",
             at);
      if (clash && !before) race(cell, address, size, flags, at);
      // What happened before and is no weaker is no longer needed.
      if (before && (cell.mask & ~mask) == 0 && (kind & kWrite || !(cell.flags & kWrite))) slot = i;
    }
    if (slot < 0) slot = static_cast<int>(random_bits() % 4);
    cells[slot] = now;
    cells[slot].mask = mask;
  }
}

[[noreturn]] void out_of_bounds(uintptr_t address, size_t size, uint8_t flags, const void* at) {
  fail("out of bounds: " + access_text(size, flags) + ", " + place(address), at);
}

}  // namespace

void begin_checks() {
  atomic_sync.clear();
  constants.clear();
}
void begin_block_checks() { acquired_runs.clear(); }

void check_exit(Block& block) {
  if (run_state->blocks.size() == 1) return;
  Clock known(current->base->size(), 0);
  for (const Thread& thread : run_state->threads)
    if (thread.block == &block)
      for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], (*thread.base)[i]);
  for (size_t i = 0; i < block.shared.cell_count(); ++i) {
    const Cell& cell = block.shared.cells[i];
    if (cell.run != run_state->serial || cell.thread >= run_state->threads.size()) continue;
    const Thread& other = run_state->threads[cell.thread];
    const void* at =
        reinterpret_cast<const void*>((reinterpret_cast<uintptr_t>(other.waits_at) & ~uintptr_t{0xffffffff}) | cell.pc);
    if (other.block != &block && known[other.id] < cell.tick)
      fail("its block exits, not ordered after the access to its shared memory by " + name_of(other), at);
  }
}

void check(uintptr_t address, size_t size, uint8_t flags, const void* at, int agent, uint32_t agent_tick) {
  Thread& self = *current;
  if (address - reinterpret_cast<uintptr_t>(self.stack) < kStackBytes) return;
  Region* region = region_of(address);
  if (region == nullptr) {
    if (!(flags & kWrite) &&
        ((address >= run_state->arguments && address + size <= run_state->arguments_end) || is_constant(address)))
      return;
    out_of_bounds(address, size, flags, at);
  }
  if (address + size > region->end) out_of_bounds(address, size, flags, at);
  const uintptr_t offset = address - region->begin;
  if (region->block != nullptr) {
    if (region->block != self.block && region->block->alive == 0)
      fail("shared memory of a block that has exited: " + place(address), at);
    for (size_t i = 0; i < size; ++i) {
      if (region->writing[offset + i])
        fail(
            "in flight: " + access_text(size, flags) + ", " + place(address) + ", into which a copy is still under way",
            at);
      if ((flags & kWrite) && region->reading[offset + i])
        fail("in flight: " + access_text(size, flags) + ", " + place(address) +
                 ", which an asynchronous operation still reads",
             at);
    }
  }
  if (std::memchr(region->poison + offset, kNowhere, size) != nullptr) out_of_bounds(address, size, flags, at);
  if (flags & kWrite && !(flags & kAtomic)) {
    std::memset(region->poison + offset, 0, size);
  } else if (std::memchr(region->poison + offset, kUnwritten, size) != nullptr) {
    fail("uninitialised: " + access_text(size, flags) + ", " + place(address) + ", which was never written", at);
  }
  record(*region, address, size, flags, self, at, agent, agent_tick);
}

void record_async_write(uintptr_t address, size_t size, int agent, uint32_t tick) {
  Region& region = *region_of(address);
  std::memset(region.poison + (address - region.begin), 0, size);
  for (uintptr_t granule = address / 8; granule * 8 < address + size; ++granule) {
    Cell* cells = region.cells + (granule - region.begin / 8) * 4;
    for (int i = 1; i < 4; ++i) cells[i].run = 0;
    cells[0] = {tick, run_state->serial, 0, static_cast<uint16_t>(agent), 0xff, kWrite | kAsync};
  }
}

void thread_fence() {
  Thread& self = *current;
  if (const ClockRef known = self.unfenced.take()) acquire(self, known);
  acquired_runs.insert(self.unfenced_runs.begin(), self.unfenced_runs.end());
  self.unfenced_runs.clear();
  self.fence_base = self.base;
  self.fence_tick = self.tick++;
}

void check_alignment(uintptr_t address, size_t size, uint8_t flags, const void* at, size_t alignment) {
  if (address % (alignment == 0 ? size : alignment) != 0)
    fail("misaligned: " + access_text(size, flags) + ", " + place(address), at);
}
void check_read(const void* pointer, size_t size, const void* at) {
  check_alignment(reinterpret_cast<uintptr_t>(pointer), size, kRead, at);
  check(reinterpret_cast<uintptr_t>(pointer), size, kRead, at);
}
void check_write(void* pointer, size_t size, const void* at) {
  check_alignment(reinterpret_cast<uintptr_t>(pointer), size, kWrite, at);
  check(reinterpret_cast<uintptr_t>(pointer), size, kWrite, at);
}
static AtomicSync& sync_of(uintptr_t address) {
  AtomicSync& sync = atomic_sync[address];
  if (sync.clock_run != run_state->serial) {
    sync.clock = {};
    sync.clock_run = run_state->serial;
  }
  return sync;
}
void check_atomic(void* pointer, size_t size, const void* at) {
  if (random_bits() % 4 == 0) yield();
  Thread& self = *current;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  check_alignment(address, size, kAtomic, at);
  AtomicSync& sync = sync_of(address);
  self.unfenced_runs.insert(self.unfenced_runs.end(), sync.runs.begin(), sync.runs.end());
  if (sync.clock.of != nullptr) self.unfenced.join(sync.clock.of);
  if (self.fence_tick > 0) {
    sync.clock.join(self.fence_base);
    sync.clock.set(self.id, self.fence_tick);
    if (sync.runs.empty() || sync.runs.back() != run_state->serial) sync.runs.push_back(run_state->serial);
  }
  check(address, size, kWrite | kAtomic, at);
}
void check_acquire(const void* pointer, size_t size, const void* at) {
  if (random_bits() % 4 == 0) yield();
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  check_alignment(address, size, kAtomic, at);
  const AtomicSync& sync = sync_of(address);
  acquired_runs.insert(sync.runs.begin(), sync.runs.end());
  if (sync.clock.of != nullptr) acquire(*current, sync.clock.of);
  check(address, size, kAtomic, at);
}

}  // namespace simt
