// Arguments that topk, rank and join share.
#pragma once

#include <optional>

#include "bind/array_arg.h"
#include "core/metric.h"
#include "ops/screen.h"

namespace pycm::cpu {
class EncodedGallery;
}

namespace pycm::bind {

// Which pairs a caller rules out: booleans [M] or [N, M], and compressed rows of int64.
class FilterArgs {
 public:
  FilterArgs(const char* function, nb::handle mask, nb::handle exclude, nb::handle offsets, int64_t queries,
             int64_t gallery);

  Mask mask;
  const int64_t* exclude = nullptr;
  const int64_t* exclude_offsets = nullptr;

 private:
  std::optional<ArrayArg> mask_arg_, exclude_arg_, offsets_arg_;
};

// Compressed rows (values, offsets [rows + 1]): contiguous, offsets rising from 0 to the number of values, every value in
// [lowest, limit).
void check_compressed(const char* function, const char* name, const ArrayArg& values, const ArrayArg& offsets,
                      int64_t rows, int64_t lowest, int64_t limit);

// queries [N, D] against gallery rows [M, D] of one dtype.
void check_pair(const char* function, const ArrayArg& queries, const ArrayArg& gallery);

// The gallery of a call: an array, or rows encoded beforehand.
struct GalleryArg {
  Rows rows;
  const cpu::EncodedGallery* encoded = nullptr;
};

nb::tuple topk(const ArrayArg& queries, const GalleryArg& gallery, nb::handle k, Metric metric, nb::handle precision,
               ScreenChoice screen, nb::handle mask, nb::handle exclude, nb::handle offsets, int num_threads);
nb::tuple rank(const ArrayArg& queries, const GalleryArg& gallery, nb::handle positives, nb::handle positive_offsets,
               Metric metric, ScreenChoice screen, nb::handle mask, nb::handle exclude, nb::handle offsets,
               int num_threads);
nb::tuple join(const ArrayArg& queries, const GalleryArg& gallery, double threshold, Metric metric, ScreenChoice screen,
               int64_t after, int64_t limit, int num_threads);

}  // namespace pycm::bind
