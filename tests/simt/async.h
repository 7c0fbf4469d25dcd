// What is under way, for those who start it.
#pragma once

#include "executor.h"

namespace simt {

struct Async {  // a copy under way
  Thread* owner;
  int group;
  const void* at;
  std::function<void()> perform;  // moves the bytes; called once, at any time
  std::function<void()> finish;   // when the program knows: the bytes are its own again
  bool performed = false, finished = false;
};

inline uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// By the current thread.
std::shared_ptr<Async> start(std::function<void()> perform, std::function<void()> finish, int group, const void* at);
void finish(Async& copy);
// An asynchronous write to shared memory, announced to the barrier of the same block: in flight until it is performed.
void start_write(char* to, size_t bytes, uint64_t* barrier, std::function<void(char*)> write, const char* what,
                 const void* at);
// Fails where the bytes are not all in shared memory.
Region& shared_region(const void* pointer, size_t bytes, size_t alignment, const char* what, const void* at);
// Bytes that copies write, or read.
void mark(uint8_t* counts, uintptr_t offset, size_t bytes, int change);

}  // namespace simt
