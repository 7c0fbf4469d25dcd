#define PYCM_LEVEL_AVX512
#include "cpu/kernels_words.h"

namespace pycm::cpu {
namespace {
bool screen_vnni(const ScreenTile& tile, Screen& screen) { return screen_heights<VnniWord>(tile, screen); }
}  // namespace

void use_vnni(Kernels& kernels) {
  constexpr int kAt = static_cast<int>(ScreenKind::kInt8);
  kernels.level = "avx512_vnni";
  kernels.screen[kAt] = screen_vnni;
  kernels.pack_queries[kAt] = pack_whole;
  kernels.query_words[kAt] = VnniWord::kQueryWords;
}
}  // namespace pycm::cpu
