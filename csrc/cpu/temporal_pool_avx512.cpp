#define PYCM_LEVEL_AVX512
#include "cpu/temporal_pool_impl.h"

namespace pycm::cpu {
const RecurrentKernels<float> recurrent_f32_avx512 = recurrent_table<VecF>();
const RecurrentKernels<double> recurrent_f64_avx512 = recurrent_table<VecD>();
}  // namespace pycm::cpu
