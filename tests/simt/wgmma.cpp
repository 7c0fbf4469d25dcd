// wgmma: issued by 128 threads one after another, performed when one of them waits for it.
#include <algorithm>
#include <deque>

#include "tensor.h"

namespace simt {

namespace {

struct Product {
  int kind, n, group, arrived = 0, waited = 0;
  bool accumulate, a_in_registers, performed = false;
  uint64_t a, b;
  uint32_t* d[128];
  uint32_t registers[128][4];
  const void* at;
  int agent;  // who reads the operands, and its clock then
  uint32_t tick;
  ClockRef clock_before, clock_after;  // the last clock that learnt of it
  std::vector<uint32_t> before[128];   // d as it was, if no product under way already has it
};

struct Warpgroup {
  std::deque<Product> products;  // the first has number `first`
  size_t first = 0;
  uint32_t ticks = 0;
  size_t issued[128] = {}, finished[128] = {};
  int groups[128] = {};
  bool fenced[128] = {};
  std::vector<Thread*> waiting;
};
std::vector<Warpgroup> warpgroups;

int warpgroups_per_block() { return (current->block->threads + 127) / 128; }
Warpgroup& my_warpgroup() {
  const int in_block = current->id - current->block->rank * current->block->threads;
  return warpgroups[current->block->rank * warpgroups_per_block() + in_block / 128];
}
int my_place() { return (current->id - current->block->rank * current->block->threads) % 128; }

// The 16 bytes at row r, byte 16 c of a K step, of the operand a descriptor names.
char* chunk(uint64_t descriptor, int row, int c) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4,
                 stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address =
      start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8) * 128 + 16 * c;
  return shared_window(current->block->rank) + (address ^ (address >> 3 & 0x70));
}

template <typename F>
void for_chunks(const Product& p, F f) {
  for (int row = 0; !p.a_in_registers && row < 64; ++row)
    for (int c : {0, 1}) f(reinterpret_cast<uintptr_t>(chunk(p.a, row, c)));
  for (int row = 0; row < p.n; ++row)
    for (int c : {0, 1}) f(reinterpret_cast<uintptr_t>(chunk(p.b, row, c)));
}

void mark(const Product& p, int change) {
  Region& shared = current->block->shared;
  for_chunks(p, [&](uintptr_t address) {
    for (int i = 0; i < 16; ++i)
      shared.reading[address - shared.begin + i] =
          static_cast<uint8_t>(shared.reading[address - shared.begin + i] + change);
  });
}

void perform(Warpgroup& group, size_t index) {
  Product& p = group.products[index];
  const int k = depth(p.kind), e = elements_per_register(p.kind);
  std::vector<float> a(64 * k), b(static_cast<size_t>(k) * p.n);
  std::vector<uint32_t> d(static_cast<size_t>(64) * p.n, 0);
  auto row_elements = [&](uint64_t descriptor, int row, float* to) {
    for (int c : {0, 1}) {
      uint32_t words[4];
      std::memcpy(words, chunk(descriptor, row, c), 16);
      for (int w = 0; w < 4; ++w) decode(p.kind, words[w], to + c * k / 2 + w * e);
    }
  };
  float elements[32];
  for (int row = 0; !p.a_in_registers && row < 64; ++row) row_elements(p.a, row, &a[row * k]);
  for (int t = 0; p.a_in_registers && t < 128; ++t) place_a(p.kind, t % 32, p.registers[t], &a[t / 32 * 16 * k]);
  for (int row = 0; row < p.n; ++row) {
    row_elements(p.b, row, elements);
    for (int i = 0; i < k; ++i) b[i * p.n + row] = elements[i];
  }
  auto each = [&](auto f) {  // (thread, register, element of the 64 x n matrix)
    for (int t = 0; t < 128; ++t)
      for (int r = 0; r < p.n / 2; ++r)
        f(t, r, d[(t / 32 * 16 + t % 32 / 4 + 8 * (r >> 1 & 1)) * p.n + 8 * (r >> 2) + 2 * (t % 4) + (r & 1)]);
  };
  if (p.accumulate)
    each([&](int t, int r, uint32_t& element) { element = p.before[t].empty() ? p.d[t][r] : p.before[t][r]; });
  product(p.kind, 64, p.n, a.data(), b.data(), d.data());
  for (int t = 0; t < 128; ++t) {  // the next product on the same registers takes them over; they stay undefined
    Product* next = nullptr;
    for (size_t i = index + 1; i < group.products.size() && next == nullptr; ++i)
      if (group.products[i].d[t] == p.d[t] && group.products[i].before[t].empty()) next = &group.products[i];
    if (next != nullptr) next->before[t].resize(p.n / 2);
    uint32_t* to = next != nullptr ? next->before[t].data() : p.d[t];
    for (int r = 0; r < p.n / 2; ++r)
      to[r] = d[(t / 32 * 16 + t % 32 / 4 + 8 * (r >> 1 & 1)) * p.n + 8 * (r >> 2) + 2 * (t % 4) + (r & 1)];
  }
  mark(p, -1);
  p.performed = true;
}

// The current thread now comes after the product's reads: one thread's arrival on a barrier frees the operands.
void learn(Product& p) {
  if ((*current->base)[p.agent] >= p.tick) return;
  if (p.clock_before != current->base) {
    auto next = std::make_shared<Clock>(*current->base);
    (*next)[p.agent] = p.tick;
    p.clock_before = current->base;
    p.clock_after = next;
  }
  current->base = p.clock_after;
}

}  // namespace

void tensor_begin() {
  warpgroups.clear();
  warpgroups.resize(run_state->blocks.size() * ((run_state->blocks[0].threads + 127) / 128));
}

void wgmma(int kind, int n, void* d, const uint64_t* descriptor_a, const uint32_t* registers_a, uint64_t b,
           bool accumulate) {
  const void* at = SIMT_CALLER;
  Warpgroup& group = my_warpgroup();
  const int place = my_place();
  if (current->block->threads % 128 != 0) fail("wgmma: the block is no multiple of 128 threads", at);
  if (!group.fenced[place]) fail("wgmma: no wgmma_fence since the last wait", at);
  const size_t number = group.issued[place]++;
  if (number - group.first == group.products.size()) {
    group.products.emplace_back();
    Product& p = group.products.back();
    p.at = at;
    p.kind = kind;
    p.n = n;
    p.group = group.groups[place];
    p.accumulate = accumulate;
    p.a_in_registers = registers_a != nullptr;
    p.a = descriptor_a == nullptr ? 0 : *descriptor_a;
    p.b = b;
    std::fill_n(p.d, 128, nullptr);
    for (const uint64_t* descriptor : {descriptor_a, static_cast<const uint64_t*>(&b)}) {
      if (descriptor == nullptr) continue;
      if (*descriptor >> 62 != 1) fail("wgmma: the descriptor's swizzle is not the 128-byte one", at);
      if ((*descriptor << 4 & 0x380) != 0 || (*descriptor >> 49 & 7) != 0)
        fail("wgmma: the tile is not 1024-byte aligned", at);
    }
    const int block_threads = current->block->threads;
    p.agent = static_cast<int>(run_state->threads.size()) + current->block->rank * kAgents + 8 +
              current->id % block_threads / 128;
    p.tick = ++group.ticks;
    for_chunks(p, [&](uintptr_t address) { check(address, 16, kRead | kAsync, at, p.agent, p.tick); });
    mark(p, 1);
  }
  Product& p = group.products[number - group.first];
  if (p.kind != kind || p.n != n || p.accumulate != accumulate || p.b != b ||
      p.a_in_registers != (registers_a != nullptr) || (descriptor_a != nullptr && p.a != *descriptor_a) ||
      p.group != group.groups[place])
    fail("wgmma: other threads of the warpgroup issued another product", at);
  p.d[place] = static_cast<uint32_t*>(d);
  if (registers_a != nullptr) std::copy_n(registers_a, 4, p.registers[place]);
  bool owned = false;
  for (size_t i = 0; i + 1 < number - group.first + 1; ++i)
    owned = owned || (group.products[i].d[place] == d && !group.products[i].performed);
  if (!owned) {
    p.before[place].assign(p.d[place], p.d[place] + n / 2);
    std::fill_n(p.d[place], n / 2, 0x7fc0dead);  // not defined until the wait
  }
  if (++p.arrived == 128) {
    for (Thread* thread : group.waiting) wake(thread);
    group.waiting.clear();
  }
}

void tensor_thread_exit() {
  const Warpgroup& group = my_warpgroup();
  const size_t finished = group.finished[my_place()];
  if (group.issued[my_place()] != finished)
    fail("exits with a wgmma under way: wgmma_wait is missing", group.products[finished - group.first].at);
}

void wgmma_fence() { my_warpgroup().fenced[my_place()] = true; }
void wgmma_commit() { ++my_warpgroup().groups[my_place()]; }

void wgmma_wait(int groups) {
  const void* at = SIMT_CALLER;
  Warpgroup& group = my_warpgroup();
  const int place = my_place();
  const int until = group.groups[place] - groups;
  if (groups == 0 && group.issued[place] > group.first && group.issued[place] - group.first <= group.products.size() &&
      group.products[group.issued[place] - group.first - 1].group == group.groups[place])
    fail("wgmma_wait<0>: products were issued after the last wgmma_commit", at);
  for (size_t& number = group.finished[place]; number < group.issued[place]; ++number) {
    Product& p = group.products[number - group.first];  // stays where it is until all 128 have waited
    if (p.group >= until) break;
    while (p.arrived < 128) {
      group.waiting.push_back(current);
      wait_here("wgmma by the rest of the warpgroup", at);
    }
    if (!p.performed) perform(group, number - group.first);
    learn(p);
    ++p.waited;
  }
  while (!group.products.empty() && group.products.front().waited == 128) {
    group.products.pop_front();
    ++group.first;
  }
  group.fenced[place] = false;
}

}  // namespace simt
