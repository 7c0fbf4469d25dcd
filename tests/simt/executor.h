// Inside the host executor: fibers, clocks, memory. See README.md.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/arch.cuh"

namespace simt {

inline constexpr size_t kStackBytes = 256 << 10;
inline constexpr int kMaxCluster = 16;
inline constexpr int64_t kSharedLimit = 227 * 1024;  // of a block
inline constexpr size_t kSharedWindow = 512 << 10;   // address space of one block's shared memory
inline constexpr int kAgents =
    16;  // of a block, with clocks of their own: 8 for asynchronous copies, 8 for its warpgroups' wgmma

// ---- order: vector clocks ----
// Event (thread u, tick n) happened before thread t's present iff u == t or t.base[u] >= n.

using Clock = std::vector<uint32_t>;
using ClockRef = std::shared_ptr<const Clock>;

struct SyncClock {  // what a barrier's arrivals have published
  std::shared_ptr<Clock> of;
  ClockRef joined;  // the last base joined: lanes mostly share one
  void join(const ClockRef& other);
  void set(int id, uint32_t tick);
  ClockRef take();  // and start anew

 private:
  void own();
};

// ---- memory ----

struct Cell {  // one past access to some of an 8-byte granule; up to 4 are remembered
  uint32_t tick, run, pc;
  uint16_t thread;
  uint8_t mask, flags;
};
enum : uint8_t { kRead = 0, kWrite = 1, kAtomic = 2, kAsync = 4 };

enum : uint8_t { kUnwritten = 1, kNowhere = 2 };

struct Block;
struct Region {
  uintptr_t begin, end;
  uint8_t* poison;         // per byte: kUnwritten, or kNowhere between static shared variables
  Cell* cells;             // 4 per 8 bytes
  Block* block = nullptr;  // of shared memory
  // Shared memory only, per byte: asynchronous copies into it, and readers of it, under way.
  uint8_t *writing = nullptr, *reading = nullptr;

  size_t cell_count() const { return ((end + 7) / 8 - begin / 8) * 4; }
};

// ---- threads ----

struct Thread;
struct Barrier {
  int arrived = 0, expected = 0;
  uint32_t phase = 0;  // how often it was completed
  std::vector<Thread*> waiting;
  SyncClock clock;
  ClockRef done;  // of the last completed phase
};

struct Collective {  // one warp operation that some lanes have reached
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  void* lanes[32];
};

struct Async;  // a copy under way

struct Thread {
  void* stack_pointer;
  char* stack;
  uint3 index;
  int id, lane, warp;  // warp and id count through the cluster
  Block* block;
  bool done = false;
  const char* waits = nullptr;  // for what
  const void* waits_at = nullptr;
  ClockRef base;
  uint32_t tick = 1;
  // Atomics publish what the last __threadfence came after, and what they read is known from the next one on.
  ClockRef fence_base;
  uint32_t fence_tick = 0;
  SyncClock unfenced;
  std::vector<uint32_t> unfenced_runs;
  uint32_t async_fence = 0;  // fence_proxy_async: own accesses before this tick, others' before this clock
  ClockRef async_fence_base;
  std::vector<std::shared_ptr<Async>> copies, stores;  // cp.async and TMA stores not waited for
  int copy_groups = 0, store_groups = 0;               // committed
  uint32_t cluster_phase = 0;
  bool cluster_arrived = false;
};

struct Block {
  uint3 index;
  int rank, threads, alive;
  Region shared;
  Barrier barriers[16];
  int predicate_count = 0, predicate_result = 0;
};

// One block, or the blocks of one cluster, under way.
struct Run {
  const Launch* launch;
  uintptr_t arguments, arguments_end;
  uint32_t serial, launch_serial;                        // `serial` of this run and of the launch's first
  int64_t shared_used, shared_end;                       // by each block; with the gaps between variables
  std::vector<std::pair<const void*, int64_t>> statics;  // static shared variables: key, offset
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<std::vector<Collective*>> collectives;  // by warp
  Barrier cluster_barrier;
  std::vector<Thread*> ready;
  int alive = 0;
  std::string error;
};

extern Run* run_state;
extern Thread* current;  // null outside kernels

uint32_t random_bits();
void wait_here(const char* what, const void* at);  // leaves the fiber until wake()
void wake(Thread* thread);
[[noreturn]] void fail(const std::string& message, const void* at);
std::string where(const void* at);                    // "topk.cu:123", with the callers it was inlined into
std::string name_of(const Thread& thread);            // "block (1,0,0) thread (5,0,0)"
std::string place(uintptr_t address);                 // "shared memory at byte 16", "byte 4 of an array of 400 bytes"
std::string access_text(size_t size, uint8_t flags);  // "read of 4 bytes"

void publish(SyncClock& clock);  // the current thread's past goes into the clock
void acquire(Thread& thread, const ClockRef& clock);
void complete_if_full(Barrier& barrier, int expected);
void warp_collective(uint32_t mask, const char* name, void* mine, void (*compute)(uint32_t mask, void** lanes),
                     const void* at);

void begin_memory();  // of a launch
void begin_block_memory(Block& block, int64_t dynamic_bytes);
void begin_checks();
void begin_block_checks();
void check_exit(Block& block);  // nobody else may still access its shared memory
Region* region_of(uintptr_t address);
// An access of the current thread; asynchronous readers are remembered by their agent.
void check(uintptr_t address, size_t size, uint8_t flags, const void* at, int agent = -1, uint32_t agent_tick = 0);
void check_alignment(uintptr_t address, size_t size, uint8_t flags, const void* at, size_t alignment = 0);
void record_async_write(uintptr_t address, size_t size, int agent, uint32_t tick);
char* shared_window(int rank);

void async_begin();  // of a run
bool async_step();   // performs one pending asynchronous operation; false if there is none
void async_thread_exit();
void tensor_begin();  // of a run
void tensor_thread_exit();

}  // namespace simt
