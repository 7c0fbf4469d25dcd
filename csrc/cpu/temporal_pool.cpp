// temporal_pool on the CPU: an LSTM or GRU over ragged sequences, pooled as it goes.
//
//   rows are sorted by length, longest first, and dealt to groups; at step t the first n_t rows of a group are alive
//   chunk of steps:  x rows -> packed tiles           all valid (row, step) pairs of the chunk are the rows of one product,
//                    tiles x W_ih panels -> input     [unit group][row of the chunk][gate][columns]
//   each step:       h rows -> packed tiles
//     unit group:      tiles x W_hh panels -> hidden, the cell, h', and what pooling adds
//     projection:      the same once more, from o tanh(c) to h'
//
// Work: 2 S G H (I + P) flops for S valid steps. A group streams W_hh once a step (4 G H P bytes), so it is bound by the
// multiply-add units from about 8 rows on, below by the third-level cache. Memory: the packed weights, kChunkRows rows of
// the input's part, and a few rows of H elements per sequence; states only where they are asked for (or gpo sorts them),
// and the reserve of the backward pass only before one.
// Many rows: every thread has groups of its own. Few: one group, and the threads share the unit groups of every step
// (temporal_pool_team.h). A row's sums do not depend on its group, tile or thread.
#include "ops/temporal_pool.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/temporal_pool_cell.h"
#include "cpu/temporal_pool_team.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kChunkRows = 192;     // of the input's product at a time
constexpr int64_t kMaxGroupRows = 256;  // so that a step's states stay near
constexpr int64_t kRowsPerThread = 8;   // below, threads share the units instead
constexpr double kShareWork = 1 << 16;  // multiply-adds of a step worth a thread

// What one member of the team keeps to itself.
template <class T>
struct Scratch {
  Buffer<T> packed_h, packed_m, hidden, row;
  int64_t packed_step = -1, packed_m_step = -1;
};

// Some of the batch's rows, longest first, through all their steps.
template <class T, class C>
class Group {
 public:
  Group(const PackedCell& cell, const TemporalPoolArgs& args, std::vector<int64_t> rows, int members)
      : w_(cell.weights<T>()),
        shape_(cell.shape),
        args_(args),
        rows_(std::move(rows)),
        team_(members),
        columns_(w_.kernels.columns),
        height_(w_.kernels.full_height),
        units_(w_.groups * columns_),
        states_(ceil_div(shape_.state_size, columns_) * columns_),
        scratch_(static_cast<size_t>(members)) {
    const int64_t n = static_cast<int64_t>(rows_.size());
    for (Buffer<T>& h : h_) allocate(h, n * states_);
    if (C::kHasMemory) allocate(c_, n * units_);
    if (projects()) allocate(m_, n * units_);
    chunk_rows_ = std::max(kChunkRows, n);
    packed_x_.reserve(chunk_rows_ * words_x());
    reserve_large(input_, chunk_rows_ * units_ * C::kGates);
    for (Scratch<T>& s : scratch_) {
      s.packed_h.reserve(n * words_h());
      s.packed_m.reserve(projects() ? n * words_m() : 0);
      s.hidden.reserve(height_ * C::kGates * columns_);
      s.row.reserve(height_ * Operand<T>::scratch_size(std::max({shape_.input_size, shape_.state_size, units_})));
    }
    for (int64_t j = 0; j < n; ++j) {
      if (args_.h0 != nullptr) copy(args_.h0, rows_[j], shape_.state_size, h_[0].get() + j * states_);
      if (C::kHasMemory && args_.c0 != nullptr) copy(args_.c0, rows_[j], shape_.hidden_size, c_.get() + j * units_);
    }
    if (args_.pool.pool == Pool::kAttention) attention_.resize(static_cast<size_t>(n));
    for (int64_t j = 0; j < static_cast<int64_t>(attention_.size()); ++j) {
      std::fill_n(out(j), shape_.state_size, T(0));
      attention_[static_cast<size_t>(j)] = {out(j), -std::numeric_limits<T>::infinity(), 0};
    }
    if (args_.pool.pool == Pool::kGpo) reserve_gpo();
  }

  void run(int rank) {
    Member member(team_, rank);
    Scratch<T>& scratch = scratch_[static_cast<size_t>(rank)];
    const int64_t longest = length(0);
    int64_t alive = static_cast<int64_t>(rows_.size());
    for (int64_t begin = 0, end; begin < longest; begin = end) {
      std::vector<int64_t> first;  // row of the chunk with which each step begins
      int64_t total = 0, left = alive;
      for (end = begin; end < longest; ++end) {
        while (length(left - 1) <= end) --left;
        if (end > begin && total + left > chunk_rows_) break;
        first.push_back(total);
        total += left;
      }
      first.push_back(total);
      project_input(member, scratch, begin, first);
      for (int64_t t = begin; t < end; ++t) {
        alive = first[static_cast<size_t>(t - begin + 1)] - first[static_cast<size_t>(t - begin)];
        step(member, scratch, t, alive, first[static_cast<size_t>(t - begin)], total);
      }
    }
    if (args_.pool.pool == Pool::kGpo)
      member.phase(static_cast<int64_t>(rows_.size()), [&](int64_t j) {
        w_.kernels.sorted_sum(states(j), shape_.state_size, length(j), shape_.state_size,
                              static_cast<const T*>(args_.pool.weights) + args_.x.cu_seqlens[rows_[j]],
                              sorted_[static_cast<size_t>(rank)].get(), out(j));
      });
  }

 private:
  bool projects() const { return w_.projection_panels > 0; }
  int64_t words_x() const { return w_.input_operand.words(shape_.input_size); }
  int64_t words_h() const { return w_.operand.words(shape_.state_size); }
  int64_t words_m() const { return w_.operand.words(shape_.hidden_size); }
  int64_t length(int64_t j) const { return args_.x.length(rows_[static_cast<size_t>(j)]); }
  // Where step t of row j lies in time.
  int64_t time(int64_t j, int64_t t) const { return args_.reverse ? length(j) - 1 - t : t; }
  T* out(int64_t j) const {
    return static_cast<T*>(args_.out) + rows_[static_cast<size_t>(j)] * width_of(args_.pool.pool) * shape_.state_size;
  }
  T* states(int64_t j) const {
    return static_cast<T*>(args_.states) + args_.x.cu_seqlens[rows_[static_cast<size_t>(j)]] * shape_.state_size;
  }
  T* kept(int64_t j, int64_t t) const {
    const int64_t step = args_.x.cu_seqlens[rows_[static_cast<size_t>(j)]] + time(j, t);
    return static_cast<T*>(args_.reserve) + step * C::kReserve * shape_.hidden_size;
  }
  static void fetch(const T* data, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(data + i, 0, 2);
  }
  static void allocate(Buffer<T>& buffer, int64_t count) {
    buffer.reserve(count);
    std::fill_n(buffer.get(), count, T(0));
  }
  static void copy(const void* from, int64_t row, int64_t count, T* to) {
    std::memcpy(to, static_cast<const T*>(from) + row * count, static_cast<size_t>(count) * sizeof(T));
  }

  void reserve_gpo() {
    for (size_t member = 0; member < scratch_.size(); ++member) sorted_.emplace_back(length(0) * columns_);
  }

  void pack_states(const T* rows, int64_t stride, int64_t alive, int64_t dim, Scratch<T>& scratch,
                   Buffer<T>& to) const {
    const Tiles tiles(alive, height_);
    constexpr DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t first = tiles.first(i);
      pack_tile(w_.kernels, w_.operand, tiles.height(i), dim, dtype, scratch.row.get(),
                to.get() + first * w_.operand.words(dim), [&](int r) { return rows + (first + r) * stride; });
    }
  }

  // The input's part of all pre-activations of the chunk's steps.
  void project_input(Member& member, Scratch<T>& scratch, int64_t begin, const std::vector<int64_t>& first) {
    const int64_t total = first.back();
    const Tiles tiles(total, height_);
    member.phase(tiles.count, [&](int64_t i) {
      const int64_t from = tiles.first(i);
      size_t step = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), from) - first.begin()) - 1;
      int64_t at = from;
      const auto row = [&](int) {
        while (at >= first[step + 1]) ++step;
        const int64_t j = at++ - first[step];
        return args_.x.step(rows_[static_cast<size_t>(j)], time(j, begin + static_cast<int64_t>(step)));
      };
      pack_tile(w_.kernels, w_.input_operand, tiles.height(i), shape_.input_size, args_.x.dtype, scratch.row.get(),
                packed_x_.get() + from * words_x(), row);
    });
    member.phase(w_.groups, [&](int64_t g) {
      ProductTile<T> tile = gate_tile(w_.input, w_.input_bias, w_.has_bias, g, words_x());
      for (int64_t i = 0; i < tiles.count; ++i) {
        tile.height = tiles.height(i);
        tile.a = packed_x_.get() + tiles.first(i) * words_x();
        tile.c = input_.get() + (g * total + tiles.first(i)) * tile.c_row;
        w_.input_operand.product(w_.kernels, tile);
      }
    });
  }

  ProductTile<T> gate_tile(const Buffer<T>& panels, const Buffer<T>& bias, bool has_bias, int64_t group,
                           int64_t words) const {
    ProductTile<T> tile;
    tile.panels = C::kGates;
    tile.words = words;
    tile.b_panel = words * columns_;
    tile.b = panels.get() + group * C::kGates * tile.b_panel;
    tile.start = has_bias ? bias.get() + group * C::kGates * columns_ : nullptr;
    tile.c_panel = columns_;
    tile.c_row = C::kGates * columns_;
    return tile;
  }

  // `first` and `total` rows of the chunk: where this step's lie in input_.
  void step(Member& member, Scratch<T>& scratch, int64_t t, int64_t alive, int64_t first, int64_t total) {
    const T* h = h_[t % 2].get();
    T* h_next = h_[(t + 1) % 2].get();
    const Tiles tiles(alive, height_);
    const bool from_zero = t == 0 && args_.h0 == nullptr;
    // To and fro: a step begins with the weights that the one before has read last, and left in the cache.
    const auto unit_group = [&](int64_t g) {
      if (scratch.packed_step != t && !from_zero)
        pack_states(h, states_, alive, shape_.state_size, scratch, scratch.packed_h);
      scratch.packed_step = t;
      ProductTile<T> tile = gate_tile(w_.hidden, w_.hidden_bias, w_.has_hidden_bias, g, from_zero ? 0 : words_h());
      tile.b_panel = words_h() * columns_;
      tile.b = w_.hidden.get() + g * C::kGates * tile.b_panel;
      tile.c = scratch.hidden.get();
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.first(i);
        tile.height = tiles.height(i);
        tile.a = scratch.packed_h.get() + row * words_h();
        // The weights of a step push out what the cell reads; it comes back while the product runs.
        for (int64_t j = row; j < row + tile.height; ++j) {
          fetch(input_.get() + (g * total + first + j) * tile.c_row, tile.c_row);
          fetch(C::kHasMemory ? c_.get() + j * units_ + g * columns_ : h + j * states_ + g * columns_, columns_);
        }
        w_.operand.product(w_.kernels, tile);
        CellTile<T> cell;
        cell.rows = tile.height;
        cell.units = shape_.hidden_size - g * columns_;
        cell.input_row = cell.hidden_row = tile.c_row;
        cell.input_part = columns_;
        cell.input = input_.get() + (g * total + first + row) * tile.c_row;
        cell.hidden = tile.c;
        cell.h = h + row * states_ + g * columns_;
        cell.h_row = states_;
        T* to = projects() ? m_.get() : h_next;
        cell.h_next_row = projects() ? units_ : states_;
        cell.h_next = to + row * cell.h_next_row + g * columns_;
        if (C::kHasMemory) cell.c = c_.get() + row * units_ + g * columns_;
        cell.c_row = units_;
        T* reserve[kMaxProductHeight];
        if (args_.reserve != nullptr) {
          for (int r = 0; r < tile.height; ++r) reserve[r] = kept(row + r, t) + g * columns_;
          cell.reserve = reserve;
          cell.reserve_part = shape_.hidden_size;
        }
        w_.kernels.step[static_cast<int>(shape_.cell)](cell);
        for (int64_t j = row; j < row + tile.height; ++j) {
          if (!projects()) finish_group(j, t, g, h_next);
          if (C::kHasMemory && args_.cn != nullptr && t + 1 == length(j))
            store(args_.cn, j, shape_.hidden_size, g * columns_, std::min<int64_t>(columns_, cell.units),
                  c_.get() + j * units_);
        }
      }
    };
    member.phase(w_.groups, unit_group, t % 2 == 1);
    if (projects()) project_state(member, scratch, t, tiles, h_next);
    if (team_.members() == 1)
      for (int64_t j = 0; j < alive; ++j) finish(j, t, 0, shape_.state_size, h_next);
    if (args_.pool.pool == Pool::kAttention)
      member.phase(alive, [&](int64_t j) {
        AttentionRow<T>& row = attention_[static_cast<size_t>(j)];
        w_.kernels.attend(row, static_cast<const T*>(args_.pool.weights), h_next + j * states_, shape_.state_size);
        if (t + 1 == length(j)) w_.kernels.scale(row.value, 1 / row.sum, shape_.state_size);
      });
  }

  void project_state(Member& member, Scratch<T>& scratch, int64_t t, const Tiles& tiles, T* h_next) {
    member.phase(w_.projection_panels, [&](int64_t p) {
      if (scratch.packed_m_step != t)
        pack_states(m_.get(), units_, tiles.rows, shape_.hidden_size, scratch, scratch.packed_m);
      scratch.packed_m_step = t;
      ProductTile<T> tile;
      tile.panels = 1;
      tile.words = words_m();
      tile.b = w_.projection.get() + p * words_m() * columns_;
      tile.c_row = states_;
      for (int64_t i = 0; i < tiles.count; ++i) {
        tile.height = tiles.height(i);
        tile.a = scratch.packed_m.get() + tiles.first(i) * words_m();
        tile.c = h_next + tiles.first(i) * states_ + p * columns_;
        w_.operand.product(w_.kernels, tile);
      }
      for (int64_t j = 0; j < tiles.rows; ++j) finish_group(j, t, p, h_next);
    });
  }

  // One member finishes whole rows once the step is done; several finish what each has computed.
  void finish_group(int64_t j, int64_t t, int64_t g, const T* h_next) const {
    const int64_t from = g * columns_;
    if (team_.members() > 1) finish(j, t, from, std::min<int64_t>(columns_, shape_.state_size - from), h_next);
  }

  // `n` elements of row j's state after step t: into the pool, and wherever else they are wanted.
  void finish(int64_t j, int64_t t, int64_t from, int64_t n, const T* h_next) const {
    const T* h = h_next + j * states_ + from;
    const bool last = t + 1 == length(j);
    if (args_.states != nullptr)
      std::memcpy(states(j) + time(j, t) * shape_.state_size + from, h, static_cast<size_t>(n) * sizeof(T));
    if (last && args_.hn != nullptr) store(args_.hn, j, shape_.state_size, from, n, h_next + j * states_);
    const auto pool = w_.kernels.pool[static_cast<int>(args_.pool.pool)];
    if (pool == nullptr) return;
    pool(out(j) + from, shape_.state_size, h, n, t == 0);
    if (!last) return;
    visit(args_.pool.pool, [&](auto p) {
      using P = decltype(p);
      if constexpr (P::kStreams)
        for (int part = 0; part < P::kWidth; ++part)
          if (P::kMean[part])
            w_.kernels.scale(out(j) + part * shape_.state_size + from, T(1) / static_cast<T>(length(j)), n);
    });
  }

  void store(void* to, int64_t j, int64_t dim, int64_t from, int64_t n, const T* row) const {
    std::memcpy(static_cast<T*>(to) + rows_[static_cast<size_t>(j)] * dim + from, row + from,
                static_cast<size_t>(n) * sizeof(T));
  }

  const PackedWeights<T>& w_;
  const CellWeights& shape_;
  const TemporalPoolArgs& args_;
  const std::vector<int64_t> rows_;
  Team team_;
  const int columns_, height_;
  const int64_t units_, states_;  // rounded up to whole panels
  int64_t chunk_rows_ = 0;
  Buffer<T> h_[2], c_, m_, packed_x_, input_;
  std::vector<AttentionRow<T>> attention_;
  std::vector<Buffer<T>> sorted_;
  std::vector<Scratch<T>> scratch_;
};

// What a row without steps gives.
template <class T>
void finish_empty(const TemporalPoolArgs& args, const CellWeights& shape, int64_t b) {
  const auto start = [&](const void* from, void* to, int64_t dim) {
    if (to == nullptr) return;
    T* row = static_cast<T*>(to) + b * dim;
    if (from == nullptr) std::fill_n(row, dim, T(0));
    else std::copy_n(static_cast<const T*>(from) + b * dim, dim, row);
  };
  start(nullptr, args.out, width_of(args.pool.pool) * shape.state_size);
  start(args.h0, args.hn, shape.state_size);
  start(args.c0, args.cn, shape.hidden_size);
}

template <class T, class C>
void run(const PackedCell& cell, const TemporalPoolArgs& args) {
  const CellWeights& shape = cell.shape;
  std::vector<int64_t> order;
  for (int64_t b = 0; b < args.x.batch; ++b) {
    if (args.x.length(b) > 0) order.push_back(b);
    else finish_empty<T>(args, shape, b);
  }
  if (order.empty()) return;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return args.x.length(a) > args.x.length(b); });
  const int64_t rows = static_cast<int64_t>(order.size());
  const double work = static_cast<double>(rows) * C::kGates * static_cast<double>(shape.hidden_size * shape.state_size);
  const int threads = threads_for(work, kShareWork, args.num_threads);
  if (rows < kRowsPerThread * threads) {
    const int members = static_cast<int>(std::min<int64_t>(threads, cell.weights<T>().groups));
    Group<T, C> group(cell, args, std::move(order), members);
    parallel_for(members, members, [&](int64_t rank, int) { group.run(static_cast<int>(rank)); });
    return;
  }
  const int64_t groups = threads * ceil_div(rows, threads * kMaxGroupRows);
  parallel_for(groups, threads, [&](int64_t task, int) {
    std::vector<int64_t> mine;
    for (int64_t i = task; i < rows; i += groups) mine.push_back(order[static_cast<size_t>(i)]);
    Group<T, C>(cell, args, std::move(mine), 1).run(0);
  });
}

}  // namespace

void temporal_pool(const PackedCell& packed, const TemporalPoolArgs& args) {
  const DefaultFloatMode float_mode;
  TemporalPoolArgs complete = args;
  const bool wide = packed.shape.dtype == DType::kFloat64;
  Buffer<char> states;
  if (args.pool.pool == Pool::kGpo && args.states == nullptr) {
    states.reserve(args.x.cu_seqlens[args.x.batch] * packed.shape.state_size * (wide ? 8 : 4));
    complete.states = states.get();
  }
  visit(packed.shape.cell, [&](auto cell) {
    using C = decltype(cell);
    if (args.reserve != nullptr)
      use_huge_pages(args.reserve,
                     args.x.cu_seqlens[args.x.batch] * C::kReserve * packed.shape.hidden_size * (wide ? 8 : 4));
    if (wide) run<double, C>(packed, complete);
    else run<float, C>(packed, complete);
  });
}

}  // namespace pycm::cpu
