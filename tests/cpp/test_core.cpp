// The CPU core without Python: similarity, topk, rank, join, late interaction and temporal_pool at every level over many shapes,
// against plain loops in fp64.
// Meant for a build with -fsanitize=address,undefined. Prints "N passed, N failed"; exits with 1 when anything failed.
//
// `--mutant` is for a build with PYCM_BOUND_SCALE below 1, whose screens have too small an error bound: it runs the data on
// which errors all but reach their bounds, and exits with 0 only when matches are lost by every screen at every level.
#include <cstring>
#include <string>

#include "cpu/kernels.h"
#include "harness.h"
#include "late_interaction.h"
#include "ops/similarity.h"
#include "screens.h"
#include "temporal_pool.h"

namespace {

using namespace pycm;
using namespace pycm::test;

// ---- similarity: within the error of fp32 (or fp64) sums ----

void test_similarity(const Matrix& x, const Matrix& y, Metric metric, int threads, const std::string& what) {
  const int64_t n = x.rows.rows, m = y.rows.rows, dim = x.rows.dim;
  const bool wide = x.rows.dtype == DType::kFloat64;
  std::vector<char> out(2 * n * m * (wide ? 8 : 4));
  SimilarityArgs args;
  args.x = x.rows;
  args.y = y.rows;
  args.metric = metric;
  args.batch_ndim = 1;  // twice the same matrix, by a stride of 0
  args.batch_shape[0] = 2;
  args.out = out.data();
  args.num_threads = threads;
  cpu::similarity(args);
  const double eps = wide ? 0x1p-52 : 0x1p-23;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const int64_t at = (b * n + i) * m + j;
        const double got = result(out, wide, at);
        const double want = score(metric, x.values[i], y.values[j]);
        const double norms = std::sqrt(product_sum(x.values[i], x.values[i]) * product_sum(y.values[j], y.values[j]));
        double tolerance = static_cast<double>(dim + 8) * eps *
                           (metric == Metric::kDot ? norms
                            : is_distance(metric)  ? want
                                                   : 1);
        if (is_distance(metric)) tolerance *= 64;  // where cancellation is let pass
        if (std::fabs(got - want) <= tolerance) continue;
        char text[160];
        std::snprintf(text, sizeof text, "%s: [%ld, %ld]: got %.9g, expected %.9g", what.c_str(), long(i), long(j), got,
                      want);
        return report(false, text);
      }
  report(true, what);
}

void sweep(const std::string& level) {
  const int64_t sizes[][3] = {{1, 1, 1},     {1, 40, 5},    {2, 33, 31},   {3, 12, 1},    {4, 31, 2},
                              {5, 32, 3},    {11, 33, 4},   {12, 64, 8},   {13, 65, 15},  {16, 63, 16},
                              {17, 129, 17}, {24, 100, 33}, {25, 257, 12}, {33, 200, 65}, {3, 40, 511},
                              {5, 33, 512},  {4, 35, 513},  {3, 70, 1025}, {40, 900, 20}};
  const Layout layouts[] = {Layout::kDense, Layout::kTransposed, Layout::kReversed, Layout::kEverySecond,
                            Layout::kOneRow};
  int turn = 0;
  // Sanitised loops are slow: of the large sizes every third combination will do.
  for (const auto& size : sizes)
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64})
      for (Metric metric :
           {Metric::kDot, Metric::kCosine, Metric::kPearson, Metric::kEuclidean, Metric::kSqEuclidean}) {
        ++turn;
        const auto [n, m, dim] = size;
        if (n * m * dim > 50000 && turn % 3 != 1) continue;
        const Layout a = layouts[turn % 5], b = layouts[turn / 5 % 5];
        const bool integers = turn % 3 == 0;
        const Matrix q(dtype, n, dim, a, random_rows(n, dim, integers, a == Layout::kOneRow));
        const Matrix g(dtype, m, dim, b, random_rows(m, dim, integers, b == Layout::kOneRow));
        const int64_t k = turn % 4 == 0 ? m : turn % 4 == 1 ? 1 : std::max<int64_t>(1, m / 5);
        const int threads = 1 + turn % 3;
        char what[120];
        std::snprintf(what, sizeof what, "%s metric %d %s [%ld, %ld] x [%ld, %ld] k=%ld threads=%d layouts %d %d",
                      level.c_str(), static_cast<int>(metric), name_of(dtype), long(n), long(dim), long(m), long(dim),
                      long(k), threads, static_cast<int>(a), static_cast<int>(b));
        const ScreenChoice screen = kScreens[turn / 2 % 4];
        const std::string searched = std::string("screen ") + kScreenNames[turn / 2 % 4] + " " + what;
        test_search({q, g, metric, screen, threads}, k, turn % 2 == 0, turn % 7 < 2, searched);
        const Encoded encoded(g, metric, kScreens[turn % 4], 1 + turn % 3, turn % 5 < 2, threads);
        test_search({q, g, metric, kScreens[turn % 4], threads, &encoded.gallery}, k, turn % 2 == 1, turn % 7 < 2,
                    std::string("encoded ") + kScreenNames[turn % 4] + " " + what);
        test_similarity(q, g, metric, threads, std::string("similarity ") + what);
      }
}

// Whether the bounds of every screen are as they should be: not too small, or in a mutant caught at being so.
bool check_level(const std::string& level, bool mutant) {
  bool all_caught = true;
  for (ScreenChoice screen : {ScreenChoice::kFloat32, ScreenChoice::kBFloat16, ScreenChoice::kInt8}) {
    const Caught caught = check_bounds(screen, level);
    if (!mutant) continue;
    const bool both = caught.rows > 0 && (caught.queries > 0 || screen == ScreenChoice::kFloat32);
    std::printf("%s %s: %d checks fail by the loss of rows, %d by that of queries%s\n", level.c_str(),
                kScreenNames[static_cast<int>(screen)], caught.rows, caught.queries, both ? "" : ": NOT CAUGHT");
    all_caught &= both;
  }
  return all_caught;
}

}  // namespace

int main(int argc, char** argv) {
  const bool mutant = argc > 1 && std::strcmp(argv[1], "--mutant") == 0;
  bool all_caught = true;
  for (const char* level : cpu::kSimdLevels) {
    if (!cpu::simd_level_available(level)) {
      std::printf("%s: not on this processor\n", level);
      continue;
    }
    cpu::set_simd_level(level);
    report(std::strcmp(cpu::kernels().level, level) == 0, std::string("the level is ") + level);
    all_caught &= check_level(level, mutant);
    if (mutant) continue;
    sweep(level);
    sweep_late_interaction(level);
    test_interrupted_extend(level);
    test_temporal_pool(level);
  }
  if (mutant) return all_caught ? 0 : 1;
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
