#define PYCM_LEVEL_AVX512
#include "cpu/kernels_impl.h"

namespace pycm::cpu {
const Kernels kernels_avx512 = table("avx512");
}
