#define PYCM_LEVEL_AVX2
#include "cpu/temporal_pool_impl.h"
// After it, whose vectors it has.
#include "cpu/temporal_pool_int8.h"

namespace pycm::cpu {
const RecurrentKernels<float> recurrent_f32_avx2 = recurrent_table<VecF>();
const RecurrentKernels<double> recurrent_f64_avx2 = recurrent_table<VecD>();
const Int8Kernels recurrent_int8_avx2 = {product<MaddWord>, round_int8};
}  // namespace pycm::cpu
