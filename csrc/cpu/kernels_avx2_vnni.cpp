#define PYCM_LEVEL_AVX2
// A build with -DPYCM_VPDPBUSD='"vpdpbusd"' runs the same lines in their EVEX form on a processor that has only that.
#ifndef PYCM_VPDPBUSD
#define PYCM_VPDPBUSD "%{vex%} vpdpbusd"
#endif
#include "cpu/kernels_words.h"

namespace pycm::cpu {
namespace {
bool screen_vnni(const ScreenTile& tile, Screen& screen) { return screen_heights<VnniWord>(tile, screen); }
}  // namespace

void use_avx_vnni(Kernels& kernels) {
  constexpr int kAt = static_cast<int>(ScreenKind::kInt8);
  kernels.level = "avx2_vnni";
  kernels.screen[kAt] = screen_vnni;
  kernels.pack_queries[kAt] = pack_whole;
  kernels.query_words[kAt] = VnniWord::kQueryWords;
}
}  // namespace pycm::cpu
