// The C++ library from C++: no framework, an exit code.
#include "unet_native.h"

#include <cmath>
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
  const int32_t ids[4] = {1, 0, 0, 7};
  float d1[4], d2[4];
  if (unet_two_nearest_cells_cpu(ids, 1, 1, 4, INFINITY, d1, d2) != UNET_OK || d1[1] != 1 || d2[1] != 2 || d2[0] != 3) {
    std::puts("two_nearest_cells is wrong");
    return 1;
  }
  std::printf("%s, %d threads\n", unet_build_info(), unet_thread_count());
  return std::strlen(unet_build_info()) == 0;
}
