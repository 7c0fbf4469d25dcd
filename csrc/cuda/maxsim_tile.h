// The tensor-core kernels of maxsim, and what they are given.
#pragma once

#include "core/sets.h"
#include "cuda/maxsim.cuh"

namespace pycm::cuda {

struct MaxSimTile {
  VectorSets queries, gallery;  // the maximum is over the gallery's vectors
  bool queries_aligned,
      gallery_aligned;         // rows of 16-byte pieces: dim_stride 1, rows and items 16 bytes apart or multiples
  int64_t first_item, items;   // of the gallery
  int items_per_block;         // at most kRunItems
  const float* gallery_scale;  // by position: 1 / norm, or null
  RowMaxOut out;               // of the items from first_item on
};

void maxsim_tile_sm80(const MaxSimTile& args, void* stream);
// Whether the Hopper kernel takes these arguments on this device.
bool maxsim_tile_sm90_fits(const MaxSimTile& args);
void maxsim_tile_sm90(const MaxSimTile& args, void* stream);

}  // namespace pycm::cuda
