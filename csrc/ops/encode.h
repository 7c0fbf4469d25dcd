// encode: a gallery's codes and bounds, kept on a CUDA device for many searches. cpu::EncodedGallery is the same for the CPU.
#pragma once

#include "core/array.h"
#include "core/metric.h"
#include "ops/device.h"

namespace pycm {

struct EncodeArgs {
  Rows gallery;  // [M, D], M >= 1
  Metric metric = Metric::kCosine;
};

namespace cuda {
// Fills the workspace of the context, encoded_bytes() that the caller keeps and gives to topk and rank with the same rows
// and metric: fp16 codes in the shuffled order of the screen, each row's scale and error, and the centre of a distance.
void encode(const EncodeArgs& args, const CudaContext& context);
int64_t encoded_bytes(int64_t rows, int64_t dim);
}  // namespace cuda

}  // namespace pycm
