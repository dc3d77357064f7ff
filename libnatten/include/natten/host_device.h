#pragma once

/// Marks functions that run on the host and, where nvcc compiles them, on a CUDA device as well.
#if defined(__CUDACC__)
#define NATTEN_HOST_DEVICE __host__ __device__
#else
#define NATTEN_HOST_DEVICE
#endif
