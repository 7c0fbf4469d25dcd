// topk: the k best matches of every query, exact (screen and verify) or fast (screen alone), without the N x M matrix.
#pragma once

#include "core/array.h"
#include "core/metric.h"
#include "ops/device.h"
#include "ops/screen.h"

namespace pycm {

enum class Precision { kExact, kFast };

struct TopKArgs {
  Rows queries;   // [N, D]
  Rows gallery;   // [M, D], M >= 1
  int64_t k = 1;  // in [1, M]
  Metric metric = Metric::kCosine;
  Precision precision = Precision::kExact;
  ScreenChoice screen = ScreenChoice::kAuto;
  Mask mask;  // true where a pair may match; all pairs when empty
  // Gallery rows that query i must not match: exclude[exclude_offsets[i] ... exclude_offsets[i + 1]); null for none.
  const int64_t* exclude = nullptr;
  const int64_t* exclude_offsets = nullptr;
  void* scores = nullptr;      // [N, k] contiguous; float64 for float64 inputs, else float32
  int64_t* indices = nullptr;  // [N, k] contiguous
  int num_threads = 1;
  void* encoded = nullptr;  // CUDA: what encode() wrote of these gallery rows and this metric; only read
};

namespace cpu {
class EncodedGallery;
// `encoded`: args.gallery, encoded beforehand; or null.
void topk(const TopKArgs& args, const EncodedGallery* encoded = nullptr);
// Bytes of scratch that topk takes beyond its inputs and outputs.
int64_t topk_workspace_bytes(int64_t queries, int64_t gallery, int64_t dim, int64_t k, int num_threads);
}  // namespace cpu

namespace cuda {
// Screens in fp16 whatever `screen` says. Fewer than 2^31 queries, and gallery rows.
void topk(const TopKArgs& args, const CudaContext& context);
// Bytes of scratch in the device's memory that the call takes.
int64_t topk_workspace_bytes(const TopKArgs& args);
}  // namespace cuda

}  // namespace pycm
