// topk, rank and join against tables of exact scores: every screen, one-shot and of a gallery encoded beforehand; and data on
// which the error of a screen is all but its bound.
#pragma once

#include <memory>
#include <numeric>

#include "core/check.h"
#include "cpu/encoded_gallery.h"
#include "cpu/parallel.h"
#include "harness.h"
#include "ops/join.h"
#include "ops/rank.h"
#include "ops/topk.h"

namespace pycm::test {

constexpr ScreenChoice kScreens[] = {ScreenChoice::kAuto, ScreenChoice::kFloat32, ScreenChoice::kBFloat16,
                                     ScreenChoice::kInt8};
constexpr const char* kScreenNames[] = {"auto", "float32", "bfloat16", "int8"};

// A gallery, queries, and how they are searched.
struct SearchCase {
  const Matrix &q, &g;
  Metric metric = Metric::kDot;
  ScreenChoice screen = ScreenChoice::kAuto;
  int threads = 1;
  const cpu::EncodedGallery* encoded = nullptr;
};

// Pairs ruled out.
struct Rules {
  std::vector<uint8_t> mask;
  std::vector<int64_t> exclude, offsets;

  Rules(bool with_mask, bool with_exclude, int64_t n, int64_t m) {
    if (with_mask)
      for (int64_t i = 0; i < n * m; ++i) mask.push_back(generator() % 3 != 0);
    if (!with_exclude) return;
    offsets.push_back(0);
    for (int64_t i = 0; i < n; ++i) {
      for (uint64_t e = generator() % 4; e > 0; --e) exclude.push_back(static_cast<int64_t>(generator() % (m + 1)) - 1);
      offsets.push_back(static_cast<int64_t>(exclude.size()));
    }
    exclude.reserve(1);
  }
  template <class Args>
  void set(Args& args) const {
    if (!mask.empty()) args.mask = {mask.data(), args.gallery.rows, 1};
    if (offsets.empty()) return;
    args.exclude = exclude.data();
    args.exclude_offsets = offsets.data();
  }
  bool allow(int64_t i, int64_t j, int64_t m) const {
    if (!mask.empty() && !mask[i * m + j]) return false;
    return offsets.empty() || std::count(exclude.begin() + offsets[i], exclude.begin() + offsets[i + 1], j) == 0;
  }
};

template <class Args>
Args arguments(const SearchCase& test) {
  Args args;
  args.queries = test.q.rows;
  args.gallery = test.g.rows;
  args.metric = test.metric;
  args.screen = test.screen;
  args.num_threads = test.threads;
  return args;
}

using Table = std::vector<std::vector<double>>;

inline void test_topk(const SearchCase& test, const Table& table, int64_t k, const Rules& rules,
                      const std::string& what) {
  const int64_t n = test.q.rows.rows, m = test.g.rows.rows;
  const bool wide = test.q.rows.dtype == DType::kFloat64;
  std::vector<int64_t> indices(n * k);
  std::vector<char> scores(n * k * (wide ? 8 : 4));
  TopKArgs args = arguments<TopKArgs>(test);
  args.k = k;
  args.scores = scores.data();
  args.indices = indices.data();
  rules.set(args);
  cpu::topk(args, test.encoded);
  const double sign = is_distance(test.metric) ? 1 : -1;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<std::pair<double, int64_t>> keys;
    for (int64_t j = 0; j < m; ++j)
      if (rules.allow(i, j, m) && !std::isnan(table[i][j])) keys.push_back({sign * table[i][j], j});
    std::stable_sort(keys.begin(), keys.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (int64_t r = 0; r < k; ++r) {
      const bool found = r < static_cast<int64_t>(keys.size());
      const double want = sign * (found ? keys[r].first : INFINITY), got = result(scores, wide, i * k + r);
      if (got == want && indices[i * k + r] == (found ? keys[r].second : -1)) continue;
      char text[160];
      std::snprintf(text, sizeof text, ": topk: query %ld place %ld: got %.9g of %ld, expected %.9g of %ld", long(i),
                    long(r), got, long(indices[i * k + r]), want, found ? long(keys[r].second) : -1L);
      return report(false, what + text);
    }
  }
  report(true, what);
}

// Of query i the positives `positives[i]`.
inline void test_rank(const SearchCase& test, const Table& table, const std::vector<std::vector<int64_t>>& positives,
                      const Rules& rules, const std::string& what) {
  const int64_t n = test.q.rows.rows, m = test.g.rows.rows;
  const bool wide = test.q.rows.dtype == DType::kFloat64;
  std::vector<int64_t> flat, offsets{0};
  for (const auto& some : positives) {
    flat.insert(flat.end(), some.begin(), some.end());
    offsets.push_back(static_cast<int64_t>(flat.size()));
  }
  std::vector<int64_t> greater(flat.size()), equal(flat.size());
  std::vector<char> scores(flat.size() * (wide ? 8 : 4));
  RankArgs args = arguments<RankArgs>(test);
  args.positives = flat.data();
  args.offsets = offsets.data();
  args.greater = greater.data();
  args.equal = equal.data();
  args.scores = scores.data();
  rules.set(args);
  cpu::rank(args, test.encoded);
  const double sign = is_distance(test.metric) ? -1 : 1;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t p = offsets[i]; p < offsets[i + 1]; ++p) {
      const double own = table[i][flat[p]];
      int64_t above = 0, same = 0;
      for (int64_t j = 0; j < m; ++j) {
        if (j == flat[p] || !rules.allow(i, j, m)) continue;
        above += sign * table[i][j] > sign * own;
        same += table[i][j] == own;
      }
      const double got = result(scores, wide, p);
      if (above == greater[p] && same == equal[p] && (got == own || (std::isnan(got) && std::isnan(own)))) continue;
      char text[160];
      std::snprintf(text, sizeof text,
                    ": rank: query %ld positive %ld: got %ld above, %ld equal to %.9g, expected %ld, %ld, %.9g",
                    long(i), long(flat[p]), long(greater[p]), long(equal[p]), got, long(above), long(same), own);
      return report(false, what + text);
    }
  report(true, what);
}

inline void test_join(const SearchCase& test, const Table& table, double threshold, int64_t after,
                      const std::string& what) {
  const int64_t n = test.q.rows.rows, m = test.g.rows.rows;
  JoinArgs args = arguments<JoinArgs>(test);
  args.threshold = threshold;
  args.after = after;
  args.limit = n * m;
  const std::vector<JoinedPair> pairs = cpu::join(args, test.encoded);
  size_t at = 0;
  bool same = true;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      if (after >= 0 && j <= after + i) continue;
      if (!(is_distance(test.metric) ? table[i][j] <= threshold : table[i][j] >= threshold)) continue;
      same &= at < pairs.size() && pairs[at].query == i && pairs[at].index == j && pairs[at].score == table[i][j];
      ++at;
    }
  char text[120];
  std::snprintf(text, sizeof text, ": join from %.9g: got %ld pairs, expected %ld", threshold, long(pairs.size()),
                long(at));
  report(same && at == pairs.size(), what + text);
}

// topk, rank and join; positives and the threshold are drawn.
inline void test_search(const SearchCase& test, int64_t k, bool mask, bool exclude, const std::string& what) {
  const int64_t n = test.q.rows.rows, m = test.g.rows.rows;
  const Table table = score_table(test.metric, test.q, test.g);
  const Rules rules(mask, exclude, n, m);
  test_topk(test, table, k, rules, what);
  std::vector<std::vector<int64_t>> positives(n);
  for (auto& some : positives)
    for (uint64_t p = generator() % 3; p > 0; --p) some.push_back(static_cast<int64_t>(generator() % m));
  test_rank(test, table, positives, rules, what);
  test_join(test, table, table[generator() % n][generator() % m], generator() % 2 == 0 ? -1 : int64_t(generator() % m),
            what);
}

// Rows encoded in several steps, and then used from copies of exactly the size of the state, so that a stray read is seen.
struct Encoded {
  cpu::EncodedGallery gallery;
  std::vector<uint32_t> panels;
  std::vector<float> columns;
  std::vector<cpu::RowStats> stats;
  std::vector<double> centre;

  Encoded(const Matrix& rows, Metric metric, ScreenChoice screen, int steps, bool restored, int threads)
      : gallery(metric, screen) {
    Rows some = rows.rows;
    for (int step = 1; step <= steps; ++step) {
      some.rows = std::max<int64_t>(1, rows.rows.rows * step / steps);
      gallery.extend(some, threads);
      if (restored) restore(some, metric, screen);
    }
  }

 private:
  void restore(const Rows& rows, Metric metric, ScreenChoice screen) {
    cpu::EncodedGallery::State state = gallery.state();
    const int64_t padded = state.words == 0 ? 0 : cpu::round_up(state.size, cpu::kPanelColumns);
    std::vector<uint32_t> new_panels(state.panels, state.panels + padded * state.words);
    std::vector<float> new_columns;
    for (int a = 0; a < cpu::kColumnArrays; ++a)
      new_columns.insert(new_columns.end(), state.columns + a * state.capacity,
                         state.columns + a * state.capacity + padded);
    std::vector<cpu::RowStats> new_stats(state.stats, state.stats + state.size);
    if (state.has_centre) centre.assign(state.centre, state.centre + state.dim);
    panels.swap(new_panels);
    columns.swap(new_columns);
    stats.swap(new_stats);
    state.capacity = padded;
    state.panels = panels.data();
    state.columns = columns.data();
    state.stats = stats.data();
    state.centre = centre.data();
    gallery = cpu::EncodedGallery(metric, screen);
    gallery.restore(rows, state);
  }
};

// A first extension that is stopped half-way leaves nothing behind that rows of another shape could trip over.
inline void test_interrupted_extend(const std::string& level) {
  const int64_t dim = 512;
  std::vector<float> many(30000 * dim, 1);
  Rows rows;
  rows.data = many.data();
  rows.rows = 30000;
  rows.dim = rows.row_stride = dim;
  cpu::EncodedGallery gallery(Metric::kEuclidean, ScreenChoice::kInt8);
  cpu::set_interrupt_check([] { return true; });
  bool stopped = false;
  try {
    gallery.extend(rows, 1);
  } catch (const Interrupted&) {
    stopped = true;
  }
  cpu::set_interrupt_check(nullptr);
  report(stopped && gallery.size() == 0, level + " an extension is stopped");
  const Matrix q(DType::kFloat32, 5, 700, Layout::kDense, random_rows(5, 700, false, false));
  const Matrix g(DType::kFloat32, 200, 700, Layout::kDense, random_rows(200, 700, false, false));
  gallery.extend(g.rows, 2);
  test_search({q, g, Metric::kEuclidean, ScreenChoice::kInt8, 2, &gallery}, 7, false, false,
              level + " after a stopped extension");
}

// ---- errors that all but reach their bound ----

struct Tight {
  Table queries, gallery;
  int64_t winner = 0, rival = 0;  // the winner's score is a little higher, its value too low by almost the bound
};

// fp32: rows of 1, s, s, ... against 1, t, t, ...: with s t just below half an ulp of 1 each product is lost, just above it
// counts double. The error reaches 0.86 of the bound.
inline Tight tight_float32() {
  const int64_t dim = cpu::kDepth, m = 600;
  const double s = 0x1p-12, below = s * (1 - 0x1p-24), above = s * (1 + 0x1p-23);
  Tight data{Table(4, std::vector<double>(dim, s)), Table(m, std::vector<double>(dim, 0)), 57, 0};
  for (auto& row : data.queries) row[0] = 1;
  for (int64_t j = 0; j < m; ++j) {
    const bool best = j % 100 == 57;
    std::fill_n(data.gallery[j].begin(), best ? dim : dim - 4, best ? below : above);
    data.gallery[j][0] = 1;
  }
  return data;
}

// The codes that int8 and bfloat16 hold without loss, in units of one step: below 128, or of 8 bits with the first one set.
struct Codes {
  int low, high;
};
constexpr Codes kInt8Codes{0, 126}, kBfloat16Codes{128, 254};

inline std::vector<double> random_codes(const Codes& codes, int64_t dim) {
  std::vector<double> row(dim);
  for (double& value : row)
    value = static_cast<double>(codes.low + static_cast<int>(generator() % (codes.high - codes.low)));
  return row;
}

// Whatever rows there are, every other pair of them is negated: their mean is near 0, so that they are not centred, and the
// negated ones are far from any match.
inline void negate_half(Table& rows) {
  for (size_t j = 0; j < rows.size(); ++j)
    if (j / 2 % 2 == 1)
      for (double& value : rows[j]) value = -value;
}

// The gallery's loss lies along the query: winners lose 0.49 steps of every element, rivals lose nothing and score a little
// less, though their values are higher.
inline Tight tight_rows(const Codes& codes) {
  const int64_t dim = 64, m = 600;
  Tight data{Table(4, std::vector<double>(dim, 1)), Table(m), 100, 0};
  const std::vector<double> base = random_codes(codes, dim - 1);
  for (int64_t j = 0; j < m; ++j) {
    std::vector<double>& row = data.gallery[j] = base;
    std::shuffle(row.begin(), row.end(), generator);
    const bool winner = j % 100 == 0 && j > 0;
    if (winner)
      for (double& value : row) value += 0.49;
    else
      for (int64_t d = 0; d < 29; ++d) row[d] += 1;
    row.push_back(codes.high == 126 ? 127 : 255);  // the scale of int8
  }
  negate_half(data.gallery);
  return data;
}

// The queries' loss lies along the rows: a winner is all ones, its rival has one element a step lower.
inline Tight tight_queries(const Codes& codes) {
  const int64_t dim = 64, m = 600;
  Tight data{Table(4), Table(m, std::vector<double>(dim, 1)), 100, 0};
  for (auto& row : data.queries) {
    row = random_codes(codes, dim - 1);
    for (double& value : row) value += 0.49;
    row.push_back(codes.high == 126 ? 127 : 255);
  }
  for (int64_t j = 0; j < m; ++j)
    if (j % 100 != 0 || j == 0) data.gallery[j][j % (dim - 1)] = codes.high == 126 ? 126.0 / 127 : 255.0 / 256;
  negate_half(data.gallery);
  return data;
}

// topk, rank and join of the winners. Returns how many of the checks failed.
inline int check_tight(const Tight& data, ScreenChoice screen, bool encoded, const std::string& what) {
  const int64_t n = static_cast<int64_t>(data.queries.size()), m = static_cast<int64_t>(data.gallery.size());
  const int64_t dim = static_cast<int64_t>(data.queries[0].size());
  const Matrix q(DType::kFloat32, n, dim, Layout::kDense, data.queries);
  const Matrix g(DType::kFloat32, m, dim, Layout::kDense, data.gallery);
  std::unique_ptr<Encoded> gallery;
  if (encoded) gallery = std::make_unique<Encoded>(g, Metric::kDot, screen, 1, false, 1);
  const SearchCase test{q, g, Metric::kDot, screen, 1, encoded ? &gallery->gallery : nullptr};
  const Table table = score_table(Metric::kDot, q, g);
  const Rules none(false, false, n, m);
  const int before = failed;
  for (int64_t k : {1, 5, 50}) test_topk(test, table, k, none, what);
  test_rank(test, table, std::vector<std::vector<int64_t>>(n, {data.rival}), none, what);
  for (int64_t i = 0; i < n; ++i) test_join(test, table, table[i][data.winner], -1, what);
  return failed - before;
}

// Checks that failed, by screen.
struct Caught {
  int rows = 0, queries = 0;
};
inline Caught check_bounds(ScreenChoice screen, const std::string& level) {
  const std::string what = level + " " + kScreenNames[static_cast<int>(screen)];
  Caught caught;
  for (bool encoded : {false, true}) {
    if (screen == ScreenChoice::kFloat32) {
      caught.rows += check_tight(tight_float32(), screen, encoded, what + " one-sided rounding");
      continue;
    }
    const Codes& codes = screen == ScreenChoice::kInt8 ? kInt8Codes : kBfloat16Codes;
    caught.rows += check_tight(tight_rows(codes), screen, encoded, what + " loss of rows along the query");
    caught.queries += check_tight(tight_queries(codes), screen, encoded, what + " loss of queries along the rows");
  }
  return caught;
}

}  // namespace pycm::test
