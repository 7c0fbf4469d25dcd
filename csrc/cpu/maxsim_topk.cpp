// maxsim_topk on the CPU: screen every pair in T by maxsim's own passes, verify what may be among the k best.
//
//   screen   scores of a chunk of queries with all items [rows][M], in fp64 sums of T maxima, and what bounds them:
//            |score - exact| <= relative * (sum of the norms summed over) * (largest norm maximised over) + ...
//   select   a query's threshold is its k-th best lower end; a pair survives if its upper end reaches it
//   verify   survivors by PairScorer, in fp64 in the fixed order; the k best by score, then by index
//
// The maximum of bounded products is within the largest of their bounds, a sum within the sum, so the interval holds; NaN
// and overflow give the whole line. Work: that of maxsim, and a few products for each survivor. Memory: 64 MB of scores
// and the borders of M items, whatever N.
#include <functional>
#include <memory>

#include "cpu/matches.h"
#include "cpu/maxsim_pair.h"
#include "ops/maxsim.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kChunkScores = 8 << 20;

template <class T>
class MaxSimTopK {
 public:
  explicit MaxSimTopK(const MaxSimTopKArgs& args)
      : args_(args),
        all_(args.forward),
        threads_(maxsim_threads(args.forward)),
        error_(all_.metric, all_.queries.dim),
        columns_(all_.gallery.items) {}

  void run() {
    const int64_t rows = std::clamp<int64_t>(kChunkScores / columns_, 1, all_.queries.items);
    approximate_.reserve(rows * columns_);
    for (Buffer<double>& norms : norms_) norms.reserve(std::max(rows, columns_));
    for (int64_t begin = 0; begin < all_.queries.items; begin += rows)
      chunk(begin, std::min(rows, all_.queries.items - begin));
  }

 private:
  struct Survivor {
    int64_t query, index;
    T score;
  };

  void chunk(int64_t begin, int64_t rows) {
    MaxSimArgs part = all_;
    part.queries = slice(all_.queries, begin, rows);
    double* const norms[4] = {norms_[0].get(), norms_[1].get(), norms_[2].get(), norms_[3].get()};
    run_passes<T, double>(part, threads_, approximate_.get(), norms);
    std::vector<std::vector<Survivor>> survivors(rows);
    parallel_for(rows, threads_, [&](int64_t i, int) { survivors[i] = select(part, i); });
    std::vector<Survivor*> open;
    for (std::vector<Survivor>& list : survivors)
      for (Survivor& survivor : list)
        if (args_.exact || std::isnan(survivor.score)) open.push_back(&survivor);
    std::vector<std::unique_ptr<PairScorer<T>>> scorers(threads_);
    parallel_for(static_cast<int64_t>(open.size()), threads_, [&](int64_t s, int slot) {
      if (!scorers[slot]) scorers[slot] = std::make_unique<PairScorer<T>>(part);
      open[s]->score = static_cast<T>(scorers[slot]->score(open[s]->query, open[s]->index));
    });
    parallel_for(rows, threads_, [&](int64_t i, int) { write(begin + i, survivors[i]); });
  }

  // How far the exact score may be from the approximate one.
  double doubt(const MaxSimArgs& part, int64_t i, int64_t j, double approximate) const {
    double sum = 0;
    if (part.direction != Direction::kI2T) sum += doubt_of(part.queries.length(i), norms_[0][i], norms_[1][j]);
    if (part.direction != Direction::kT2I) sum += doubt_of(part.gallery.length(j), norms_[2][j], norms_[3][i]);
    return sum * (1 + 0x1p-40) + 0x1p-50 * std::fabs(approximate);
  }
  double doubt_of(int64_t count, double summed, double largest) const {
    const double n = static_cast<double>(count);
    if (count == 0) return 0;
    const double sum = (error_.relative + (n / 32 + 16) * 0x1p-52) * summed * largest + n * error_.absolute;
    return part_of(sum, n);
  }
  double part_of(double sum, double n) const { return all_.reduce == Reduce::kMean ? sum / n : sum; }

  // Pairs that may be among the k best, with their scores where these need no verification.
  std::vector<Survivor> select(const MaxSimArgs& part, int64_t i) const {
    const double* scores = approximate_.get() + i * columns_;
    constexpr double kInf = std::numeric_limits<double>::infinity();
    std::vector<T> lower(columns_);
    const auto error = [&](int64_t j) { return args_.exact ? doubt(part, i, j, scores[j]) : 0.0; };
    for (int64_t j = 0; j < columns_; ++j)
      lower[j] = static_cast<T>(std::isfinite(scores[j]) ? scores[j] - error(j) : -kInf);
    // Rounded, as scores are; rounding keeps their order.
    std::nth_element(lower.begin(), lower.begin() + (args_.k - 1), lower.end(), std::greater<T>());
    const T threshold = lower[args_.k - 1];
    std::vector<Survivor> survivors;
    for (int64_t j = 0; j < columns_; ++j) {
      const bool known = std::isfinite(scores[j]);
      if (known && static_cast<T>(scores[j] + error(j)) < threshold) continue;
      survivors.push_back({i, j, known ? static_cast<T>(scores[j]) : std::numeric_limits<T>::quiet_NaN()});
    }
    return survivors;
  }

  void write(int64_t row, const std::vector<Survivor>& survivors) const {
    BestMatches best;
    best.reset(args_.k, static_cast<int64_t>(survivors.size()));
    for (const Survivor& survivor : survivors) best.offer(static_cast<double>(survivor.score), survivor.index);
    const std::vector<Match>& matches = best.sorted();
    T* scores = static_cast<T*>(args_.scores) + row * args_.k;
    int64_t* indices = args_.indices + row * args_.k;
    std::fill_n(scores, args_.k, -std::numeric_limits<T>::infinity());
    std::fill_n(indices, args_.k, int64_t{-1});
    for (size_t m = 0; m < matches.size(); ++m) {
      scores[m] = static_cast<T>(matches[m].key);
      indices[m] = matches[m].index;
    }
  }

  const MaxSimTopKArgs args_;
  const MaxSimArgs all_;
  int threads_;
  ProductError<T> error_;
  int64_t columns_;
  Buffer<double> approximate_;  // [rows of a chunk][M]
  // Of the first direction: sums of the queries' norms, largest of the items'; of the second: sums of the items', largest
  // of the queries'.
  Buffer<double> norms_[4];
};

}  // namespace

void maxsim_topk(const MaxSimTopKArgs& args) {
  if (args.forward.queries.items == 0) return;
  const DefaultFloatMode float_mode;
  visit_source(args.forward.queries.dtype, [&](auto source) { MaxSimTopK<decltype(source)>(args).run(); });
}

}  // namespace pycm::cpu
