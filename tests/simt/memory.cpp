// What there is to access: the arrays that were registered, and shared memory.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "executor.h"

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

uint8_t* reserve(size_t bytes) {  // zero
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: out of memory");
  return static_cast<uint8_t*>(memory);
}

void create(Region& region) {
  region.poison = reserve(region.end - region.begin);
  region.cells = reinterpret_cast<Cell*>(reserve(region.cell_count() * sizeof(Cell)));
}
void destroy(Region& region) {
  munmap(region.poison, region.end - region.begin);
  munmap(region.cells, region.cell_count() * sizeof(Cell));
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
  begin_checks();
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
  if (block.rank == 0) begin_block_checks();
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
