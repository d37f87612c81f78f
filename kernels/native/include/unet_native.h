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
#define UNET_ABI_VERSION 5

// what a function returns
#define UNET_OK 0
#define UNET_OUT_OF_MEMORY 1

// what a mismatch that no warping removes is; 0 is none
#define UNET_SPLIT 1
#define UNET_MERGE 2
#define UNET_HOLE_ADDITION 3
#define UNET_HOLE_DELETION 4
#define UNET_OBJECT_ADDITION 5
#define UNET_OBJECT_DELETION 6
#define UNET_KINDS 7

// what an image to be warped is made of
#define UNET_UINT8 0
#define UNET_UINT16 1
#define UNET_FLOAT32 2

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
// d1 + d2 of the same where Eq. 2's border term applies, that is, where the sum is at most limit and the pixel is
// background (gap: or a cell's with a 4-neighbour of another cell) or, with `everywhere`, any that is not ignored;
// INFINITY elsewhere.
UNET_API int32_t unet_border_sum_cpu(const int32_t *instances, int64_t count, int64_t height, int64_t width, float limit,
                                     int32_t everywhere, int32_t gap, float *sum);

// A warp, as unet_kernels/reference/warp.py specifies it: what both directions read. Strides are counted in elements.
typedef struct {
  const void *image; // [count, channels, height, width] of a pixel kind above
  const void *labels; // [count, height, width] integers of label_bytes each, or NULL
  const float *displacement; // [count, 2, grid_height, grid_width], contiguous
  const float *matrix; // [count, 2, 3], contiguous, or NULL
  const float *table; // [entries] (table_stride 0) or [count, entries] of grey values, or NULL
  int64_t count, channels, height, width, grid_height, grid_width, out_height, out_width;
  int64_t image_stride[4], label_stride[3], table_stride, entries;
  int32_t pixel, label_bytes, order; // order 1 or 3
} unet_warp;
// out [count, channels, out_height, out_width] of the pixel kind and, where there are labels, warped [count, out_height,
// out_width] of theirs, contiguous. The bits are the specification's, whatever the processor and the number of threads.
UNET_API int32_t unet_elastic_warp_cpu(const unet_warp *warp, void *out, void *warped);
// The derivative, of a float32 image: of dout [count, channels, out_height, out_width] the gradients of the image, dimage
// [count, channels, height, width], of u at every output pixel, du [count, 2, out_height, out_width], and of the matrix,
// dmatrix [count, 2, 3]; all contiguous, each NULL where nobody wants it. Sums go in one order, whatever the threads.
UNET_API int32_t unet_elastic_warp_backward_cpu(const unet_warp *warp, const float *dout, float *dimage, float *du,
                                                double *dmatrix);
// The processor whose instructions the warp uses here: "baseline", "avx2" or "avx512"; UNET_PROCESSOR in the environment
// may ask for less than there is.
UNET_API const char *unet_processor(void);

// Stacks of slices, [count, height, width], contiguous, height * width below 2^31; masks are bytes of 0 and 1. OpenMP
// shares slices, and thresholds where there are some, among its threads.

// Components of each slice's mask, numbered from 1 in the order of their first pixels; connectivity 4 or 8.
UNET_API int32_t unet_connected_components_cpu(const uint8_t *mask, int64_t count, int64_t height, int64_t width,
                                               int32_t connectivity, int32_t *ids);
// Warps each slice of truth towards prediction > threshold, within the counted pixels, and says what remains:
// counts [threshold_count, count, UNET_KINDS], and, unless it is NULL, kinds [threshold_count, count, height, width].
UNET_API int32_t unet_homotopic_warp_cpu(const float *prediction, const uint8_t *truth, const uint8_t *counted,
                                         int64_t count, int64_t height, int64_t width, const double *thresholds,
                                         int64_t threshold_count, int64_t radius, int64_t *counts, uint8_t *kinds);
// The components of each slice's mask, 4-connected, grown over the rest until they meet at dams of one pixel (0).
UNET_API int32_t unet_watershed_cells_cpu(const uint8_t *mask, int64_t count, int64_t height, int64_t width,
                                          int32_t *basins);
// Overlap of the truth's cells (ids from 1; negative is ignored) with the segments of prediction > threshold, of each
// threshold and slice: squares [.., 4] pixels, sums of squares of truth, segments, both; logs [.., 3] sums of n log n.
UNET_API int32_t unet_rand_sums_cpu(const float *prediction, const int32_t *truth, int64_t count, int64_t height,
                                    int64_t width, const double *thresholds, int64_t threshold_count, int32_t thinned,
                                    int64_t *squares, double *logs);

// libunet_native_cuda
UNET_API int32_t unet_cuda_abi_version(void);
UNET_API const char *unet_cuda_build_info(void);
// writes the number of devices; returns a cudaError_t, 0 for success
UNET_API int32_t unet_cuda_device_count(int32_t *count);
UNET_API const char *unet_cuda_error_text(int32_t status);
// As unet_connected_components_cpu, on the device and the stream of these pointers, but every pixel gets the place in its
// slice of its component's first pixel, -1 outside; returns a cudaError_t of the launches.
UNET_API int32_t unet_connected_components_cuda(const uint8_t *mask, int64_t count, int64_t height, int64_t width,
                                                int32_t connectivity, int32_t *roots, void *stream);

#ifdef __cplusplus
}
#endif

#endif
