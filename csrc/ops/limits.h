// limits: what this machine's processor and memory can do, for results to be measured against.
#pragma once

#include <cstdint>

namespace pycm {

struct LimitsArgs {
  int num_threads = 1;
  double seconds = 0.25;      // spent on each of the four
  int64_t bytes = 1ll << 29;  // read for the bandwidth: several times the last cache
};

// Operations per second of all threads together, a multiplication and an addition counting as two; 0 where the processor
// has no such instruction. `read` is in bytes per second.
struct Limits {
  double float32 = 0;   // fused multiply-add
  double bfloat16 = 0;  // dot product of pairs, accumulated in fp32
  double int8 = 0;      // dot product of fours, accumulated in int32
  double read = 0;
};

namespace cpu {
Limits measure_limits(const LimitsArgs& args);
}

}  // namespace pycm
