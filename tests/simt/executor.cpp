// Fibers, the scheduler, barriers.
#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <utility>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

Run* run_state = nullptr;
Thread* current = nullptr;

namespace {

uint64_t random_state;
uint32_t next_serial = 1;
void* scheduler_stack_pointer;
void (*body_function)(void*);
void* body_context;

[[noreturn]] void fiber_main();

// ---- switching ----

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
// Pushes the callee-saved registers, stores the stack pointer to *rdi, continues at the stack pointer rsi.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

void prepare(Thread& thread) {
  void** top =
      reinterpret_cast<void**>(thread.stack + kStackBytes) - 3;  // fiber_main's stack is 8 off 16, as after a call
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  thread.stack_pointer = top - 6;
}
void enter(Thread& thread) { simt_switch(&scheduler_stack_pointer, thread.stack_pointer); }
void leave(Thread& thread) { simt_switch(&thread.stack_pointer, scheduler_stack_pointer); }
#else
std::map<Thread*, ucontext_t> contexts;
ucontext_t scheduler_context;
void prepare(Thread& thread) {
  ucontext_t& context = contexts[&thread];
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, reinterpret_cast<void (*)()>(&fiber_main), 0);
}
void enter(Thread& thread) { swapcontext(&scheduler_context, &contexts[&thread]); }
void leave(Thread& thread) { swapcontext(&contexts[&thread], &scheduler_context); }
#endif

void fiber_main() {
  Thread& self = *current;
  body_function(body_context);
  async_thread_exit();
  tensor_thread_exit();
  self.done = true;
  --run_state->alive;
  Block& block = *self.block;
  if (block.alive == 1) check_exit(block);
  --block.alive;
  complete_if_full(block.barriers[0], block.alive);  // exited threads are not waited for
  complete_if_full(run_state->cluster_barrier, run_state->alive);
  leave(self);
  std::abort();
}

char* stack_of(size_t i) {  // kept for the life of the process; the lowest page is a guard
  static std::vector<char*> stacks;
  while (stacks.size() <= i) {
    void* memory =
        mmap(nullptr, kStackBytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE) != 0)
      throw std::runtime_error("simt: no memory for stacks");
    stacks.push_back(static_cast<char*>(memory) + 4096);
  }
  return stacks[i];
}

std::string deadlock() {
  struct Group {
    int count = 0;
    const Thread* first = nullptr;
  };
  std::map<std::pair<const void*, std::string>, Group> groups;  // by place and what they wait for
  for (const Thread& thread : run_state->threads) {
    Group& group = groups[thread.done ? std::pair(static_cast<const void*>(nullptr), std::string("exited"))
                                      : std::pair(thread.waits_at, "waiting for " + std::string(thread.waits))];
    if (group.count++ == 0) group.first = &thread;
  }
  std::string text = "deadlock";
  for (const auto& [key, group] : groups)
    text += "\n  " + std::to_string(group.count) + " threads from " + name_of(*group.first) + ": " + key.second +
            (key.first == nullptr ? "" : " at " + where(key.first));
  return text;
}

struct Abandoned {};
bool on_fiber = false;

void run_blocks(Run& state) try {
  while (state.alive > 0 && state.error.empty()) {
    if ((state.ready.empty() || random_bits() % 8 == 0) && async_step()) continue;
    if (state.ready.empty()) {
      state.error = "simt: " + std::string(state.launch->name) + ": " + deadlock();
      break;
    }
    const size_t pick = random_bits() % state.ready.size();
    current = state.ready[pick];
    state.ready[pick] = state.ready.back();
    state.ready.pop_back();
    on_fiber = true;
    enter(*current);
    on_fiber = false;
    current = nullptr;
  }
  if (state.error.empty() && async_step())
    state.error = std::string("simt: ") + state.launch->name +
                  ": a block ended while copies into its shared memory were under way";
} catch (const Abandoned&) {  // state.error says why
}

}  // namespace

uint32_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545F4914F6CDD1Dull) >> 32);
}

static std::vector<std::string> launches;

std::vector<std::string> take_launches() { return std::exchange(launches, {}); }

void run(const Launch& launch, void (*body)(void*), void* context, size_t context_bytes) {
  if (current != nullptr) throw std::logic_error("simt: launch inside a kernel");
  launches.push_back(launch.name);
  const std::string name = std::string("simt: ") + launch.name + ": ";
  const int64_t block_threads = int64_t{launch.block.x} * launch.block.y * launch.block.z;
  const int64_t blocks = int64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  auto want = [&](bool good, const std::string& what) {
    if (!good) throw std::runtime_error(name + what);
  };
  want(block_threads >= 1 && block_threads <= 1024,
       "a block has 1 to 1024 threads, got " + std::to_string(block_threads));
  want(blocks >= 1 && launch.grid.y <= 65535 && launch.grid.z <= 65535 && launch.grid.x <= 0x7fffffff, "bad grid");
  want(launch.cluster >= 1 && launch.cluster <= kMaxCluster && launch.grid.x % launch.cluster == 0,
       "the grid's x, " + std::to_string(launch.grid.x) + ", is no multiple of the cluster, " +
           std::to_string(launch.cluster));
  want(launch.shared_bytes >= 0 && launch.shared_bytes <= kSharedLimit,
       "dynamic shared memory is at most 232448 bytes, got " + std::to_string(launch.shared_bytes));
  const char* seed = std::getenv("PYCM_SIMT_SEED");
  random_state = 0x9E3779B97F4A7C15ull * (1 + (seed ? std::strtoull(seed, nullptr, 10) : 0));
  body_function = body;
  body_context = context;
  const uint32_t launch_serial = next_serial;
  // The blocks of one run.
  const int together = launch.cooperative ? static_cast<int>(blocks) : launch.cluster;
  want(together <= kMaxCluster && (!launch.cooperative || launch.cluster == 1),
       "a cooperative grid has at most " + std::to_string(kMaxCluster) + " blocks here and no clusters");
  const int threads = static_cast<int>(block_threads) * together;
  begin_memory();
  for (int64_t first = 0; first < blocks; first += together) {
    Run state;
    state.launch = &launch;
    state.arguments = reinterpret_cast<uintptr_t>(context);
    state.arguments_end = state.arguments + context_bytes;
    state.serial = next_serial++;
    state.launch_serial = launch_serial;
    state.blocks.resize(together);
    state.threads.resize(threads);
    state.collectives.resize((block_threads + 31) / 32 * together);
    state.alive = threads;
    state.shared_used = state.shared_end = launch.shared_bytes;
    run_state = &state;
    const ClockRef start = std::make_shared<Clock>(threads + kAgents * together, 0);
    for (int rank = 0; rank < together; ++rank) {
      Block& block = state.blocks[rank];
      const int64_t linear = first + rank;
      block.index = {static_cast<unsigned>(linear % launch.grid.x),
                     static_cast<unsigned>(linear / launch.grid.x % launch.grid.y),
                     static_cast<unsigned>(linear / launch.grid.x / launch.grid.y)};
      block.rank = rank;
      block.threads = block.alive = static_cast<int>(block_threads);
      begin_block_memory(block, launch.shared_bytes);
      for (int i = 0; i < block.threads; ++i) {
        Thread& thread = state.threads[rank * block.threads + i];
        thread.id = rank * block.threads + i;
        thread.lane = i % 32;
        thread.warp = static_cast<int>((block_threads + 31) / 32) * rank + i / 32;
        thread.index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y};
        thread.block = &block;
        thread.stack = stack_of(thread.id);
        thread.base = thread.async_fence_base = start;
        prepare(thread);
        state.ready.push_back(&thread);
      }
    }
    async_begin();
    tensor_begin();
    run_blocks(state);
    on_fiber = false;
    current = nullptr;
    run_state = nullptr;
    for (auto& warp : state.collectives)
      for (Collective* collective : warp) delete collective;
    if (!state.error.empty()) throw std::runtime_error(state.error);
  }
}

// ---- blocking ----

void fail(const std::string& message, const void* at) {  // the fibers of this run are never entered again
  run_state->error = std::string("simt: ") + run_state->launch->name + ": " + name_of(*current) + ": " + message +
                     "\n  at " + where(at);
  if (!on_fiber) throw Abandoned{};
  leave(*current);
  std::abort();
}

void wait_here(const char* what, const void* at) {
  Thread& self = *current;
  self.waits = what;
  self.waits_at = at;
  leave(self);
}

void wake(Thread* thread) { run_state->ready.push_back(thread); }

void yield() {
  Thread& self = *current;
  run_state->ready.push_back(&self);
  leave(self);
}

void trap() { fail("__trap", SIMT_CALLER); }

void complete_if_full(Barrier& barrier, int expected) {
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  const ClockRef clock = barrier.done = barrier.clock.take();
  barrier.arrived = barrier.expected = 0;
  ++barrier.phase;
  std::vector<Thread*> woken;
  woken.swap(barrier.waiting);
  for (Thread* thread : woken) {
    acquire(*thread, clock);
    if (thread != current) wake(thread);
  }
}

// The current thread arrives; with `waiter` it also waits. `expected` of 0: all that are alive in the block.
static void arrive(Barrier& barrier, int expected, bool waits, const char* what, const void* at) {
  publish(barrier.clock);
  ++barrier.arrived;
  if (waits) barrier.waiting.push_back(current);
  if (barrier.arrived >= expected) complete_if_full(barrier, expected);
  else if (waits) wait_here(what, at);
}

void sync_threads() {
  Block& block = *current->block;
  arrive(block.barriers[0], block.alive, true, "__syncthreads", SIMT_CALLER);
}

int sync_threads_count(bool predicate) {
  Block& block = *current->block;
  if (block.barriers[0].arrived == 0) block.predicate_count = 0;
  block.predicate_count += predicate;
  if (block.barriers[0].arrived + 1 == block.alive) block.predicate_result = block.predicate_count;
  arrive(block.barriers[0], block.alive, true, "__syncthreads_count", SIMT_CALLER);
  return block.predicate_result;
}

static void named_barrier(int id, int threads, bool waits, const void* at) {
  const std::string name = "named barrier " + std::to_string(id);
  if (id < 0 || id > 15) fail(name + ": the id must be in [0, 15]", at);
  if (threads <= 0 || threads % 32 != 0 || threads > (current->block->threads + 31) / 32 * 32)
    fail(name + ": " + std::to_string(threads) + " threads is no multiple of 32 within the block", at);
  Barrier& barrier = current->block->barriers[id];
  if (barrier.arrived > 0 && barrier.expected != threads)
    fail(name + ": others came for " + std::to_string(barrier.expected) + " threads, this one for " +
             std::to_string(threads),
         at);
  barrier.expected = threads;
  static const char* const kNames[16] = {
      "named barrier 0",  "named barrier 1",  "named barrier 2",  "named barrier 3",
      "named barrier 4",  "named barrier 5",  "named barrier 6",  "named barrier 7",
      "named barrier 8",  "named barrier 9",  "named barrier 10", "named barrier 11",
      "named barrier 12", "named barrier 13", "named barrier 14", "named barrier 15"};
  arrive(barrier, threads, waits, kNames[id], at);
}
void named_barrier_sync(int id, int threads) { named_barrier(id, threads, true, SIMT_CALLER); }
void named_barrier_arrive(int id, int threads) { named_barrier(id, threads, false, SIMT_CALLER); }

void cluster_arrive() {
  Thread& self = *current;
  if (self.cluster_arrived) fail("cluster_arrive: twice without cluster_wait", SIMT_CALLER);
  self.cluster_arrived = true;
  self.cluster_phase = run_state->cluster_barrier.phase;
  arrive(run_state->cluster_barrier, run_state->alive, false, "", nullptr);
}
void cluster_wait() {
  Thread& self = *current;
  if (!self.cluster_arrived) fail("cluster_wait: without cluster_arrive", SIMT_CALLER);
  self.cluster_arrived = false;
  Barrier& barrier = run_state->cluster_barrier;
  if (barrier.phase != self.cluster_phase) return acquire(self, barrier.done);
  barrier.waiting.push_back(&self);
  wait_here("cluster_wait", SIMT_CALLER);
}
uint32_t cluster_rank() { return static_cast<uint32_t>(current->block->rank); }
uint32_t cluster_size() { return static_cast<uint32_t>(run_state->launch->cluster); }

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
dim3 block_dim() { return run_state->launch->block; }
dim3 grid_dim() { return run_state->launch->grid; }
int lane() { return current->lane; }

}  // namespace simt
