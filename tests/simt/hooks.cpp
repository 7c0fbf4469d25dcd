// The functions that instrumented code calls. The .cu files are compiled with -fsanitize=thread,alignment,bounds; the
// calls the compiler inserts are answered here, not by the sanitizers' libraries. Also: names of threads, lines of
// addresses.
#include <dlfcn.h>

#include <cstdlib>

#include "executor.h"

namespace simt {

// ---- words ----

std::string name_of(const Thread& thread) {
  auto triple = [](uint3 v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  return "block " + triple(thread.block->index) + " thread " + triple(thread.index);
}

std::string where(const void* at) {
  Dl_info info;
  if (at == nullptr || dladdr(const_cast<void*>(at), &info) == 0 || info.dli_fname == nullptr) return "?";
  const uintptr_t pc = reinterpret_cast<uintptr_t>(at) - 1, base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::string result;
  for (uintptr_t address : {pc - base, pc}) {  // position-independent, or not
    char command[1200];
    std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%llx 2>/dev/null", info.dli_fname,
                  static_cast<unsigned long long>(address));
    FILE* pipe = popen(command, "r");
    if (pipe == nullptr) return "?";
    char line[1024];
    while (std::fgets(line, sizeof line, pipe) != nullptr) {
      std::string frame = line;
      frame = frame.substr(0, frame.find_first_of(" \n"));
      if (frame.empty() || frame[0] == '?') continue;
      if (frame.find("simt.h:") != std::string::npos || frame.find("simt_arch.h:") != std::string::npos ||
          frame.find("simt_mma.h:") != std::string::npos)
        continue;  // a wrapper; the caller follows
      if (frame.find("launch.h:") != std::string::npos) continue;
      frame = frame.substr(frame.rfind('/') + 1);
      result += (result.empty() ? "" : " < ") + frame;
    }
    pclose(pipe);
    if (!result.empty()) return result;
  }
  char text[32];
  std::snprintf(text, sizeof text, "%p", at);
  return text;
}

namespace {
int countdown = 1;  // accesses until the next switch

inline void hook(void* pointer, size_t size, uint8_t flags, const void* at) {
  Thread* self = current;
  if (self == nullptr) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(self->stack) < kStackBytes) return;
  if (--countdown <= 0) {
    countdown = 1 + static_cast<int>(random_bits() % 128);
    yield();
  }
  check(address, size, flags, at);
}
inline void hook_aligned(void* pointer, size_t size, uint8_t flags, const void* at) {
  // g++ names an access of 16 bytes so when it is aligned to 8: it may be a struct of two pointers.
  if (current != nullptr) check_alignment(reinterpret_cast<uintptr_t>(pointer), size, flags, at, size < 8 ? size : 8);
  hook(pointer, size, flags, at);
}
}  // namespace

}  // namespace simt

// ---- what -fsanitize=thread calls ----

#define SIMT_HOOK extern "C" SIMT_API void
#define SIMT_HOOKS(n)                                                                                \
  SIMT_HOOK __tsan_read##n(void* p) { simt::hook_aligned(p, n, simt::kRead, SIMT_CALLER); }          \
  SIMT_HOOK __tsan_write##n(void* p) { simt::hook_aligned(p, n, simt::kWrite, SIMT_CALLER); }        \
  SIMT_HOOK __tsan_unaligned_read##n(void* p) { simt::hook(p, n, simt::kRead, SIMT_CALLER); }        \
  SIMT_HOOK __tsan_unaligned_write##n(void* p) { simt::hook(p, n, simt::kWrite, SIMT_CALLER); }      \
  SIMT_HOOK __tsan_volatile_read##n(void* p) { simt::hook_aligned(p, n, simt::kRead, SIMT_CALLER); } \
  SIMT_HOOK __tsan_volatile_write##n(void* p) { simt::hook_aligned(p, n, simt::kWrite, SIMT_CALLER); }
SIMT_HOOKS(1)
SIMT_HOOKS(2) SIMT_HOOKS(4) SIMT_HOOKS(8) SIMT_HOOKS(16) SIMT_HOOK __tsan_read_range(void* p, unsigned long n) {
  simt::hook(p, n, simt::kRead, SIMT_CALLER);
}
SIMT_HOOK __tsan_write_range(void* p, unsigned long n) { simt::hook(p, n, simt::kWrite, SIMT_CALLER); }
// clang calls these for memcpy and its kin; g++ inlines small ones and leaves the others to the C library, unseen.
extern "C" SIMT_API void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
  simt::hook(const_cast<void*>(from), n, simt::kRead, SIMT_CALLER);
  simt::hook(to, n, simt::kWrite, SIMT_CALLER);
  return std::memcpy(to, from, n);
}
extern "C" SIMT_API void* __tsan_memmove(void* to, const void* from, unsigned long n) {
  simt::hook(const_cast<void*>(from), n, simt::kRead, SIMT_CALLER);
  simt::hook(to, n, simt::kWrite, SIMT_CALLER);
  return std::memmove(to, from, n);
}
extern "C" SIMT_API void* __tsan_memset(void* to, int value, unsigned long n) {
  simt::hook(to, n, simt::kWrite, SIMT_CALLER);
  return std::memset(to, value, n);
}
SIMT_HOOK __tsan_init() {}
SIMT_HOOK __tsan_func_entry(void*) {}
SIMT_HOOK __tsan_func_exit() {}
SIMT_HOOK __tsan_vptr_update(void**, void*) {}
SIMT_HOOK __tsan_vptr_read(void**) {}

// ---- what -fsanitize=alignment,bounds calls ----

namespace {
struct Place {  // as the compiler lays it out
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  Place place;
  const void* type;
  uint8_t log_alignment, kind;
};

void report(const Place& place, const std::string& message, const void* at) {
  if (simt::current != nullptr) simt::fail(message, at);
  std::fprintf(stderr, "simt: %s:%u: %s\n", place.file, place.line, message.c_str());
  std::abort();
}
}  // namespace

SIMT_HOOK __ubsan_handle_type_mismatch_v1(TypeMismatch* data, unsigned long pointer) {
  report(data->place,
         "misaligned: an access that needs an address of a multiple of " + std::to_string(1 << data->log_alignment) +
             ", " + simt::place(pointer),
         SIMT_CALLER);
}
SIMT_HOOK __ubsan_handle_out_of_bounds(Place* data, unsigned long index) {
  report(*data, "out of bounds: index " + std::to_string(static_cast<long>(index)) + " of an array of fixed size",
         SIMT_CALLER);
}
