// TMA, bulk copies, and what a block does to the shared memory of others in its cluster.
#include <algorithm>

#include "async.h"

namespace simt {

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
