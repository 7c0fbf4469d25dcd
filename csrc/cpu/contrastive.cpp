// Contrastive losses on the CPU: a value and its gradients in one call, over blocks of the score matrix.
//
//              gallery                        scores    cpu/similarity.cpp's product into one block, kBlock x kBlock at
//           +-----+-----+                               most; pairs that do not count are overwritten by kAbsent
//   queries |  B  |     |  row sums           sums      down the columns and along the rows of the block  contrastive_impl.h
//           +-----+-----+                     gradient  in place of the scores; then the product again, twice:
//           |     |     |                                 grad queries += B g,   grad gallery += B^T q
//           +-----+-----+  column sums        A score's positive is added apart, at the end.
//
// The maxima (kMaxHinge, kSemiHard) have a gradient at 2 N pairs only and take no product but the scores'; the sums of hinges
// and sigmoids know their gradient as they see a score; kInfoNCE needs the whole row and column first, and computes blocks
// again unless one block is all.
//
// The columns that do not count in a row are kept as one list a row: those of its group, or of the ignored pairs.
//
// Work: 2 N^2 D flops for the scores (4 for kInfoNCE of more than one block), 4 N^2 D more for the gradients (none for the
// maxima). Memory: one block (at most 16 MB of fp32), normalised copies of the rows, the gradients, O(N).
// Rows of the block are shared among threads, and each sum has one order whatever their number.
#include "ops/contrastive.h"

#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/contrastive_kernels.h"
#include "cpu/contrastive_sides.h"
#include "ops/similarity.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kBlock = 2048;
constexpr int64_t kRowRun = 16, kColumnRun = 128;  // of one task
constexpr double kParallelWork = 2.5e5;            // multiply-adds worth a thread

template <class T>
const ContrastiveKernels<T>& contrastive_kernels() {
  const auto choose = [](const ContrastiveKernels<float>& f32, const ContrastiveKernels<double>& f64) -> auto& {
    if constexpr (std::is_same_v<T, float>) return f32;
    else return f64;
  };
#if defined(__x86_64__)
  if (std::strncmp(kernels().level, "avx512", 6) == 0) return choose(contrastive_f32_avx512, contrastive_f64_avx512);
  if (std::strncmp(kernels().level, "avx2", 4) == 0) return choose(contrastive_f32_avx2, contrastive_f64_avx2);
#endif
  return choose(contrastive_f32_scalar, contrastive_f64_scalar);
}

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// out [x.rows, y.rows] = x . y
template <class T>
void multiply(const Rows& x, const Rows& y, T* out, int threads) {
  SimilarityArgs args;
  args.x = x;
  args.y = y;
  args.metric = Metric::kDot;
  args.out = out;
  args.num_threads = threads;
  similarity(args);
}

Rows slice(Rows rows, int64_t begin, int64_t count) {
  rows.data = rows.row(begin);
  rows.rows = count;
  return rows;
}

Rows transposed(const Rows& rows) {
  return {rows.data, rows.dtype, rows.dim, rows.rows, rows.dim_stride, rows.row_stride};
}

template <class T>
class Contrastive {
 public:
  explicit Contrastive(const ContrastiveArgs& args)
      : args_(args),
        threads_(threads_for(static_cast<double>(args.queries.rows) * static_cast<double>(args.gallery.rows) *
                                 static_cast<double>(args.queries.dim),
                             kParallelWork, args.num_threads)),
        queries_(args.queries, args.metric, args.grad_queries, threads_),
        gallery_(args.gallery, args.metric, args.grad_gallery, threads_),
        count_(args.queries.rows),
        wanted_(queries_.wanted() || gallery_.wanted()),
        positive_(count_),
        weight_(count_, 0.0) {}

  ContrastiveResult run() {
    if (args_.groups != nullptr) list_groups();
    if (args_.ignored_count > 0) list_ignored();
    read_positives();
    switch (args_.loss) {
      case ContrastiveLoss::kListed: listed(); break;
      case ContrastiveLoss::kMaxHinge: maxima(false); break;
      case ContrastiveLoss::kSemiHard: maxima(true); break;
      case ContrastiveLoss::kSumHinge: sum_hinge(); break;
      case ContrastiveLoss::kSigmoid: sigmoid(); break;
      case ContrastiveLoss::kInfoNCE: info_nce(); break;
    }
    // The positives' own share.
    for (int64_t i = 0; i < count_; ++i) {
      if (queries_.wanted()) axpy(weight_[i], gallery_.row(i), queries_.grad(i));
      if (gallery_.wanted()) axpy(weight_[i], queries_.row(i), gallery_.grad(i));
    }
    queries_.finish();
    gallery_.finish();
    return result_;
  }

 private:
  struct Block {
    int64_t row, rows, column, columns;
  };
  struct Range {
    int64_t begin = 0, end = 0;
  };

  static void axpy(double factor, const T* x, T* y, int64_t dim) {
    recurrent_kernels<T>().axpy(static_cast<T>(factor), x, y, dim);
  }
  void axpy(double factor, const T* x, T* y) const { axpy(factor, x, y, args_.queries.dim); }

  // ---- scores ----

  // Evenly, so that no block is so thin that `similarity` would round its scores otherwise than the positives'.
  static int64_t block_count(int64_t rows, int64_t most) { return (rows + most - 1) / most; }
  static int64_t border(int64_t rows, int64_t blocks, int64_t b) { return rows * b / blocks; }

  // As the blocks' scores are computed: a duplicate of the positive scores the same to the bit.
  void read_positives() {
    constexpr int64_t kRun = 32;
    const int64_t runs = block_count(count_, kRun);
    Buffer<T> scores(kRun * kRun);
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t begin = border(count_, runs, r), rows = border(count_, runs, r + 1) - begin;
      multiply<T>(slice(queries_.rows(), begin, rows), slice(gallery_.rows(), begin, rows), scores.get(), threads_);
      for (int64_t i = 0; i < rows; ++i) positive_[begin + i] = scores[i * rows + i];
    }
  }

  // Every block in turn, with its scores.
  template <class F>
  void each_block(F&& visit) {
    const int64_t blocks = block_count(count_, kBlock);
    for (int64_t bi = 0; bi < blocks; ++bi)
      for (int64_t bj = 0; bj < blocks; ++bj) {
        Block block;
        block.row = border(count_, blocks, bi);
        block.rows = border(count_, blocks, bi + 1) - block.row;
        block.column = border(count_, blocks, bj);
        block.columns = border(count_, blocks, bj + 1) - block.column;
        if (blocks > 1 || !filled_) fill(block);
        filled_ = true;
        visit(block);
      }
  }

  void fill(const Block& block) {
    scores_.reserve(block.rows * block.columns);
    multiply<T>(slice(queries_.rows(), block.row, block.rows), slice(gallery_.rows(), block.column, block.columns),
                scores_.get(), threads_);
    const int64_t begin = std::max(block.row, block.column);
    const int64_t end = std::min(block.row + block.rows, block.column + block.columns);
    for (int64_t i = begin; i < end; ++i) at(block, i, i) = kAbsent<T>;
    if (absent_.empty()) return;
    for (int64_t i = block.row; i < block.row + block.rows; ++i) {
      const auto last = columns_.begin() + absent_[i].end;
      auto column = std::lower_bound(columns_.begin() + absent_[i].begin, last, block.column);
      for (; column != last && *column < block.column + block.columns; ++column) at(block, i, *column) = kAbsent<T>;
    }
  }

  // Rows of one group share its list.
  void list_groups() {
    columns_.resize(count_);
    absent_.resize(count_);
    std::iota(columns_.begin(), columns_.end(), int64_t{0});
    std::stable_sort(columns_.begin(), columns_.end(),
                     [&](int64_t a, int64_t b) { return args_.groups[a] < args_.groups[b]; });
    for (int64_t begin = 0, end = 0; begin < count_; begin = end) {
      while (end < count_ && args_.groups[columns_[end]] == args_.groups[columns_[begin]]) ++end;
      for (int64_t p = begin; p < end; ++p) absent_[columns_[p]] = {begin, end};
    }
  }

  void list_ignored() {
    columns_.resize(args_.ignored_count);
    absent_.resize(count_);
    const auto row = [&](int64_t p) { return args_.ignored[2 * p]; };
    for (int64_t p = 0; p < args_.ignored_count; ++p) ++absent_[row(p)].end;
    for (int64_t i = 1; i < count_; ++i) absent_[i].end += absent_[i - 1].end;
    for (int64_t i = 0; i < count_; ++i) absent_[i].begin = absent_[i].end;
    for (int64_t p = 0; p < args_.ignored_count; ++p) columns_[--absent_[row(p)].begin] = args_.ignored[2 * p + 1];
    for (const Range& range : absent_) std::sort(columns_.begin() + range.begin, columns_.begin() + range.end);
  }

  T& at(const Block& block, int64_t i, int64_t j) const {
    return scores_[(i - block.row) * block.columns + (j - block.column)];
  }

  // body(row of the block, its scores), rows shared among threads.
  template <class F>
  void each_row(const Block& block, F&& body) const {
    parallel_for(block_count(block.rows, kRowRun), threads_, [&](int64_t run, int) {
      for (int64_t i = run * kRowRun; i < std::min(block.rows, (run + 1) * kRowRun); ++i)
        body(block.row + i, scores_.get() + i * block.columns);
    });
  }

  // body(first column of the matrix, a strip of the block).
  template <class F>
  void each_strip(const Block& block, F&& body) const {
    parallel_for(block_count(block.columns, kColumnRun), threads_, [&](int64_t run, int) {
      const int64_t j = run * kColumnRun;
      body(block.column + j,
           ScoreTile<T>{scores_.get() + j, block.columns, block.rows, std::min(kColumnRun, block.columns - j)});
    });
  }

  // ---- gradients ----

  // The block holds the gradient of its scores.
  void add_gradients(const Block& block) {
    constexpr DType kDType = std::is_same_v<T, float> ? DType::kFloat32 : DType::kFloat64;
    const Rows weights{scores_.get(), kDType, block.rows, block.columns, block.columns, 1};
    add_product(weights, slice(gallery_.rows(), block.column, block.columns), queries_, block.row);
    add_product(transposed(weights), slice(queries_.rows(), block.row, block.rows), gallery_, block.column);
  }

  void add_product(const Rows& weights, const Rows& rows, const Side<T>& side, int64_t begin) {
    if (!side.wanted()) return;
    const int64_t dim = rows.dim;
    if (count_ <= kBlock) return multiply<T>(weights, transposed(rows), side.grad(begin), threads_);
    product_.reserve(weights.rows * dim);
    multiply<T>(weights, transposed(rows), product_.get(), threads_);
    parallel_for(block_count(weights.rows, kRowRun), threads_, [&](int64_t run, int) {
      for (int64_t i = run * kRowRun; i < std::min(weights.rows, (run + 1) * kRowRun); ++i)
        axpy(1, product_.get() + i * dim, side.grad(begin + i), dim);
    });
  }

  // ---- losses ----

  // A row whose positive is NaN has no finite loss, even without negatives.
  void spread_nan() {
    for (const T positive : positive_) result_.loss += 0 * static_cast<double>(positive);
  }

  void choose(int64_t query, int64_t row, int64_t owner, double score, ChosenPairs& pairs) {
    const double cost = args_.margin + score - positive_[owner];
    if (cost <= 0) return;
    result_.loss += cost;
    pairs.add(query, row);
    weight_[owner] -= 1;
  }

  void add_chosen(const ChosenPairs& pairs) {
    add_rows(queries_, pairs.queries, gallery_, pairs.gallery, threads_);
    add_rows(gallery_, pairs.gallery, queries_, pairs.queries, threads_);
  }

  void maxima(bool below) {
    std::vector<T> best(2 * count_, kAbsent<T>);  // of queries, then of gallery rows
    std::vector<int64_t> where(2 * count_, -1);
    const ContrastiveKernels<T>& loops = contrastive_kernels<T>();
    const auto ceiling = [&](int64_t i) { return below ? positive_.data() + i : nullptr; };
    each_block([&](const Block& block) {
      each_row(block, [&](int64_t i, const T* scores) {
        loops.row_best(scores, block.columns, ceiling(i), block.column, &best[i], &where[i]);
      });
      each_strip(block, [&](int64_t j, const ScoreTile<T>& tile) {
        loops.column_best(tile, ceiling(j), block.row, &best[count_ + j], &where[count_ + j]);
      });
    });
    ChosenPairs pairs;
    for (int64_t i = 0; i < count_; ++i)
      if (where[i] >= 0) choose(i, where[i], i, best[i], pairs);
    for (int64_t j = 0; j < count_; ++j)
      if (where[count_ + j] >= 0) choose(where[count_ + j], j, j, best[count_ + j], pairs);
    spread_nan();
    add_chosen(pairs);
  }

  void listed() {
    ChosenPairs pairs;
    const RecurrentKernels<T>& kernels = recurrent_kernels<T>();
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t k = 0; k < args_.negative_count; ++k) {
        const int64_t j = args_.negatives[i * args_.negative_count + k];
        if (j >= 0) choose(i, j, i, kernels.dot(queries_.row(i), gallery_.row(j), args_.queries.dim), pairs);
      }
    spread_nan();
    add_chosen(pairs);
  }

  void sum_hinge() {
    std::vector<T> offset(count_), count(count_), cost(count_);
    std::vector<RowSums<T>> sums(count_);
    for (int64_t i = 0; i < count_; ++i) offset[i] = static_cast<T>(args_.margin) - positive_[i];
    const ContrastiveKernels<T>& loops = contrastive_kernels<T>();
    each_block([&](const Block& block) {
      each_strip(block, [&](int64_t j, const ScoreTile<T>& tile) {
        loops.column_hinge(tile, &offset[j], &cost[j], &count[j]);
      });
      each_row(block, [&](int64_t i, T* scores) {
        sums[i] = loops.hinge_row(scores, block.columns, offset[i], &offset[block.column], wanted_);
      });
      for (int64_t j = block.column; j < block.column + block.columns; ++j) {
        result_.loss += cost[j];
        weight_[j] -= count[j];
      }
      for (int64_t i = block.row; i < block.row + block.rows; ++i) {
        result_.loss += sums[i].cost;
        weight_[i] -= sums[i].weight;
      }
      if (wanted_) add_gradients(block);
    });
    spread_nan();
  }

  void sigmoid() {
    std::vector<RowSums<T>> sums(count_);
    const T scale = static_cast<T>(args_.scale), bias = static_cast<T>(args_.bias);
    const ContrastiveKernels<T>& loops = contrastive_kernels<T>();
    each_block([&](const Block& block) {
      each_row(block,
               [&](int64_t i, T* scores) { sums[i] = loops.sigmoid_row(scores, block.columns, scale, bias, wanted_); });
      for (int64_t i = block.row; i < block.row + block.rows; ++i) {
        result_.loss += sums[i].cost;
        result_.grad_bias += sums[i].weight;
        result_.grad_scale += sums[i].weighted;
      }
      if (wanted_) add_gradients(block);
    });
    for (int64_t i = 0; i < count_; ++i) {
      const double x = args_.scale * positive_[i] + args_.bias;
      const double slope = -1 / (1 + std::exp(x));
      result_.loss += softplus(-x);
      result_.grad_bias += slope;
      result_.grad_scale += slope * positive_[i];
      weight_[i] = slope * args_.scale;
    }
  }

  // log of the sum of exp(scale * score): `largest` score so far, and the sum relative to it.
  struct Softmax {
    double largest = kAbsent<T>, sum = 0;

    void rescale(double to, double scale) {
      if (sum != 0) sum *= std::exp((largest - to) * scale);
      largest = to;
    }
  };

  void info_nce() {
    const double scale = args_.scale;
    const T factor = static_cast<T>(scale);
    const ContrastiveKernels<T>& loops = contrastive_kernels<T>();
    std::vector<Softmax> rows(count_), columns(count_);
    // Takes in a block's largest score; returns the shift with which its exponentials are to be added.
    const auto begin = [&](Softmax& softmax, T largest) {
      if (largest > softmax.largest) softmax.rescale(largest, scale);
      // Where nothing counts yet, a sum of zeros.
      return softmax.largest == kAbsent<T> ? T(0) : static_cast<T>(-softmax.largest * scale);
    };
    each_block([&](const Block& block) {
      each_strip(block, [&](int64_t first, const ScoreTile<T>& tile) {
        T largest[kColumnRun], shift[kColumnRun], sum[kColumnRun];
        loops.column_max(tile, largest);
        for (int64_t j = 0; j < tile.columns; ++j) shift[j] = begin(columns[first + j], largest[j]);
        loops.column_exp_sum(tile, factor, shift, sum);
        for (int64_t j = 0; j < tile.columns; ++j) columns[first + j].sum += sum[j];
      });
      each_row(block, [&](int64_t i, const T* scores) {
        const T shift = begin(rows[i], loops.row_max(scores, block.columns));
        rows[i].sum += loops.row_exp_sum(scores, block.columns, factor, shift);
      });
    });
    std::vector<T> row_shift(count_), column_shift(count_);
    for (int64_t i = 0; i < count_; ++i) {
      const double x = scale * positive_[i];
      for (auto [softmax, shift] : {std::pair(&rows[i], &row_shift[i]), std::pair(&columns[i], &column_shift[i])}) {
        if (!(softmax->largest >= positive_[i])) softmax->rescale(positive_[i], scale);
        const double rest = std::exp(x - softmax->largest * scale);
        const double log_sum = softmax->largest * scale + std::log(softmax->sum + rest);
        result_.loss += log_sum - x;
        weight_[i] -= softmax->sum / (softmax->sum + rest) * scale;
        *shift = static_cast<T>(-log_sum);
      }
      result_.grad_scale += weight_[i] / scale * positive_[i];
    }
    if (!wanted_ && !args_.needs_scale) return;
    std::vector<RowSums<T>> sums(count_);
    each_block([&](const Block& block) {
      each_row(block, [&](int64_t i, T* scores) {
        sums[i] = loops.softmax_row(scores, block.columns, factor, row_shift[i], &column_shift[block.column], wanted_);
      });
      for (int64_t i = block.row; i < block.row + block.rows; ++i) result_.grad_scale += sums[i].weighted;
      if (wanted_) add_gradients(block);
    });
  }

  const ContrastiveArgs& args_;
  const int threads_;
  Side<T> queries_, gallery_;
  const int64_t count_;
  const bool wanted_;
  std::vector<T> positive_;     // s_ii
  std::vector<double> weight_;  // d loss / d s_ii
  // The columns beside i that do not count in row i: columns_[absent_[i]], ascending. None where empty.
  std::vector<int64_t> columns_;
  std::vector<Range> absent_;
  Buffer<T> scores_, product_;
  bool filled_ = false;
  ContrastiveResult result_;
};

}  // namespace

ContrastiveResult contrastive(const ContrastiveArgs& args) {
  const DefaultFloatMode float_mode;
  return visit_source(args.queries.dtype, [&](auto source) { return Contrastive<decltype(source)>(args).run(); });
}

}  // namespace pycm::cpu
