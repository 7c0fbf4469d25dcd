// xattn_score on the CPU. x: the item whose vectors attend, y: the item they attend to (ops/xattn.h).
//
//   chunk of x    packed side by side in panels                                  [D][columns]
//   one y         s[b][a], its vectors where they lie against every panel        2 D flops each
//                 Gram matrix of y in fp64, once a chunk                         [n_y][n_y]
//   every pair    feature norm and softmax of s -> w[b][a]                       n_y n_x exponentials, or twice that
//                 x.c = sum of w s,  |c|^2 = sum of w (Gram w)                   2 n_y flops a weight in fp64, not 2 D
//
// The context vectors are never made: where D is 1024 and n_y 36 that is half of the original's work, and none of its
// memory. |c|^2 cancels where vectors oppose each other, hence fp64. Threads take y items.
#include "ops/xattn.h"

#include "cpu/maxsim_pass.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kChunkVectors = 2048;
// |c|^2 below this share of what it would be without cancellation.
constexpr double kCancelled = 0x1p-12;

template <class T>
class XAttn {
 public:
  explicit XAttn(const XAttnArgs& args)
      : args_(args),
        to_images_(args.direction == Direction::kT2I),
        x_(to_images_ ? args.captions : args.images),
        y_(to_images_ ? args.images : args.captions) {}

  void run() {
    double x_total = 0, y_total = 0;
    for (int64_t i = 0; i < x_.items; ++i) x_total += static_cast<double>(x_.length(i));
    for (int64_t j = 0; j < y_.items; ++j) y_total += static_cast<double>(y_.length(j));
    const int threads = threads_for(x_total * y_total * static_cast<double>(x_.dim), 2.5e5, args_.num_threads);
    std::vector<Scratch> slots(threads);
    for (int64_t begin = 0; begin < x_.items;) {
      int64_t count = 1, vectors = x_.length(begin);
      while (begin + count < x_.items && vectors + x_.length(begin + count) <= kChunkVectors)
        vectors += x_.length(begin + count++);
      packed_.pack_items(slice(x_, begin, count), Metric::kDot, true, threads);
      parallel_for(y_.items, threads, [&](int64_t j, int slot) { attend(begin, j, slots[slot]); });
      begin += count;
    }
  }

 private:
  struct Scratch {
    ItemRows<T> item;
    Buffer<T> source, scales, products;
    Buffer<double> wide, panel, gram, s, weights, line, weighted;
  };

  // All x items of the chunk to y item j.
  void attend(int64_t begin, int64_t j, Scratch& scratch) const {
    const Rows y = y_.item(j);
    const int columns = packed_.columns;
    if (y.rows > 0) {
      scratch.item.read(y, Metric::kDot, false, scratch.source, scratch.scales);
      scratch.products.reserve(packed_.panel_count() * y.rows * columns);
      for (int64_t p = 0; p < packed_.panel_count(); ++p) {
        RowTile<T> tile = row_tile(packed_, p, scratch.item);
        tile.values = scratch.products.get() + p * y.rows * columns;
        row_products(tile);
      }
      make_gram(scratch);
    }
    for (int64_t i = 0; i < packed_.items; ++i) {
      const int64_t first = packed_.first[i], count = packed_.first[i + 1] - first;
      const double score = y.rows == 0 || count == 0 ? 0 : pair(first, count, y.rows, scratch);
      const int64_t image = to_images_ ? j : begin + i, caption = to_images_ ? begin + i : j;
      static_cast<T*>(args_.scores)[image * args_.captions.items + caption] = static_cast<T>(score);
    }
  }

  // rows [count][dim] times packed columns [dim][width of a tile] to out, panel by panel.
  static void multiply(const double* rows, int64_t count, int64_t dim, const double* panel, double* out) {
    RowTile<double> tile;
    tile.rows = rows;
    tile.row_stride = tile.dim = dim;
    tile.count = count;
    tile.panel = panel;
    tile.columns = kernels().columns_f64;
    tile.values = out;
    row_products(tile);
  }

  // gram[b * count + c] = y_b . y_c
  void make_gram(Scratch& scratch) const {
    const int64_t count = scratch.item.count, dim = packed_.dim;
    const int width = kernels().columns_f64;
    scratch.wide.reserve(count * dim);
    for (int64_t b = 0; b < count; ++b)
      std::copy_n(scratch.item.rows + b * scratch.item.stride, dim, scratch.wide.get() + b * dim);
    scratch.panel.reserve(width * dim);
    scratch.line.reserve(count * width);
    scratch.gram.reserve(count * count);
    for (int64_t c = 0; c < count; c += width) {
      const int used = static_cast<int>(std::min<int64_t>(width, count - c));
      pack<double>(scratch.wide.get() + c * dim, dim, used, dim, width, scratch.panel.get());
      multiply(scratch.wide.get(), count, dim, scratch.panel.get(), scratch.line.get());
      for (int64_t b = 0; b < count; ++b)
        std::copy_n(scratch.line.get() + b * width, used, scratch.gram.get() + b * count + c);
    }
  }

  // s[b * count + a] of the vectors [first, first + count) of the chunk.
  void gather(int64_t first, int64_t count, int64_t y, Scratch& scratch) const {
    const int columns = packed_.columns;
    scratch.s.reserve(y * count);
    for (int64_t a = 0; a < count;) {
      const int64_t at = first + a, p = at / columns, offset = at % columns;
      const int64_t run = std::min<int64_t>(columns - offset, count - a);
      const T* products = scratch.products.get() + p * y * columns + offset;
      for (int64_t b = 0; b < y; ++b) std::copy_n(products + b * columns, run, scratch.s.get() + b * count + a);
      a += run;
    }
  }

  static double exponential(double x) {
    if constexpr (std::is_same_v<T, float>) return std::exp(static_cast<float>(x));
    else return std::exp(x);
  }

  // f[a] of one context vector's s[a], in place.
  void normalise(double* s, int64_t count) const {
    const FeatureNorm norm = args_.feature_norm;
    if (norm == FeatureNorm::kClipped || norm == FeatureNorm::kClippedL1 || norm == FeatureNorm::kClippedL2)
      for (int64_t a = 0; a < count; ++a) s[a] = s[a] > 0 ? s[a] : 0.1 * s[a];
    double sum = 0;
    if (norm == FeatureNorm::kSoftmax) {
      const double largest = *std::max_element(s, s + count);
      for (int64_t a = 0; a < count; ++a) sum += s[a] = exponential(s[a] - largest);
    } else if (norm == FeatureNorm::kL2 || norm == FeatureNorm::kClippedL2) {
      for (int64_t a = 0; a < count; ++a) sum += s[a] * s[a];
      sum = std::sqrt(sum) + args_.eps;
    } else if (norm == FeatureNorm::kL1 || norm == FeatureNorm::kClippedL1) {
      for (int64_t a = 0; a < count; ++a) sum += std::fabs(s[a]);
      sum += args_.eps;
    } else {
      return;
    }
    for (int64_t a = 0; a < count; ++a) s[a] /= sum;
  }

  double pair(int64_t first, int64_t count, int64_t y, Scratch& scratch) const {
    const int width = kernels().columns_f64;
    gather(first, count, y, scratch);
    // weights [panel][y][width], so that the Gram matrix can be multiplied with a panel.
    const int64_t panels = (count + width - 1) / width;
    scratch.weights.reserve(panels * y * width);
    std::fill_n(scratch.weights.get(), panels * y * width, 0.0);
    scratch.weighted.reserve(y * width);
    scratch.line.reserve(y * std::max<int64_t>(width, count));
    double* f = scratch.line.get();
    std::copy_n(scratch.s.get(), y * count, f);
    for (int64_t b = 0; b < y; ++b) normalise(f + b * count, count);
    for (int64_t a = 0; a < count; ++a) {
      double* w = scratch.weights.get() + a / width * y * width + a % width;
      double largest = f[a], sum = 0;
      for (int64_t b = 1; b < y; ++b) largest = std::max(largest, f[b * count + a]);
      for (int64_t b = 0; b < y; ++b)
        sum += w[b * width] = exponential(args_.lambda_softmax * (f[b * count + a] - largest));
      for (int64_t b = 0; b < y; ++b) w[b * width] /= sum;
    }
    return aggregate(first, count, y, scratch);
  }

  // x_a . c_a by way of c_a, where the context vectors cancel in it and fp32 products would be too coarse.
  double attended_product(int64_t a, const double* w, int64_t y, const Scratch& scratch) const {
    const int width = kernels().columns_f64;
    const T* x = packed_.panel(a / packed_.columns) + a % packed_.columns;
    double product = 0;
    for (int64_t d = 0; d < packed_.dim; ++d) {
      double attended = 0;
      for (int64_t b = 0; b < y; ++b) attended += w[b * width] * scratch.wide[b * packed_.dim + d];
      product += attended * static_cast<double>(x[d * packed_.columns]);
    }
    return product;
  }

  double aggregate(int64_t first, int64_t count, int64_t y, Scratch& scratch) const {
    const int width = kernels().columns_f64;
    constexpr double kInf = std::numeric_limits<double>::infinity();
    double sum = 0, largest = -kInf;
    double* relevance = scratch.line.get();
    for (int64_t begin = 0; begin < count; begin += width) {
      const double* w = scratch.weights.get() + begin * y;
      multiply(scratch.gram.get(), y, y, w, scratch.weighted.get());
      for (int64_t a = begin; a < std::min<int64_t>(begin + width, count); ++a) {
        double product = 0, square = 0, length = 0;
        for (int64_t b = 0; b < y; ++b) {
          const double weight = w[b * width + a - begin];
          product += weight * scratch.s[b * count + a];
          square += weight * scratch.weighted[b * width + a - begin];
          length += weight * std::sqrt(scratch.gram[b * y + b]);
        }
        if (square < kCancelled * length * length) product = attended_product(first + a, w + a - begin, y, scratch);
        const double norms = packed_.norm[first + a] * std::sqrt(std::max(square, 0.0));
        const double r = product / std::max(norms, args_.eps);
        relevance[a] = r;
        sum += r;
        largest = std::isnan(r) || r > largest ? r : largest;
      }
    }
    switch (args_.aggregation) {
      case Aggregation::kSum: return sum;
      case Aggregation::kMean: return sum / static_cast<double>(count);
      case Aggregation::kMax: return std::isnan(sum) ? sum : largest;
      case Aggregation::kLogSumExp: break;
    }
    double powers = 0;
    for (int64_t a = 0; a < count; ++a) powers += std::exp(args_.lambda_lse * (relevance[a] - largest));
    return std::log(powers) / args_.lambda_lse + largest;
  }

  const XAttnArgs args_;
  const bool to_images_;
  const VectorSets x_, y_;
  PackedItems<T> packed_;
};

}  // namespace

void xattn_score(const XAttnArgs& args) {
  if (args.images.items == 0 || args.captions.items == 0) return;
  const DefaultFloatMode float_mode;
  visit_source(args.images.dtype, [&](auto source) { XAttn<decltype(source)>(args).run(); });
}

}  // namespace pycm::cpu
