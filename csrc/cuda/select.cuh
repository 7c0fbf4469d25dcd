// Selection among a query's candidates by one block: the k-th largest key by radix, and a bitonic sort.
//
// Bytes: kth_largest reads n keys four times; sort moves 16 n bytes log2(n)^2 / 2 times, in shared memory for n <= kSortShared,
// else in global memory (the second-level cache). Any n; kSelectThreads threads.
#pragma once

#include "cuda/screen.cuh"

namespace pycm::cuda {

constexpr int kSelectThreads = 256, kSortShared = 2048, kAhead = 4;

// The k-th largest of the keys, which have 32 bits; 1 <= k <= count. All threads of the block call it and get it.
__device__ inline uint32_t kth_largest(const Candidate* candidates, int64_t count, int64_t k) {
  PYCM_SHARED(histogram, uint32_t[256]);
  PYCM_SHARED(chosen, uint32_t[2]);  // the digit, and how many are above it
  uint32_t prefix = 0;
  int64_t wanted = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += kSelectThreads) histogram[i] = 0;
    __syncthreads();
    for (int64_t begin = threadIdx.x; begin < count; begin += kAhead * kSelectThreads) {
      uint32_t keys[kAhead];  // in flight together: one block waits for each
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (begin + i * kSelectThreads < count)
          keys[i] = static_cast<uint32_t>(candidates[begin + i * kSelectThreads].key);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (begin + i * kSelectThreads >= count || (shift != 24 && keys[i] >> (shift + 8) != prefix)) continue;
        atomicAdd(&histogram[keys[i] >> shift & 0xff], 1u);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      // Lane l looks at 8 digits from the top.
      const int top = 255 - static_cast<int>(threadIdx.x) * 8;
      uint32_t mine = 0;
      for (int i = 0; i < 8; ++i) mine += histogram[top - i];
      uint32_t before = mine;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, before, offset);
        if (static_cast<int>(threadIdx.x) >= offset) before += other;
      }
      before -= mine;
      if (before < wanted && wanted <= int64_t{before} + mine) {
        int digit = top;
        while (int64_t{before} + histogram[digit] < wanted) before += histogram[digit--];
        chosen[0] = static_cast<uint32_t>(digit);
        chosen[1] = before;
      }
    }
    __syncthreads();
    prefix = prefix << 8 | chosen[0];
    wanted -= chosen[1];
    __syncthreads();
  }
  return prefix;
}

// Verified candidates: best first, ties by lowest index.
__device__ __forceinline__ bool better(const Candidate& a, const Candidate& b) {
  return a.key > b.key || (a.key == b.key && a.index < b.index);
}

__device__ inline void bitonic_sort(Candidate* items, int64_t size) {  // a power of two
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t step = run / 2; step > 0; step /= 2) {
      for (int64_t i = threadIdx.x; i < size / 2; i += kSelectThreads) {
        const int64_t low = i / step * 2 * step + i % step, high = low + step;
        const Candidate a = items[low], b = items[high];
        if ((low & run) == 0 ? better(b, a) : better(a, b)) {
          items[low] = b;
          items[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Sorts candidates[0, count), with room for the next power of two. `shared` holds kSortShared.
__device__ inline void sort_candidates(Candidate* candidates, int64_t count, Candidate* shared) {
  int64_t size = 2;
  while (size < count) size *= 2;
  Candidate* items = size <= kSortShared ? shared : candidates;
  for (int64_t i = threadIdx.x; i < size; i += kSelectThreads) {
    if (i >= count) items[i] = {0, 0xffffffffu, 0};  // worse than all
    else if (items != candidates) items[i] = candidates[i];
  }
  __syncthreads();
  bitonic_sort(items, size);
  if (items != candidates)
    for (int64_t i = threadIdx.x; i < count; i += kSelectThreads) candidates[i] = items[i];
  __syncthreads();
}

}  // namespace pycm::cuda
