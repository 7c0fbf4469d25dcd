// join: all pairs whose score reaches a threshold.
#pragma once

#include <vector>

#include "core/array.h"
#include "core/metric.h"
#include "ops/screen.h"

namespace pycm {

struct JoinArgs {
  Rows queries;          // [N, D]
  Rows gallery;          // [M, D]
  double threshold = 0;  // pairs with a score of at least it, or a distance of at most it
  Metric metric = Metric::kCosine;
  ScreenChoice screen = ScreenChoice::kAuto;
  // From 0 on: only gallery rows above after + (row of the query), which makes a join of a set with itself name each pair
  // once.
  int64_t after = -1;
  int64_t limit = 0;  // more pairs are an error
  int num_threads = 1;
};

struct JoinedPair {
  int64_t query, index;
  double score;
};

namespace cpu {
class EncodedGallery;
// Ordered by query, then by index. `encoded`: args.gallery, encoded beforehand; or null.
std::vector<JoinedPair> join(const JoinArgs& args, const EncodedGallery* encoded = nullptr);
}  // namespace cpu

}  // namespace pycm
