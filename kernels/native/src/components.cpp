// Connected components of a stack of masks, slice by slice.
#include "components.h"
#include "threads.h"
#include "unet_native.h"

int32_t unet_connected_components_cpu(const uint8_t *mask, int64_t count, int64_t height, int64_t width,
                                      int32_t connectivity, int32_t *ids) {
  return unet::for_each_task<unet::Runs>(count, [&](int64_t slice, unet::Runs &runs) {
    const int64_t at = slice * height * width;
    unet::label(mask + at, width, static_cast<int32_t>(height), static_cast<int32_t>(width), connectivity == 8, ids + at,
                runs);
  });
}
