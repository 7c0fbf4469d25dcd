// maxsim on the CPU: one pass for each direction (maxsim_pass.h), in fp32, or fp64 for fp64 inputs; fp32 by a screen in
// bf16 where the processor has one. Pairs with a product that is no finite number there are evaluated again in fp64, the
// rare overflow as well as the NaN (maxsim_pair.h).
#include "ops/maxsim.h"

#include <memory>

#include "cpu/maxsim_pair.h"

namespace pycm::cpu {
namespace {

template <class T>
void run(const MaxSimArgs& args) {
  T* scores = static_cast<T*>(args.scores);
  const int threads = maxsim_threads(args);
  run_passes<T, T>(args, threads, scores, {});
  const int64_t columns = args.gallery.items;
  std::vector<std::unique_ptr<PairScorer<T>>> scorers(threads);
  parallel_for(args.queries.items, threads, [&](int64_t i, int slot) {
    for (int64_t j = 0; j < columns; ++j) {
      if (std::isfinite(scores[i * columns + j])) continue;
      if (!scorers[slot]) scorers[slot] = std::make_unique<PairScorer<T>>(args);
      scores[i * columns + j] = static_cast<T>(scorers[slot]->score(i, j));
    }
  });
}

}  // namespace

void maxsim(const MaxSimArgs& args) {
  if (args.queries.items == 0 || args.gallery.items == 0) return;
  const DefaultFloatMode float_mode;
  visit_source(args.queries.dtype, [&](auto source) { run<decltype(source)>(args); });
}

}  // namespace pycm::cpu
