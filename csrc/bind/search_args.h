// From Python's arguments to an operation's, for the bindings of both backends.
#pragma once

#include <optional>
#include <vector>

#include "bind/array_arg.h"
#include "core/metric.h"
#include "ops/rank.h"
#include "ops/similarity.h"
#include "ops/topk.h"

namespace pycm::cpu {
class EncodedGallery;
}

namespace pycm::bind {

// Which pairs a caller rules out: booleans [M] or [N, M], and compressed rows of int64.
class FilterArgs {
 public:
  FilterArgs(const char* function, nb::handle mask, nb::handle exclude, nb::handle offsets, int64_t queries,
             int64_t gallery, Memory memory = Memory::kHost);

  Mask mask;
  const int64_t* exclude = nullptr;
  const int64_t* exclude_offsets = nullptr;
  std::vector<const ArrayArg*> arrays() const;

 private:
  std::optional<ArrayArg> mask_arg_, exclude_arg_, offsets_arg_;
};

// Compressed rows (values, offsets [rows + 1]): contiguous; and, in memory that can be read here, offsets rising from 0 to the
// number of values, every value in [lowest, limit).
void check_compressed(const char* function, const char* name, const ArrayArg& values, const ArrayArg& offsets,
                      int64_t rows, int64_t lowest, int64_t limit, Memory memory = Memory::kHost);

// queries [N, D] against gallery rows [M, D] of one dtype.
void check_pair(const char* function, const ArrayArg& queries, const ArrayArg& gallery);

// The gallery of a call: an array, or rows encoded beforehand.
struct GalleryArg {
  Rows rows;
  const cpu::EncodedGallery* encoded = nullptr;
};

// What an operation is asked, all but its results and threads. `shape` is that of the scores.
TopKArgs topk_args(const Rows& queries, const Rows& gallery, nb::handle k, Metric metric, nb::handle precision,
                   ScreenChoice screen, const FilterArgs& filter);
RankArgs rank_args(const Rows& queries, const Rows& gallery, const ArrayArg& positives, const ArrayArg& offsets,
                   Metric metric, ScreenChoice screen, const FilterArgs& filter);
SimilarityArgs similarity_args(const ArrayArg& x, const ArrayArg& y, Metric metric, int64_t* shape);

nb::tuple topk(const ArrayArg& queries, const GalleryArg& gallery, nb::handle k, Metric metric, nb::handle precision,
               ScreenChoice screen, nb::handle mask, nb::handle exclude, nb::handle offsets, int num_threads);
nb::tuple rank(const ArrayArg& queries, const GalleryArg& gallery, nb::handle positives, nb::handle positive_offsets,
               Metric metric, ScreenChoice screen, nb::handle mask, nb::handle exclude, nb::handle offsets,
               int num_threads);
nb::tuple join(const ArrayArg& queries, const GalleryArg& gallery, double threshold, Metric metric, ScreenChoice screen,
               int64_t after, int64_t limit, int num_threads);

}  // namespace pycm::bind
