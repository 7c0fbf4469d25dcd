// rank: how many gallery rows score above, and exactly as high as, known positives of each query; no N x M matrix.
#pragma once

#include "core/array.h"
#include "core/metric.h"
#include "ops/device.h"
#include "ops/screen.h"

namespace pycm {

struct RankArgs {
  Rows queries;  // [N, D]
  Rows gallery;  // [M, D]
  // Positives of query i: positives[offsets[i] ... offsets[i + 1]), rows of the gallery.
  const int64_t* positives = nullptr;
  const int64_t* offsets = nullptr;  // [N + 1]
  int64_t num_positives = 0;         // offsets[N], for who cannot read it: it may be in a device's memory
  Metric metric = Metric::kCosine;
  ScreenChoice screen = ScreenChoice::kAuto;
  // As in topk: pairs that count for nothing. A positive has a score all the same.
  Mask mask;
  const int64_t* exclude = nullptr;
  const int64_t* exclude_offsets = nullptr;
  // [P]: rows that score better; other rows that score exactly the same; the positive's own score (float64 for float64
  // inputs, else float32). For a NaN score the counts are 0.
  int64_t* greater = nullptr;
  int64_t* equal = nullptr;
  void* scores = nullptr;
  int num_threads = 1;
  void* encoded = nullptr;  // CUDA: what encode() wrote of these gallery rows and this metric; only read
};

namespace cpu {
class EncodedGallery;
// `encoded`: args.gallery, encoded beforehand; or null.
void rank(const RankArgs& args, const EncodedGallery* encoded = nullptr);
}  // namespace cpu

namespace cuda {
// Screens in fp16 whatever `screen` says. Fewer than 2^31 queries, and gallery rows.
void rank(const RankArgs& args, const CudaContext& context);
// Bytes of scratch in the device's memory that the call takes.
int64_t rank_workspace_bytes(const RankArgs& args);
}  // namespace cuda

}  // namespace pycm
