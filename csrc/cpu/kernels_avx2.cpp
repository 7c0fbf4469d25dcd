#define PYCM_LEVEL_AVX2
#include "cpu/kernels_impl.h"

namespace pycm::cpu {
const Kernels kernels_avx2 = table("avx2");
}
