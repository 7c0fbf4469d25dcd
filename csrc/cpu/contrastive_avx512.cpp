#define PYCM_LEVEL_AVX512
#include "cpu/contrastive_impl.h"

namespace pycm::cpu {
const ContrastiveKernels<float> contrastive_f32_avx512 = contrastive_table<VecF>();
const ContrastiveKernels<double> contrastive_f64_avx512 = contrastive_table<VecD>();
}  // namespace pycm::cpu
