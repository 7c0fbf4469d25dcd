#define PYCM_LEVEL_SCALAR
#include "cpu/kernels_impl.h"

namespace pycm::cpu {
const Kernels kernels_scalar = table("scalar");
}
