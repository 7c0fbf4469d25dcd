#include "cpu/temporal_pool_impl.h"

namespace pycm::cpu {
const RecurrentKernels<float> recurrent_f32_scalar = recurrent_table<VecF>();
const RecurrentKernels<double> recurrent_f64_scalar = recurrent_table<VecD>();
}  // namespace pycm::cpu
