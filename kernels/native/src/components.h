// Connected components by union-find, as steps of one pixel each, for C++ and CUDA from the same source. A pixel's parent
// is a pixel of its component at or before it, so the root that remains is the component's first pixel in raster order.
// The steps of `merge` may run in any order and all at once: a parent only ever falls, by an atomic minimum.
#ifndef UNET_COMPONENTS_H
#define UNET_COMPONENTS_H

#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define UNET_EACH __host__ __device__
#else
#define UNET_EACH
#endif

namespace unet {

constexpr int32_t kNoParent = -1;

// `Memory` says how a parent is read and how it is lowered (returning what was there): plain, or atomic.
struct PlainMemory {
  static UNET_EACH int32_t read(const int32_t *parent) { return *parent; }
  static UNET_EACH int32_t lower(int32_t *parent, int32_t to) {
    const int32_t before = *parent;
    if (to < before) *parent = to;
    return before;
  }
};

template <class Memory> UNET_EACH int32_t root_of(const int32_t *parents, int32_t pixel) {
  for (int32_t parent = Memory::read(parents + pixel); parent != pixel; parent = Memory::read(parents + pixel))
    pixel = parent;
  return pixel;
}

template <class Memory> UNET_EACH void unite(int32_t *parents, int32_t a, int32_t b) {
  for (;;) {
    a = root_of<Memory>(parents, a);
    b = root_of<Memory>(parents, b);
    if (a == b) return;
    if (a < b) {
      const int32_t swapped = a;
      a = b;
      b = swapped;
    }
    const int32_t before = Memory::lower(parents + a, b);
    if (before == a) return; // a was still a root; otherwise somebody lowered it first, and that one joins b too
    a = before;
  }
}

UNET_EACH inline void begin(const uint8_t *mask, int32_t *parents, int32_t pixel) {
  parents[pixel] = mask[pixel] ? pixel : kNoParent;
}

// joins a pixel with the neighbours before it, where they are not joined by one another's steps
template <class Memory>
UNET_EACH void merge(const uint8_t *mask, int32_t *parents, int32_t pixel, int32_t width, bool corners) {
  if (!mask[pixel]) return;
  const int32_t x = pixel % width;
  const bool above = pixel >= width;
  const bool n = above && mask[pixel - width], w = x > 0 && mask[pixel - 1];
  const bool nw = above && x > 0 && mask[pixel - width - 1];
  if (!corners) {
    if (w) unite<Memory>(parents, pixel, pixel - 1);
    if (n && !(w && nw)) unite<Memory>(parents, pixel, pixel - width);
    return;
  }
  if (n) {
    unite<Memory>(parents, pixel, pixel - width); // which is a neighbour of w, nw and ne
    return;
  }
  if (w)
    unite<Memory>(parents, pixel, pixel - 1);
  else if (nw)
    unite<Memory>(parents, pixel, pixel - width - 1);
  if (above && x + 1 < width && mask[pixel - width + 1]) unite<Memory>(parents, pixel, pixel - width + 1);
}

// One image on one thread: ids 1, 2 .. in the order of the components' first pixels, 0 outside; returns their number.
inline int32_t label(const uint8_t *mask, int32_t height, int32_t width, bool corners, int32_t *ids) {
  const int32_t pixels = height * width;
  for (int32_t p = 0; p < pixels; ++p) begin(mask, ids, p);
  for (int32_t p = 0; p < pixels; ++p) merge<PlainMemory>(mask, ids, p, width, corners);
  // A parent lies before its pixel, so it has its id already when the pixel's turn comes.
  int32_t found = 0;
  for (int32_t p = 0; p < pixels; ++p) {
    if (ids[p] == kNoParent)
      ids[p] = 0;
    else
      ids[p] = ids[p] == p ? ++found : ids[ids[p]];
  }
  return found;
}

} // namespace unet

#endif
