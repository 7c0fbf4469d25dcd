#include "cpu/contrastive_impl.h"

namespace pycm::cpu {
const ContrastiveKernels<float> contrastive_f32_scalar = contrastive_table<VecF>();
const ContrastiveKernels<double> contrastive_f64_scalar = contrastive_table<VecD>();
}  // namespace pycm::cpu
