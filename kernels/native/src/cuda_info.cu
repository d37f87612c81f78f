#include "unet_native.h"

#include <cuda_runtime_api.h>

#define UNET_TEXT_OF(x) #x
#define UNET_TEXT(x) UNET_TEXT_OF(x)

int32_t unet_cuda_abi_version(void) { return UNET_ABI_VERSION; }

const char *unet_cuda_build_info(void) {
  return "nvcc " UNET_TEXT(__CUDACC_VER_MAJOR__) "." UNET_TEXT(__CUDACC_VER_MINOR__) ", sm " UNET_ARCHITECTURES;
}

int32_t unet_cuda_device_count(int32_t *count) {
  int found = 0;
  const cudaError_t status = cudaGetDeviceCount(&found);
  *count = status == cudaSuccess ? found : 0;
  return static_cast<int32_t>(status);
}

const char *unet_cuda_error_text(int32_t status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
