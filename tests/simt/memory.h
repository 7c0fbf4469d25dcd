// What kernels on the host executor may touch: the arrays of a call, registered for as long as the object lives.
//
//   simt::Memory memory;
//   memory.add(queries, bytes);             // read, or read and written
//   memory.add(scores_out, bytes, false);   // reading a byte that no kernel has written is an error
//   cuda::topk(args, context);
//
// Register everything before the first launch. Overlapping arrays are one allocation.
#pragma once

#include <cstdint>

namespace simt {

class __attribute__((visibility("default"))) Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void add(const void* data, int64_t bytes, bool initialised = true);

 private:
  int64_t id_;
};

}  // namespace simt
