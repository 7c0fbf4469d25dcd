// Marks what the CPU and the kernels share.
#pragma once

#if defined(__CUDACC__)
#define PYCM_HOST_DEVICE __host__ __device__
#else
#define PYCM_HOST_DEVICE
#endif
