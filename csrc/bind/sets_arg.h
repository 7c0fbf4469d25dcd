// Sets of vectors that come from Python: padded with lengths, or ragged with offsets.
#pragma once

#include <optional>
#include <vector>

#include "bind/array_arg.h"
#include "core/sets.h"
#include "ops/maxsim.h"
#include "ops/xattn.h"

namespace pycm::bind {

class SetsArg {
 public:
  // [N, T, D] and, or None, lengths [N]; or [total, D] and offsets [N + 1]. All values that can be read here are checked.
  // Errors speak of `name` and of `item`_lengths or `item`_offsets.
  SetsArg(const char* function, const char* name, const char* item, nb::handle values, nb::handle lengths,
          nb::handle offsets, Memory memory = Memory::kHost);

  VectorSets sets;
  Framework framework() const { return values_.framework(); }
  const ArrayArg& values() const { return values_; }
  const Array& array() const { return values_.array(); }
  Shape shape() const { return values_.shape(); }
  std::vector<const ArrayArg*> arrays() const;

 private:
  ArrayArg values_;
  std::string label_;
  std::optional<ArrayArg> borders_;
};

// Both of one kind, dtype and dimension.
void check_sets(const char* function, const char* a_name, const SetsArg& a, const char* b_name, const SetsArg& b);

// What maxsim, its backward and its top-k share: `args` lacks results and threads.
struct MaxSimCall {
  MaxSimCall(const char* name, nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g,
             nb::handle g_lengths, nb::handle g_offsets, nb::handle metric, nb::handle reduce, nb::handle direction,
             Memory memory = Memory::kHost);

  SetsArg queries, gallery;
  MaxSimArgs args;
};
MaxSimTopKArgs maxsim_topk_args(const MaxSimCall& call, int64_t k, nb::handle precision);

// The same of xattn_score.
struct XAttnCall {
  static constexpr const char* kName = "xattn_score";
  XAttnCall(nb::handle i, nb::handle i_lengths, nb::handle i_offsets, nb::handle c, nb::handle c_lengths,
            nb::handle c_offsets, nb::handle direction, nb::handle feature_norm, nb::handle aggregation,
            double lambda_softmax, double lambda_lse, double eps, Memory memory = Memory::kHost);

  SetsArg images, captions;
  XAttnArgs args;
};

}  // namespace pycm::bind
