// similarity on the CPU: out[b, i, j] = metric(x[b, i], y[b, j]).
//
//   y is taken in blocks that fit the second-level cache:   encode + pack        y block [rows, D] -> panels [D][columns]
//   x in chunks of kChunk rows, packed once per chunk:                           x chunk -> tiles [D][height]
//   every tile x panel:                                     2 * height * columns * D flops, one pass over the output
//
// Work: 2 N M D flops. Memory: x and y once per chunk, the output once. Bound by the multiply-add units for D >= ~64 and
// by writing the output below. Threads take blocks of y, and shares of the tiles where y has few; or whole matrices of the
// batch when those are small. One or two rows of x are not worth packing y for: they are scored in fp64 as it is read.
#include "ops/similarity.h"

#include <vector>

#include "cpu/rows.h"
#include "cpu/verify.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kScanRows = 2;
constexpr double kParallelWork = 2.5e5;  // multiply-adds worth a thread

// One matrix of the batch.
template <class T>
struct Problem {
  Rows x, y;  // [N, D], [M, D]
  T* out;     // [N, M]
};

template <class T>
struct Scratch {
  GalleryBlock<T> block;
  PanelScratch<T, T> panel;
  Buffer<RowStats> stats;
  Buffer<double> query;
  Buffer<T> row;
};

template <class M, class T>
class Similarity {
 public:
  explicit Similarity(int num_threads) : threads_(num_threads), slots_(num_threads) {}

  // Scratch stays for the next matrix of the batch.
  void run(const Problem<T>& problem) {
    x_ = RowReader<T>(problem.x);
    y_ = RowReader<T>(problem.y);
    out_ = problem.out;
    const int64_t rows = x_.rows().rows, columns = y_.rows().rows, dim = x_.rows().dim;
    if (rows <= kScanRows) return scan();
    if constexpr (M::kDistance) centre_ = distance_centre(y_);
    const int64_t per_block = std::min(block_size(columns, dim), round_up(columns, tile_columns<T>()));
    const int64_t blocks = (columns + per_block - 1) / per_block;
    for (int64_t begin = 0; begin < rows; begin += kChunk) {
      encode_chunk(begin, std::min(kChunk, rows - begin));
      const int64_t tiles = queries_.tiles();
      const int64_t shares = threads_ == 1 ? 1 : std::min(tiles, std::max<int64_t>(1, 4 * threads_ / blocks));
      parallel_for(blocks * shares, threads_, [&](int64_t task, int slot) {
        const int64_t first = task / shares * per_block, share = task % shares;
        multiply(begin, share * tiles / shares, (share + 1) * tiles / shares, first,
                 std::min(per_block, columns - first), slots_[slot]);
      });
    }
  }

 private:
  // Small enough for the cache, and for every thread to have several.
  int64_t block_size(int64_t columns, int64_t dim) const {
    const int64_t share = threads_ > 1 ? columns / (4 * threads_) : columns;
    return std::max<int64_t>(std::min(block_rows<T>(dim), share / kMaxTileColumns * kMaxTileColumns), kMaxTileColumns);
  }

  void encode_chunk(int64_t begin, int64_t count) {
    const int64_t dim = x_.rows().dim;
    queries_.reserve(count, dim);
    parallel_for(queries_.tiles(), count * dim > (1 << 16) ? threads_ : 1, [&](int64_t t, int slot) {
      Scratch<T>& scratch = slots_[slot];
      scratch.panel.reserve(kMaxTileColumns, dim);
      encode_queries<M, T, T>(x_, begin, centre_.get(), t, queries_, scratch.panel.source.get(),
                              scratch.panel.encoded.get());
    });
  }

  // Tiles [first_tile, last_tile) of the chunk at `begin` against columns [first, first + count).
  void multiply(int64_t begin, int64_t first_tile, int64_t last_tile, int64_t first, int64_t count,
                Scratch<T>& scratch) {
    const int64_t dim = x_.rows().dim, columns = y_.rows().rows;
    GalleryBlock<T>& block = scratch.block;
    block.reserve(count, dim);
    block.begin = first;
    block.count = count;
    scratch.panel.reserve(block.columns, dim);
    scratch.stats.reserve(count);
    encode_gallery<M, false, T, T>(y_, centre_.get(), scratch.stats.get(), true, block, scratch.panel);
    T row_square[kMaxTileRows] = {};
    for (int64_t t = first_tile; t < last_tile; ++t) {
      const int64_t row = begin + queries_.first(t);
      Tile<T> tile;
      tile.height = queries_.height(t);
      tile.dim = dim;
      tile.a = queries_.tile(t);
      Store<T> store;
      store.rows = queries_.count(t);
      store.row_stride = columns;
      store.distance = M::kDistance;
      store.root = M::kRoot;
      if constexpr (M::kDistance) {
        for (int i = 0; i < store.rows; ++i) {
          const double norm = queries_.norm[queries_.first(t) + i];
          row_square[i] = static_cast<T>(norm * norm);
        }
        store.row_square = row_square;
      }
      for (int64_t p = 0; p < block.panel_count(); ++p) {
        const int64_t j = p * block.columns;
        tile.b = block.panel(p);
        tile.scale = block.scale.get() + j;
        tile.bias = block.bias.get() + j;
        store.column_square = block.square.get() + j;
        store.columns = static_cast<int>(std::min<int64_t>(block.columns, count - j));
        store.out = out_ + row * columns + first + j;
        if (store_tile(tile, store)) recompute(store, row, first + j, scratch);
      }
    }
  }

  static bool store_tile(const Tile<T>& tile, Store<T>& store) {
    if constexpr (std::is_same_v<T, float>) return kernels().store_f32(tile, store);
    else return kernels().store_f64(tile, store);
  }

  // Distances that cancelled are evaluated from differences, in fp64: identical rows give exactly 0.
  void recompute(const Store<T>& store, int64_t row, int64_t column, Scratch<T>& scratch) const {
    const int64_t dim = x_.rows().dim;
    scratch.query.reserve(dim);
    scratch.row.reserve(dim);
    for (int i = 0; i < store.rows; ++i) {
      if (store.doubt[i] == 0) continue;
      std::copy_n(x_.read(row + i, scratch.row.get()), dim, scratch.query.get());
      for (int j = 0; j < store.columns; ++j) {
        if ((store.doubt[i] >> j & 1) == 0) continue;
        const T* y = y_.read(column + j, scratch.row.get());
        const double sum = exact_sum<T>(kSumSquaredDifference, scratch.query.get(), y, 0, dim);
        store.out[i * store.row_stride + j] = static_cast<T>(M::finish(sum, 0, 0));
      }
    }
  }

  // Every pair in fp64, y read in place.
  void scan() {
    const int64_t rows = x_.rows().rows, columns = y_.rows().rows, dim = x_.rows().dim;
    const Verifier<M, T> verifier(x_.rows(), y_.rows());
    Buffer<double> values(rows * dim);
    LoadedQuery queries[kScanRows];
    slots_[0].row.reserve(dim);
    for (int64_t i = 0; i < rows; ++i) {
      queries[i].values = values.get() + i * dim;
      verifier.load(i, queries[i], slots_[0].row.get());
    }
    const int64_t per_block = std::max<int64_t>(16, columns / (8 * threads_));
    parallel_for((columns + per_block - 1) / per_block, threads_, [&](int64_t b, int slot) {
      slots_[slot].row.reserve(dim);
      T* row = slots_[slot].row.get();
      for (int64_t j = b * per_block; j < std::min(columns, (b + 1) * per_block); ++j) {
        const RowStats stats = verifier.gallery_stats(j, row);
        for (int64_t i = 0; i < rows; ++i) out_[i * columns + j] = verifier.score(queries[i], j, stats, row);
      }
    });
  }

  RowReader<T> x_, y_;
  T* out_ = nullptr;
  int threads_;
  std::vector<Scratch<T>> slots_;
  Buffer<double> centre_;
  PackedQueries<T> queries_;
};

template <class M, class T>
void run(const SimilarityArgs& unfolded) {
  const SimilarityArgs args = fold_batch(unfolded);
  int64_t batch = 1;
  for (int d = 0; d < args.batch_ndim; ++d) batch *= args.batch_shape[d];
  const auto problem = [&](int64_t b) {
    Problem<T> result{args.x, args.y, static_cast<T*>(args.out) + b * args.x.rows * args.y.rows};
    int64_t x_offset = 0, y_offset = 0;
    for (int d = args.batch_ndim - 1; d >= 0; --d) {
      x_offset += b % args.batch_shape[d] * args.x_batch_strides[d];
      y_offset += b % args.batch_shape[d] * args.y_batch_strides[d];
      b /= args.batch_shape[d];
    }
    result.x.data = static_cast<const char*>(args.x.data) + x_offset * item_size(args.x.dtype);
    result.y.data = static_cast<const char*>(args.y.data) + y_offset * item_size(args.y.dtype);
    return result;
  };
  const double work =
      static_cast<double>(args.x.rows) * static_cast<double>(args.y.rows) * static_cast<double>(args.x.dim);
  const int threads = threads_for(work * static_cast<double>(batch), kParallelWork, args.num_threads);
  if (batch >= 4 * threads || work < 2 * kParallelWork) {
    std::vector<Similarity<M, T>> per_slot;
    for (int slot = 0; slot < threads; ++slot) per_slot.emplace_back(1);
    parallel_for(batch, threads, [&](int64_t b, int slot) { per_slot[slot].run(problem(b)); });
  } else {
    Similarity<M, T> shared(threads);
    for (int64_t b = 0; b < batch; ++b) shared.run(problem(b));
  }
}

}  // namespace

void similarity(const SimilarityArgs& args) {
  if (args.x.rows == 0 || args.y.rows == 0) return;
  const DefaultFloatMode float_mode;
  visit(args.metric, [&](auto metric) {
    visit_source(args.x.dtype, [&](auto source) { run<decltype(metric), decltype(source)>(args); });
  });
}

}  // namespace pycm::cpu
