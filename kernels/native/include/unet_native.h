// The C ABI of the native libraries: plain pointers, 64-bit sizes, a returned status. It knows neither Python nor
// torch, so one build serves every version of both. Nothing here allocates for the caller, throws, or keeps state.
#ifndef UNET_NATIVE_H
#define UNET_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define UNET_API __attribute__((visibility("default")))
#else
#define UNET_API __declspec(dllexport)
#endif

// Raised by one with every change to a signature; Python refuses a library with another number.
#define UNET_ABI_VERSION 2

// what a function returns
#define UNET_OK 0
#define UNET_OUT_OF_MEMORY 1

#ifdef __cplusplus
extern "C" {
#endif

// libunet_native: C++ and OpenMP
UNET_API int32_t unet_abi_version(void);
UNET_API const char *unet_build_info(void);
// threads that a parallel loop would use now; 1 without OpenMP
UNET_API int32_t unet_thread_count(void);
// Distances to the nearest and second-nearest distinct cell: instances [count, height, width] (0 background, negative
// no cell either) to d1, d2 of the same shape, all contiguous. A cell further off than max_radius (INFINITY: none is) counts
// as absent; a missing cell is INFINITY.
UNET_API int32_t unet_two_nearest_cells_cpu(const int32_t *instances, int64_t count, int64_t height, int64_t width,
                                            double max_radius, float *d1, float *d2);

// libunet_native_cuda
UNET_API int32_t unet_cuda_abi_version(void);
UNET_API const char *unet_cuda_build_info(void);
// writes the number of devices; returns a cudaError_t, 0 for success
UNET_API int32_t unet_cuda_device_count(int32_t *count);
UNET_API const char *unet_cuda_error_text(int32_t status);

#ifdef __cplusplus
}
#endif

#endif
