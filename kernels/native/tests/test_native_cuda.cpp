// The CUDA library from C++: it must load, and answer in words, with or without a device.
#include "unet_native.h"

#include <cstdio>
#include <cstring>

int main() {
  if (unet_cuda_abi_version() != UNET_ABI_VERSION) {
    std::puts("library and header disagree about the ABI");
    return 1;
  }
  int32_t devices = -1;
  const int32_t status = unet_cuda_device_count(&devices);
  std::printf("%s: status %d (%s), %d devices\n", unet_cuda_build_info(), status, unet_cuda_error_text(status), devices);
  // nothing to do is done without a driver
  if (unet_connected_components_cuda(nullptr, 0, 5, 5, 4, nullptr, nullptr) != UNET_OK ||
      unet_connected_components_cuda(nullptr, 2, 0, 5, 8, nullptr, nullptr) != UNET_OK) {
    std::puts("an empty stack is no error");
    return 1;
  }
  return devices < 0 || (status != 0 && devices != 0) || std::strlen(unet_cuda_error_text(status)) == 0;
}
