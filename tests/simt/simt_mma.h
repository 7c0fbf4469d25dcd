// Twins of mma.cuh's products, inside namespace pycm::cuda; what they mean is documented there. Included by mma.cuh.
#pragma once

}  // namespace pycm::cuda

namespace simt {

// `kind` is the number of an Mma enumerator; sums are float or int32_t.
SIMT_API void mma(int kind, void* d, const uint32_t* a, const uint32_t* b);
SIMT_API void mma_f64(double* d, double a, double b);
SIMT_API void wgmma(int kind, int n, void* d, const uint64_t* descriptor_a, const uint32_t* registers_a, uint64_t b,
                    bool accumulate);
SIMT_API void wgmma_fence();
SIMT_API void wgmma_commit();
SIMT_API void wgmma_wait(int groups);

}  // namespace simt

namespace pycm::cuda {

template <Mma M>
__forceinline__ void mma(MmaSum<M> (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(static_cast<int>(M), d, a, b);
}
__forceinline__ void mma_f64(double (&d)[2], double a, double b) { simt::mma_f64(d, a, b); }

__forceinline__ void wgmma_fence() { simt::wgmma_fence(); }
__forceinline__ void wgmma_commit() { simt::wgmma_commit(); }
template <int N>
__forceinline__ void wgmma_wait() {
  simt::wgmma_wait(N);
}
template <typename T, int Count>
__forceinline__ void wgmma_pin(T (&)[Count]) {}

template <Mma M, int N>
__forceinline__ void wgmma(MmaSum<M> (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  simt::wgmma(static_cast<int>(M), N, d, &a, nullptr, b, accumulate);
}
template <Mma M, int N>
__forceinline__ void wgmma(MmaSum<M> (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  simt::wgmma(static_cast<int>(M), N, d, nullptr, a, b, accumulate);
}
