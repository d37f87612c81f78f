// The steps of components.h, a thread for each pixel of a stack. Roots only: the caller numbers them.
#include "components.h"
#include "unet_native.h"

#include <cuda_runtime_api.h>

namespace {

struct AtomicMemory {
  static __device__ int32_t read(const int32_t *parent) { return *static_cast<const volatile int32_t *>(parent); }
  static __device__ int32_t lower(int32_t *parent, int32_t to) { return atomicMin(parent, to); }
};

constexpr int kThreads = 256;

struct Stack {
  const uint8_t *mask;
  int32_t *parents;
  int64_t pixels; // of the stack
  int32_t slice, width;
  bool corners;
};

// 64-bit index of this thread's pixel in the stack; `pixels` where there is none left
__device__ int64_t here() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

__global__ void begin_all(Stack s) {
  const int64_t at = here();
  if (at >= s.pixels) return;
  const int64_t first = at / s.slice * s.slice;
  unet::begin(s.mask + first, s.parents + first, static_cast<int32_t>(at - first));
}

__global__ void merge_all(Stack s) {
  const int64_t at = here();
  if (at >= s.pixels) return;
  const int64_t first = at / s.slice * s.slice;
  unet::merge<AtomicMemory>(s.mask + first, s.parents + first, static_cast<int32_t>(at - first), s.width, s.corners);
}

// A root stays what it is, and any other pixel may read its parents before or after they were shortened.
__global__ void flatten_all(Stack s) {
  const int64_t at = here();
  if (at >= s.pixels) return;
  const int64_t first = at / s.slice * s.slice;
  int32_t *parents = s.parents + first;
  const int32_t pixel = static_cast<int32_t>(at - first);
  if (parents[pixel] != unet::kNoParent) parents[pixel] = unet::root_of<AtomicMemory>(parents, pixel);
}

} // namespace

int32_t unet_connected_components_cuda(const uint8_t *mask, int64_t count, int64_t height, int64_t width,
                                       int32_t connectivity, int32_t *roots, void *stream) {
  const Stack s = {mask, roots, count * height * width, static_cast<int32_t>(height * width),
                   static_cast<int32_t>(width), connectivity == 8};
  if (s.pixels == 0) return UNET_OK;
  const unsigned blocks = static_cast<unsigned>((s.pixels + kThreads - 1) / kThreads);
  const auto queue = static_cast<cudaStream_t>(stream);
  begin_all<<<blocks, kThreads, 0, queue>>>(s);
  merge_all<<<blocks, kThreads, 0, queue>>>(s);
  flatten_all<<<blocks, kThreads, 0, queue>>>(s);
  return static_cast<int32_t>(cudaGetLastError());
}
