#define PYCM_LEVEL_AVX2
#include "cpu/contrastive_impl.h"

namespace pycm::cpu {
const ContrastiveKernels<float> contrastive_f32_avx2 = contrastive_table<VecF>();
const ContrastiveKernels<double> contrastive_f64_avx2 = contrastive_table<VecD>();
}  // namespace pycm::cpu
