// The gradient of maxsim on the CPU: every maximum sends its share of grad[i, j] to the two vectors it comes from.
//
//   rows     both sides as contiguous rows of T, normalised for cosine; in place where they lie so
//   arg      for a chunk of x items and a block of y items: the first vector of y with the maximum, of every vector of x
//   to y     a thread owns a y item:   grad_y[arg] += share * x
//   to x     a thread owns an x item:  grad_x      += share * y[arg], y items in turn
//   cosine   a row's gradient loses its part along the row and is divided by the row's norm
//
// Work: the forward's products once, and 4 D flops for each maximum. Memory: the gradients, for cosine a copy of the
// inputs, and 16 MB of arg. No atomics: every sum has one order, whatever the threads.
#include <memory>

#include "cpu/maxsim_pass.h"
#include "ops/maxsim.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kChunkVectors = 1024, kArgs = 4 << 20;

// One side: its vectors as rows of T, and their gradient.
template <class T>
struct Side {
  VectorSets sets;
  Buffer<T> rows;
  Buffer<double> norm;  // of the rows before they were normalised
  T* grad = nullptr;    // may be null
  bool cosine;

  Side(const VectorSets& source, Metric metric, void* gradient, int threads)
      : sets(source), grad(static_cast<T*>(gradient)), cosine(metric == Metric::kCosine) {
    if (grad != nullptr) std::fill_n(grad, sets.total * sets.dim, T(0));
    constexpr DType kDType = std::is_same_v<T, float> ? DType::kFloat32 : DType::kFloat64;
    if (!cosine && sets.dtype == kDType && sets.dim_stride == 1) return;
    rows.reserve(sets.total * sets.dim);
    norm.reserve(sets.total);
    parallel_for(sets.items, threads, [&](int64_t i, int) {
      const Rows item = source.item(i);
      for (int64_t t = 0; t < item.rows; ++t) {
        const int64_t at = source.position(i) + t;
        T* row = rows.get() + at * sets.dim;
        const T* read = RowReader<T>(item).read(t, row);
        if (read != row) std::copy_n(read, sets.dim, row);
        if (!cosine) continue;
        norm[at] = row_norm(row, sets.dim);
        affine<T, T>(row, 0, row_factor(metric, norm[at]), nullptr, sets.dim, row);
      }
    });
    sets.data = rows.get();
    sets.dtype = kDType;
    sets.dim_stride = 1;
    sets.row_stride = sets.dim;
    sets.item_stride = sets.max_length * sets.dim;
  }

  const T* row(int64_t i, int64_t t) const { return static_cast<const T*>(sets.item(i).row(t)); }
  T* grad_row(int64_t i, int64_t t) const { return grad + (sets.position(i) + t) * sets.dim; }

  // From the gradient of normalised rows to that of the rows.
  void finish(int threads) const {
    if (grad == nullptr || !cosine) return;
    parallel_for(sets.items, threads, [&](int64_t i, int) {
      for (int64_t t = 0; t < sets.length(i); ++t) {
        const T* unit = row(i, t);
        T* out = grad_row(i, t);
        double along = 0;
        for (int64_t d = 0; d < sets.dim; ++d) along += static_cast<double>(out[d]) * static_cast<double>(unit[d]);
        const double length = norm[sets.position(i) + t];
        const double factor = length == 0 ? 0 : 1 / length;
        for (int64_t d = 0; d < sets.dim; ++d)
          out[d] = static_cast<T>((static_cast<double>(out[d]) - along * static_cast<double>(unit[d])) * factor);
      }
    });
  }
};

template <class T>
void add_scaled(T factor, const T* row, int64_t dim, T* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] += factor * row[d];
}

// The first of y's vectors with the largest product, or with one that is NaN: where T gives no finite number.
template <class T>
int32_t first_best(const T* x, const Rows& y) {
  std::vector<double> wide(x, x + y.dim);
  int32_t best = 0;
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t s = 0; s < y.rows; ++s) {
    const double value = exact_sum<T>(kSumProduct, wide.data(), static_cast<const T*>(y.row(s)), 0, y.dim);
    if (value > largest || std::isnan(value)) best = static_cast<int32_t>(s);
    if (std::isnan(value)) break;
    largest = std::max(largest, value);
  }
  return best;
}

// The direction that sums over x's vectors; a pair's gradient is grad[i * x_stride + j * y_stride].
template <class T>
class BackwardPass {
 public:
  BackwardPass(const Side<T>& x, const Side<T>& y, const T* grad, int64_t x_stride, int64_t y_stride, Reduce reduce,
               int threads)
      : x_(x), y_(y), grad_(grad), x_stride_(x_stride), y_stride_(y_stride), reduce_(reduce), threads_(threads) {}

  void run() {
    std::vector<Scratch> slots(threads_);
    for (int64_t begin = 0; begin < x_.sets.items; begin += packed_.items) {
      int64_t count = 1, vectors = x_.sets.length(begin);
      while (begin + count < x_.sets.items && vectors + x_.sets.length(begin + count) <= kChunkVectors)
        vectors += x_.sets.length(begin + count++);
      packed_.pack_items(slice(x_.sets, begin, count), Metric::kDot, false, threads_);
      width_ = packed_.panel_count() * packed_.columns;
      const int64_t block = std::clamp<int64_t>(kArgs / std::max<int64_t>(1, width_), 1, y_.sets.items);
      arg_.reserve(block * width_);
      for (int64_t first = 0; first < y_.sets.items; first += block) {
        const int64_t last = std::min(first + block, y_.sets.items);
        parallel_for(last - first, threads_, [&](int64_t b, int slot) { find(begin, first + b, arg(b), slots[slot]); });
        if (x_.grad == nullptr) continue;
        parallel_for(packed_.items, threads_, [&](int64_t i, int) {
          for (int64_t j = first; j < last; ++j) to_x(begin, i, j, arg(j - first));
        });
      }
    }
  }

 private:
  struct Scratch {
    Buffer<T> best, source, scales;
    ItemRows<T> item;
  };

  int32_t* arg(int64_t b) const { return arg_.get() + b * width_; }

  // Of pair (begin + i, j); 0 where either is empty.
  T share(int64_t begin, int64_t i, int64_t j) const {
    const int64_t count = packed_.first[i + 1] - packed_.first[i];
    if (count == 0 || y_.sets.length(j) == 0) return 0;
    const T grad = grad_[(begin + i) * x_stride_ + j * y_stride_];
    return reduce_ == Reduce::kMean ? grad / static_cast<T>(count) : grad;
  }

  // The maxima of y item j, and their gradients there. Pairs without a gradient are left out.
  void find(int64_t begin, int64_t j, int32_t* arg, Scratch& scratch) const {
    bool any = false;
    for (int64_t i = 0; i < packed_.items && !any; ++i) any = share(begin, i, j) != 0;
    if (!any) return;
    const Rows rows = y_.sets.item(j);
    scratch.item.read(rows, Metric::kDot, false, scratch.source, scratch.scales);
    scratch.best.reserve(width_);
    for (int64_t p = 0; p < packed_.panel_count(); ++p) {
      RowTile<T> tile = row_tile(packed_, p, scratch.item);
      tile.best = scratch.best.get() + p * packed_.columns;
      tile.arg = arg + p * packed_.columns;
      row_products(tile);
    }
    for (int64_t i = 0; i < packed_.items; ++i) {
      const T part = share(begin, i, j);
      if (part == 0) continue;
      for (int64_t t = packed_.first[i]; t < packed_.first[i + 1]; ++t) {
        const T* x = x_.row(begin + i, t - packed_.first[i]);
        if (!std::isfinite(scratch.best[t])) arg[t] = first_best(x, rows);
        if (y_.grad != nullptr) add_scaled(part, x, rows.dim, y_.grad_row(j, arg[t]));
      }
    }
  }

  void to_x(int64_t begin, int64_t i, int64_t j, const int32_t* arg) const {
    const T part = share(begin, i, j);
    if (part == 0) return;
    for (int64_t t = packed_.first[i]; t < packed_.first[i + 1]; ++t)
      add_scaled(part, y_.row(j, arg[t]), x_.sets.dim, x_.grad_row(begin + i, t - packed_.first[i]));
  }

  const Side<T>&x_, &y_;
  const T* grad_;
  int64_t x_stride_, y_stride_;
  Reduce reduce_;
  int threads_;
  PackedItems<T> packed_;
  int64_t width_ = 0;
  Buffer<int32_t> arg_;  // [items of a block][vectors of a chunk, padded]
};

template <class T>
void run(const MaxSimBackwardArgs& args) {
  const MaxSimArgs& forward = args.forward;
  const int threads = maxsim_threads(forward);
  const Side<T> queries(forward.queries, forward.metric, args.grad_queries, threads);
  const Side<T> gallery(forward.gallery, forward.metric, args.grad_gallery, threads);
  if (queries.sets.items == 0 || gallery.sets.items == 0) return;
  const T* grad = static_cast<const T*>(args.grad);
  const int64_t columns = gallery.sets.items;
  if (forward.direction != Direction::kI2T)
    BackwardPass<T>(queries, gallery, grad, columns, 1, forward.reduce, threads).run();
  if (forward.direction != Direction::kT2I)
    BackwardPass<T>(gallery, queries, grad, 1, columns, forward.reduce, threads).run();
  queries.finish(threads);
  gallery.finish(threads);
}

}  // namespace

void maxsim_backward(const MaxSimBackwardArgs& args) {
  const DefaultFloatMode float_mode;
  visit_source(args.forward.queries.dtype, [&](auto source) { run<decltype(source)>(args); });
}

}  // namespace pycm::cpu
