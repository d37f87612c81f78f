// The C++ library from C++: no framework, an exit code.
#include "unet_native.h"

#include <cstdio>
#include <cstring>

int main() {
  if (unet_abi_version() != UNET_ABI_VERSION) {
    std::puts("library and header disagree about the ABI");
    return 1;
  }
  if (unet_thread_count() < 1) {
    std::puts("no threads");
    return 1;
  }
  std::printf("%s, %d threads\n", unet_build_info(), unet_thread_count());
  return std::strlen(unet_build_info()) == 0;
}
