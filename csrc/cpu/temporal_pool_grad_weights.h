// Products over all steps: grad_weight[i][j] = sum over s of a[s][i] * b[s][j].
//
//   b is copied once to panels [panel][word][columns], a word being one step or, in bf16, two;
//   a job owns kTall rows of the result and goes through the words in blocks:
//   a [kBlock][12] of a tile x b [kBlock][columns] of every panel, added to the job's rows, which stay in the cache.
// The order of the sum depends on S alone.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/temporal_pool_cell.h"

namespace pycm::cpu {

template <class T>
struct StepPanels {
  Buffer<T> data;
  int64_t words = 0, dim = 0, columns = 1;

  void reserve(int64_t words_, int64_t dim_, int64_t columns_) {
    words = words_, dim = dim_, columns = columns_;
    reserve_large(data, panels() * words * columns);
  }
  int64_t panels() const { return ceil_div(dim, columns); }
  void set(int64_t w, const Operand<T>& operand, const T* row, const T* next) {
    for (int64_t p = 0; p < panels(); ++p) {
      T* to = data.get() + (p * words + w) * columns;
      const int64_t n = std::min(columns, dim - p * columns);
      operand.join(row + p * columns, next + p * columns, n, to);
      std::fill(to + n, to + columns, T(0));
    }
  }
};

// `count` rows of a weight's gradient, and of a bias's.
template <class T>
struct OuterJob {
  const T* a;
  int64_t a_row, count;
  const StepPanels<T>* b;
  T* out;   // [count][b.dim], may be null
  T* bias;  // [count], may be null
};

template <class T>
class OuterProducts {
 public:
  static constexpr int64_t kTall = 48, kBlock = 256;

  OuterProducts(const RecurrentKernels<T>& kernels, const Operand<T>& operand, int64_t steps)
      : kernels_(kernels), operand_(operand), steps_(steps) {}

  // The jobs of a [S, count] matrix; row i of the result goes to out + i * b.dim.
  void add(const T* a, int64_t a_row, int64_t count, const StepPanels<T>& b, T* out, T* bias) {
    if (out == nullptr && bias == nullptr) return;
    for (int64_t i = 0; i < count; i += kTall)
      jobs_.push_back({a + i, a_row, std::min(kTall, count - i), &b, out == nullptr ? nullptr : out + i * b.dim,
                       bias == nullptr ? nullptr : bias + i});
  }

  // Overwrites the results, or adds to them.
  void run(bool accumulate, int num_threads) {
    std::vector<Scratch> slots(static_cast<size_t>(num_threads));
    parallel_for(static_cast<int64_t>(jobs_.size()), num_threads, [&](int64_t i, int slot) {
      run(jobs_[static_cast<size_t>(i)], accumulate, slots[static_cast<size_t>(slot)]);
    });
  }

 private:
  struct Scratch {
    Buffer<T> tiles, sums;
  };

  void run(const OuterJob<T>& job, bool accumulate, Scratch& scratch) const {
    const int64_t width = job.b->panels() * job.b->columns;
    scratch.tiles.reserve(kBlock * kTall);
    scratch.sums.reserve(kTall * width);
    T bias[kTall] = {};
    const T zeros[kTall] = {};
    const int64_t elements = operand_.elements(), all = operand_.words(steps_);
    const Tiles tiles(job.count, kernels_.full_height);
    for (int64_t begin = 0; begin < all; begin += kBlock) {
      const int64_t words = std::min(kBlock, all - begin);
      T part[kTall] = {};
      for (int64_t w = 0; w < words; ++w) {
        const int64_t s = (begin + w) * elements;
        const T* row = job.a + s * job.a_row;
        const T* next = elements == 2 && s + 1 < steps_ ? row + job.a_row : zeros;
        for (int64_t r = 0; r < job.count; ++r) part[r] += row[r];
        for (int64_t r = 0; elements == 2 && r < job.count; ++r) part[r] += next[r];
        for (int64_t i = 0; i < tiles.count; ++i)
          operand_.join(row + tiles.first(i), next + tiles.first(i), tiles.height(i),
                        scratch.tiles.get() + tiles.first(i) * words + w * tiles.height(i));
      }
      for (int64_t r = 0; r < job.count; ++r) bias[r] += part[r];
      for (int64_t i = 0; i < tiles.count && job.out != nullptr; ++i) {
        const int64_t first = tiles.first(i);
        ProductTile<T> tile;
        tile.height = tiles.height(i);
        tile.panels = static_cast<int>(job.b->panels());
        tile.words = words;
        tile.a = scratch.tiles.get() + first * words;
        tile.b = job.b->data.get() + begin * job.b->columns;
        tile.b_panel = job.b->words * job.b->columns;
        tile.add = begin > 0;
        tile.c = scratch.sums.get() + first * width;
        tile.c_row = width;
        tile.c_panel = job.b->columns;
        operand_.product(kernels_, tile);
      }
    }
    for (int64_t r = 0; r < job.count; ++r) {
      const auto give = [&](const T* from, int64_t n, T* to) {
        if (accumulate) kernels_.axpy(1, from, to, n);
        else std::copy_n(from, n, to);
      };
      if (job.out != nullptr) give(scratch.sums.get() + r * width, job.b->dim, job.out + r * job.b->dim);
      if (job.bias != nullptr) give(bias + r, 1, job.bias + r);
    }
  }

  const RecurrentKernels<T>& kernels_;
  const Operand<T>& operand_;
  const int64_t steps_;
  std::vector<OuterJob<T>> jobs_;
};

}  // namespace pycm::cpu
