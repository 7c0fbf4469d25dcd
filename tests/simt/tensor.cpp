// Tensor cores: ldmatrix, mma.sync and wgmma, with the fragment layouts of the PTX ISA (stated in csrc/cuda/mma.cuh).
#pragma GCC optimize("O3")

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>

#include "executor.h"

namespace simt {

namespace {

constexpr int kF16 = 0, kBF16 = 1, kTF32 = 2, kS8 = 3;  // of pycm::cuda::Mma

int elements_per_register(int kind) { return kind == kS8 ? 4 : kind == kTF32 ? 1 : 2; }
int depth(int kind) { return 8 * elements_per_register(kind); }  // K of one instruction

void decode(int kind, uint32_t bits, float* to) {
  if (kind == kTF32) to[0] = from_bits<float>(bits & 0xffffe000u);  // the hardware ignores the low 13 bits
  for (int i = 0; kind != kTF32 && i < elements_per_register(kind); ++i)
    to[i] = kind == kS8     ? static_cast<float>(static_cast<int8_t>(bits >> (8 * i)))
            : kind == kBF16 ? from_bits<float>(bits >> (16 * i) << 16)
                            : half_to_float(static_cast<uint16_t>(bits >> (16 * i)));
}

// d += a b, a m x k, b k x n. Products are exact in float; how the sum is rounded the PTX ISA leaves open.
void product_nearest(int m, int n, int k, const float* a, const float* b, float* d) {
  for (int i = 0; i < m; ++i)
    for (int p = 0; p < k; ++p) {
      const float factor = a[i * k + p];
      for (int j = 0; j < n; ++j) d[i * n + j] += factor * b[p * n + j];
    }
}

// The pessimistic reading: every addend of a group, the accumulator included, is cut to 2^-23 of the largest one's
// binade, and the sum is cut to float.
void product_truncated(int m, int n, int k, const float* a, const float* b, float* d) {
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double addends[33], largest = std::fabs(d[i * n + j]), sum = 0;
      addends[k] = d[i * n + j];
      for (int p = 0; p < k; ++p) {
        addends[p] = static_cast<double>(a[i * k + p]) * b[p * n + j];
        largest = std::max(largest, std::fabs(addends[p]));
      }
      if (!(largest > 0) || !std::isfinite(largest)) {
        for (int p = 0; p <= k; ++p) sum += addends[p];
        d[i * n + j] = static_cast<float>(sum);
        continue;
      }
      const double quantum = std::ldexp(1.0, std::ilogb(largest) - 23);
      for (int p = 0; p <= k; ++p) sum += std::trunc(addends[p] / quantum) * quantum;
      float result = static_cast<float>(sum);
      if (std::fabs(static_cast<double>(result)) > std::fabs(sum)) result = std::nextafter(result, 0.0f);
      d[i * n + j] = result;
    }
}

void product(int kind, int m, int n, const float* a, const float* b, uint32_t* d) {
  const int k = depth(kind);
  if (kind == kS8) {
    for (int i = 0; i < m; ++i)
      for (int p = 0; p < k; ++p) {
        const int32_t factor = static_cast<int32_t>(a[i * k + p]);
        for (int j = 0; j < n; ++j) d[i * n + j] += static_cast<uint32_t>(factor * static_cast<int32_t>(b[p * n + j]));
      }
    return;
  }
  static const bool truncates = [] {
    const char* mode = std::getenv("PYCM_SIMT_MMA");
    return mode != nullptr && std::string(mode) == "truncate";
  }();
  (truncates ? product_truncated : product_nearest)(m, n, k, a, b, reinterpret_cast<float*>(d));
}

// The 16 x K fragment of one warp: a[r] of lane 4g + t is row g + 8 (r % 2), columns from 4e (r / 2) + e t.
void place_a(int kind, int lane, const uint32_t* registers, float* to) {
  const int e = elements_per_register(kind);
  for (int r = 0; r < 4; ++r)
    decode(kind, registers[r], to + (lane / 4 + 8 * (r & 1)) * depth(kind) + 4 * e * (r >> 1) + e * (lane % 4));
}

}  // namespace

void mma(int kind, void* d, const uint32_t* a, const uint32_t* b) {
  struct Lane {
    int kind;
    uint32_t* d;
    const uint32_t *a, *b;
  } mine{kind, static_cast<uint32_t*>(d), a, b};
  static const char* const kNames[] = {"mma<kF16>", "mma<kBF16>", "mma<kTF32>", "mma<kS8>"};
  warp_collective(
      0xffffffffu, kNames[kind], &mine,
      [](uint32_t, void** lanes) {
        auto lane = [&](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); };
        const int kind = lane(0).kind, k = depth(kind), e = elements_per_register(kind);
        float a[16 * 32], b[32 * 8], elements[4];
        uint32_t d[16 * 8];
        for (int i = 0; i < 32; ++i) {
          place_a(kind, i, lane(i).a, a);
          for (int r = 0; r < 2; ++r) {
            decode(kind, lane(i).b[r], elements);
            for (int j = 0; j < e; ++j) b[(4 * e * r + e * (i % 4) + j) * 8 + i / 4] = elements[j];
          }
          for (int j = 0; j < 4; ++j) d[(i / 4 + 8 * (j >> 1)) * 8 + 2 * (i % 4) + (j & 1)] = lane(i).d[j];
        }
        (void)k;
        product(kind, 16, 8, a, b, d);
        for (int i = 0; i < 32; ++i)
          for (int j = 0; j < 4; ++j) lane(i).d[j] = d[(i / 4 + 8 * (j >> 1)) * 8 + 2 * (i % 4) + (j & 1)];
      },
      SIMT_CALLER);
}

void mma_f64(double* d, double a, double b) {
  struct Lane {
    double* d;
    double a, b;
  } mine{d, a, b};
  warp_collective(
      0xffffffffu, "mma_f64", &mine,
      [](uint32_t, void** lanes) {
        auto lane = [&](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); };
        for (int i = 0; i < 32; ++i)
          for (int j = 0; j < 2; ++j)
            for (int p = 0; p < 4; ++p)
              lane(i).d[j] = std::fma(lane(i / 4 * 4 + p).a, lane((2 * (i % 4) + j) * 4 + p).b, lane(i).d[j]);
      },
      SIMT_CALLER);
}

// ---- ldmatrix, stmatrix ----

namespace {

struct Rows {
  char* row;
  uint32_t* registers;
  int matrices;
  bool transposed, stores;
  const void* at;
};

void move_matrices(uint32_t, void** lanes) {
  auto lane = [&](int i) -> Rows& { return *static_cast<Rows*>(lanes[i]); };
  const Rows& all = lane(0);
  Thread* const self = current;
  Thread* const first = self - self->lane;
  for (int i = 0; i < 8 * all.matrices; ++i) {
    current = first + i;
    const uintptr_t address = reinterpret_cast<uintptr_t>(lane(i).row);
    const Region* region = region_of(address);
    if (region == nullptr || region->block != current->block)
      fail("ldmatrix or stmatrix: not an address in this block's shared memory", lane(i).at);
    if (address % 16 != 0) fail("misaligned: a matrix row must be 16-byte aligned", lane(i).at);
    check(address, 16, all.stores ? kWrite : kRead, lane(i).at);
  }
  current = self;
  for (int m = 0; m < all.matrices; ++m)
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 2; ++j) {
        const int row = all.transposed ? 2 * (i % 4) + j : i / 4, column = all.transposed ? i / 4 : 2 * (i % 4) + j;
        char* in_shared = lane(8 * m + row).row + 2 * column;
        char* in_register = reinterpret_cast<char*>(lane(i).registers + m) + 2 * j;
        std::memcpy(all.stores ? in_shared : in_register, all.stores ? in_register : in_shared, 2);
      }
}

}  // namespace

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed) {
  Rows mine{static_cast<char*>(const_cast<void*>(row)), registers, matrices, transposed, false, SIMT_CALLER};
  warp_collective(0xffffffffu, matrices == 4 ? "ldmatrix_x4" : "ldmatrix_x2", &mine, move_matrices, SIMT_CALLER);
}
void stmatrix(void* row, const uint32_t* registers, int matrices) {
  Rows mine{static_cast<char*>(row), const_cast<uint32_t*>(registers), matrices, false, true, SIMT_CALLER};
  warp_collective(0xffffffffu, "stmatrix", &mine, move_matrices, SIMT_CALLER);
}

// ---- wgmma: issued by 128 threads one after another, performed when one of them waits for it ----

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

// ---- halves ----

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  if (exponent == 31) return from_bits<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return from_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

uint16_t float_to_half(float value) {
  const uint32_t bits = from_bits<uint32_t>(to_bits(value));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (value != value) return 0x7fff;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  // Adding 1.5 * 2^23 quanta rounds to a multiple of the quantum, to nearest even.
  const int exponent = std::max(magnitude == 0 ? -14 : std::ilogb(magnitude), -14);
  const float quantum = std::ldexp(1.0f, exponent - 10);
  const uint32_t steps =
      static_cast<uint32_t>(std::nearbyint(magnitude / quantum));  // 1024..2048, or fewer if subnormal
  return static_cast<uint16_t>(sign | (steps + (static_cast<uint32_t>(exponent + 14) << 10)));
}

}  // namespace simt
