// Every load and store of a kernel comes here (by hooks.cpp): bounds, initialisation, asynchronous copies under way,
// races.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "executor.h"
#include "memory.h"

namespace simt {

namespace {

struct Registered {
  uintptr_t begin, end;
  bool initialised;
  int64_t scope;
};
std::vector<Registered> registered;
std::vector<Region> regions;  // of global memory: `registered` with overlaps merged, sorted
bool stale = false;           // regions do not reflect `registered`
int64_t next_scope = 1;
Region* last_region = nullptr;
char* shared_base = nullptr;

// Atomics order blocks and threads if they fenced before: by address.
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

uint8_t* reserve(size_t bytes) {  // zero
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: out of memory");
  return static_cast<uint8_t*>(memory);
}

size_t cell_count(const Region& region) { return ((region.end + 7) / 8 - region.begin / 8) * 4; }

void create(Region& region) {
  region.poison = reserve(region.end - region.begin);
  region.cells = reinterpret_cast<Cell*>(reserve(cell_count(region) * sizeof(Cell)));
}
void destroy(Region& region) {
  munmap(region.poison, region.end - region.begin);
  munmap(region.cells, cell_count(region) * sizeof(Cell));
}

void rebuild() {
  for (Region& region : regions) destroy(region);
  regions.clear();
  last_region = nullptr;
  std::vector<Registered> sorted = registered;
  std::sort(sorted.begin(), sorted.end(), [](const Registered& a, const Registered& b) { return a.begin < b.begin; });
  for (const Registered& part : sorted) {
    if (regions.empty() || part.begin >= regions.back().end)
      regions.push_back({part.begin, part.end, nullptr, nullptr});
    else regions.back().end = std::max(regions.back().end, part.end);
  }
  for (Region& region : regions) create(region);
  for (const bool initialised : {false, true})  // where arrays overlap, initialised wins
    for (const Registered& part : sorted) {
      if (part.initialised != initialised) continue;
      Region& region = *(std::upper_bound(regions.begin(), regions.end(), part.begin,
                                          [](uintptr_t a, const Region& r) { return a < r.begin; }) -
                         1);
      uint8_t* poison = region.poison + (part.begin - region.begin);
      if (!initialised || std::memchr(poison, 1, part.end - part.begin) != nullptr)
        std::memset(poison, !initialised, part.end - part.begin);
    }
  stale = false;
}

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

std::string place(uintptr_t address) {
  char text[96];
  const int64_t offset = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(shared_base));
  if (shared_base != nullptr && offset >= 0 && offset < static_cast<int64_t>(kMaxCluster * kSharedWindow)) {
    const int64_t rank = offset / static_cast<int64_t>(kSharedWindow);
    std::snprintf(
        text, sizeof text, "shared memory at byte %lld%s",
        static_cast<long long>(offset % static_cast<int64_t>(kSharedWindow)),
        current != nullptr && rank == current->block->rank ? "" : (" of cluster rank " + std::to_string(rank)).c_str());
    return text;
  }
  const Region* nearest = nullptr;  // an index beyond an array's end is likelier than one before its begin
  for (const Region& region : regions)
    if (address + 4096 >= region.begin && address < region.end + 4096 &&
        (nearest == nullptr || address >= region.begin))
      nearest = &region;
  if (nearest != nullptr)
    std::snprintf(text, sizeof text, "byte %lld of an array of %llu bytes",
                  static_cast<long long>(address - nearest->begin),
                  static_cast<unsigned long long>(nearest->end - nearest->begin));
  else
    std::snprintf(text, sizeof text, "address 0x%llx, which is in no registered array",
                  static_cast<unsigned long long>(address));
  return text;
}

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

// ---- memory ----

Memory::Memory() : id_(next_scope++) {}
Memory::~Memory() {
  registered.erase(
      std::remove_if(registered.begin(), registered.end(), [this](const Registered& r) { return r.scope == id_; }),
      registered.end());
  stale = true;
}
void Memory::add(const void* data, int64_t bytes, bool initialised) {
  if (data == nullptr || bytes <= 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  registered.push_back({begin, begin + static_cast<uintptr_t>(bytes), initialised, id_});
  stale = true;
}

char* shared_window(int rank) { return shared_base + rank * kSharedWindow; }

void begin_memory() {
  if (stale) rebuild();
  atomic_sync.clear();
  constants.clear();
  if (shared_base == nullptr) shared_base = reinterpret_cast<char*>(reserve(kMaxCluster * kSharedWindow));
}

// Static variables are reset where they are placed. Cells of earlier blocks are known by their `run`.
static void reset_shared(Region& region, size_t offset, size_t bytes) {
  std::memset(region.poison + offset, kUnwritten, bytes);
  std::memset(region.writing + offset, 0, bytes);
  std::memset(region.reading + offset, 0, bytes);
  std::memset(reinterpret_cast<char*>(region.begin) + offset, 0xA5, bytes);
}

void begin_block_memory(Block& block, int64_t dynamic_bytes) {
  static uint8_t* poison = reserve(kMaxCluster * kSharedWindow);
  static uint8_t* writing = reserve(kMaxCluster * kSharedWindow);
  static uint8_t* reading = reserve(kMaxCluster * kSharedWindow);
  static Cell* cells = reinterpret_cast<Cell*>(reserve(kMaxCluster * kSharedWindow / 8 * 4 * sizeof(Cell)));
  if (block.rank == 0) acquired_runs.clear();
  const size_t offset = block.rank * kSharedWindow;
  Region& region = block.shared;
  region.begin = reinterpret_cast<uintptr_t>(shared_window(block.rank));
  region.end = region.begin + static_cast<uintptr_t>(dynamic_bytes);
  region.poison = poison + offset;
  region.writing = writing + offset;
  region.reading = reading + offset;
  region.cells = cells + offset / 8 * 4;
  region.block = &block;
  reset_shared(region, 0, static_cast<size_t>(dynamic_bytes));
}

char* dynamic_shared() { return shared_window(current->block->rank); }

// At the same place in every block of the cluster.
void* static_shared(const void* key, size_t bytes, size_t alignment) {
  Run& run = *run_state;
  for (const auto& [known, offset] : run.statics)
    if (known == key) return shared_window(current->block->rank) + offset;
  constexpr int64_t kGap = 128;
  const int64_t align = static_cast<int64_t>(alignment);
  const int64_t offset = (run.shared_end + kGap + align - 1) / align * align;
  run.shared_end = offset + static_cast<int64_t>(bytes);
  run.shared_used = (run.shared_used + align - 1) / align * align + static_cast<int64_t>(bytes);
  if (run.shared_used > kSharedLimit || run.shared_end > static_cast<int64_t>(kSharedWindow))
    fail("more than " + std::to_string(kSharedLimit) + " bytes of shared memory", SIMT_CALLER);
  for (Block& block : run.blocks) {
    const size_t end = block.shared.end - block.shared.begin;
    std::memset(block.shared.poison + end, kNowhere, static_cast<size_t>(offset) - end);
    reset_shared(block.shared, static_cast<size_t>(offset), bytes);
    block.shared.end = block.shared.begin + static_cast<uintptr_t>(run.shared_end);
  }
  run.statics.push_back({key, offset});
  return shared_window(current->block->rank) + offset;
}

void check_exit(Block& block) {
  if (run_state->blocks.size() == 1) return;
  Clock known(current->base->size(), 0);
  for (const Thread& thread : run_state->threads)
    if (thread.block == &block)
      for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], (*thread.base)[i]);
  for (size_t i = 0; i < cell_count(block.shared); ++i) {
    const Cell& cell = block.shared.cells[i];
    if (cell.run != run_state->serial || cell.thread >= run_state->threads.size()) continue;
    const Thread& other = run_state->threads[cell.thread];
    const void* at =
        reinterpret_cast<const void*>((reinterpret_cast<uintptr_t>(other.waits_at) & ~uintptr_t{0xffffffff}) | cell.pc);
    if (other.block != &block && known[other.id] < cell.tick)
      fail("its block exits, not ordered after the access to its shared memory by " + name_of(other), at);
  }
}

Region* region_of(uintptr_t address) {
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(shared_base);
  if (offset < kMaxCluster * kSharedWindow) {
    const size_t rank = offset / kSharedWindow;
    if (rank >= run_state->blocks.size()) return nullptr;
    Region& region = run_state->blocks[rank].shared;
    return address < region.end ? &region : nullptr;
  }
  if (last_region != nullptr && address >= last_region->begin && address < last_region->end) return last_region;
  auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                [](uintptr_t a, const Region& r) { return a < r.begin; });
  if (after == regions.begin() || address >= (after - 1)->end) return nullptr;
  return last_region = &*(after - 1);
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

void thread_fence() { current->fenced = true; }

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
void check_atomic(void* pointer, size_t size, const void* at) {
  if (random_bits() % 4 == 0) yield();
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  check_alignment(address, size, kAtomic, at);
  AtomicSync& sync = atomic_sync[address];
  if (sync.clock_run != run_state->serial) {
    sync.clock = {};
    sync.clock_run = run_state->serial;
  }
  for (uint32_t other : sync.runs) acquired_runs.insert(other);
  if (sync.clock.of != nullptr) acquire(*current, std::make_shared<Clock>(*sync.clock.of));
  if (current->fenced) {
    publish(sync.clock);
    if (sync.runs.empty() || sync.runs.back() != run_state->serial) sync.runs.push_back(run_state->serial);
  }
  check(address, size, kWrite | kAtomic, at);
}

static Region& host_access(const void* data, size_t bytes, const char* name) {
  if (stale) rebuild();
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  Region* region = nullptr;
  for (Region& candidate : regions)
    if (address >= candidate.begin && address + bytes <= candidate.end) region = &candidate;
  if (region == nullptr)
    throw std::runtime_error("simt: " + std::string(name) + ": out of bounds: " + std::to_string(bytes) + " bytes, " +
                             place(address));
  return *region;
}
void device_memset(void* data, int value, size_t bytes, const char* name) {
  Region& region = host_access(data, bytes, name);
  std::memset(data, value, bytes);
  std::memset(region.poison + (reinterpret_cast<uintptr_t>(data) - region.begin), 0, bytes);
}
void device_copy(void* to, const void* from, size_t bytes, const char* name) {
  Region& target = host_access(to, bytes, name);
  Region& source = host_access(from, bytes, name);
  std::memmove(to, from, bytes);
  std::memmove(target.poison + (reinterpret_cast<uintptr_t>(to) - target.begin),
               source.poison + (reinterpret_cast<uintptr_t>(from) - source.begin), bytes);
}

}  // namespace simt
