#define PYCM_LEVEL_AVX512
#include "cpu/kernels_maxima.h"

namespace pycm::cpu {
namespace {
bool screen_native(const ScreenTile& tile, Screen& screen) { return screen_heights<NativeBf16Word>(tile, screen); }
}  // namespace

void use_bf16(Kernels& kernels) {
  constexpr int kAt = static_cast<int>(ScreenKind::kBFloat16);
  kernels.level = "avx512_bf16";
  kernels.quick[kAt] = true;
  kernels.screen[kAt] = screen_native;
  kernels.pack_queries[kAt] = pack_whole;
  kernels.maxima_bf16 = maxima_bf16;
  kernels.round_bf16 = round_bf16;
  kernels.square_bf16 = square_bf16;
  kernels.query_words[kAt] = NativeBf16Word::kQueryWords;
}
}  // namespace pycm::cpu
