// Chooses the instruction set: once, or again when a test asks.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/check.h"
#include "cpu/kernels.h"

namespace pycm::cpu {
namespace {

#if defined(__x86_64__)
// A level that has all of another but for the entries that `use` replaces.
template <void (*use)(Kernels&)>
const Kernels* extended(const Kernels& base) {
  static const Kernels table = [&base] {
    Kernels kernels = base;
    use(kernels);
    return kernels;
  }();
  return &table;
}
const Kernels* with_vnni() { return extended<use_vnni>(kernels_avx512); }
#endif

const Kernels* find(const char* level) {
  if (std::strcmp(level, "scalar") == 0) return &kernels_scalar;
#if defined(__x86_64__)
  if (std::strcmp(level, "avx2") == 0) return &kernels_avx2;
  if (std::strcmp(level, "avx512") == 0) return &kernels_avx512;
  if (std::strcmp(level, "avx2_vnni") == 0) return extended<use_avx_vnni>(kernels_avx2);
  if (std::strcmp(level, "avx512_vnni") == 0) return with_vnni();
  if (std::strcmp(level, "avx512_bf16") == 0) return extended<use_bf16>(*with_vnni());
#endif
  return nullptr;
}

const Kernels* best() {
  const Kernels* found = &kernels_scalar;
  for (const char* level : kSimdLevels)
    if (simd_level_available(level)) found = find(level);
  return found;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

bool simd_level_available(const char* level) {
  if (std::strcmp(level, "scalar") == 0) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(level, "avx2") == 0) return avx2;
  if (std::strcmp(level, "avx2_vnni") == 0) return avx2 && __builtin_cpu_supports("avxvnni");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(level, "avx512") == 0) return avx512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(level, "avx512_vnni") == 0) return vnni;
  if (std::strcmp(level, "avx512_bf16") == 0) return vnni && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

void set_simd_level(const char* level) {
  check(find(level) != nullptr,
        "PYCM_SIMD_LEVEL: expected scalar, avx2, avx2_vnni, avx512, avx512_vnni or avx512_bf16, got '", level, "'");
  check(simd_level_available(level), "PYCM_SIMD_LEVEL: this processor has no ", level);
  current.store(find(level), std::memory_order_release);
}

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* level = std::getenv("PYCM_SIMD_LEVEL");
    if (level != nullptr && *level != '\0') {
      set_simd_level(level);
    } else {
      current.store(best(), std::memory_order_release);
    }
    table = current.load(std::memory_order_acquire);
  }
  return *table;
}

}  // namespace pycm::cpu
