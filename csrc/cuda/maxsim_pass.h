// One direction of maxsim on a device: row maxima of a part of the items, into scratch, for what follows to add up.
#pragma once

#include <vector>

#include "cuda/launch.h"
#include "cuda/maxsim_tile.h"
#include "ops/maxsim.h"

namespace pycm::cuda {

// The sum runs over the vectors of `rows`, the maximum over those of `items`: queries and gallery, or the reverse.
struct MaxSimPass {
  VectorSets rows, items;
  const void *row_norms = nullptr, *item_norms = nullptr;  // see Norms
  int64_t row_stride = 0, item_stride = 0;                 // in the scores [N, M], of an item of each
  bool mean = false;
};

// By position in the set, 0 for padding; null for metrics without norms. For fp64 inputs double, the norms themselves;
// otherwise float, their inverses (0 for a zero vector), so that a similarity is the product times both.
struct Norms {
  void *queries = nullptr, *gallery = nullptr;
};
Norms take_norms(Workspace& workspace, const MaxSimArgs& args);
void compute_norms(const MaxSimArgs& args, const Norms& norms, void* stream);

// The one or two passes that the direction asks for.
std::vector<MaxSimPass> maxsim_passes(const MaxSimArgs& args, const Norms& norms);

// best[item * pitch + row]: float, without the row's norm; or double, the similarity itself, for fp64 inputs.
struct RowMaxima {
  void* best = nullptr;
  int32_t* arg = nullptr;
  int64_t pitch = 0;
  int64_t part = 0;  // items at a time: a bound on the scratch, whatever N and M are
};
RowMaxima take_row_maxima(Workspace& workspace, const MaxSimPass& pass, bool with_arg);
void compute_row_maxima(const MaxSimPass& pass, const RowMaxima& maxima, int64_t first_item, int64_t items,
                        void* stream);

// scores (+)= the sums of the row maxima of these items.
void sum_row_maxima(const MaxSimPass& pass, const RowMaxima& maxima, int64_t first_item, int64_t items, void* scores,
                    bool add, void* stream);

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

}  // namespace pycm::cuda
