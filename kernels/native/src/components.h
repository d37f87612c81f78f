// Connected components by union-find, in steps that C++ and CUDA share. A node is a pixel on a GPU and a run of a row on a
// CPU; its parent is a node of its component at or before it, so the root that remains is the component's first in raster
// order. The steps may run in any order and all at once: a parent only ever falls, by an atomic minimum.
#ifndef UNET_COMPONENTS_H
#define UNET_COMPONENTS_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
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

// a stretch of a row that is inside
struct Run {
  int32_t begin, end; // columns
};

struct Runs {
  std::vector<Run> runs;
  std::vector<int32_t> parents, first_of_row;
};

// the first column from x on that is 0 (or 1); `width` if none is
inline int32_t next(const uint8_t *row, int32_t x, int32_t width, int value) {
  if (x == width) return width; // a row of no columns lies nowhere
  const void *there = std::memchr(row + x, value, static_cast<size_t>(width - x));
  return there ? static_cast<int32_t>(static_cast<const uint8_t *>(there) - row) : width;
}

// One image on one thread: ids 1, 2 .. in the order of the components' first pixels, 0 outside; returns their number.
// The nodes are runs of a row instead of pixels, united by the same steps; `pitch` is the distance of mask's rows.
inline int32_t label(const uint8_t *mask, int64_t pitch, int32_t height, int32_t width, bool corners, int32_t *ids,
                     Runs &s) {
  s.runs.clear();
  s.parents.clear();
  s.first_of_row.assign(static_cast<size_t>(height) + 1, 0);
  const int32_t reach = corners ? 1 : 0;
  for (int32_t y = 0; y < height; ++y) {
    const uint8_t *row = mask + y * pitch;
    int32_t above = y ? s.first_of_row[y - 1] : 0;
    const int32_t above_end = s.first_of_row[y];
    for (int32_t x = 0;;) {
      const int32_t begin = next(row, x, width, 1);
      if (begin == width) break;
      x = next(row, begin, width, 0);
      const int32_t node = static_cast<int32_t>(s.runs.size());
      s.runs.push_back({begin, x});
      s.parents.push_back(node);
      // runs of the row above come from left to right as well: those that end before this one touch none to come
      while (above < above_end && s.runs[above].end + reach <= begin) ++above;
      for (int32_t other = above; other < above_end && s.runs[other].begin < x + reach; ++other)
        unite<PlainMemory>(s.parents.data(), node, other);
    }
    s.first_of_row[y + 1] = static_cast<int32_t>(s.runs.size());
  }
  // A parent lies before its run, so it has its id already when the run's turn comes; an id takes the parent's place.
  int32_t found = 0;
  for (int32_t y = 0; y < height; ++y) {
    int32_t *row = ids + static_cast<int64_t>(y) * width;
    std::fill(row, row + width, 0);
    for (int32_t node = s.first_of_row[y]; node < s.first_of_row[y + 1]; ++node) {
      const int32_t parent = s.parents[node];
      s.parents[node] = parent == node ? ++found : s.parents[parent];
      std::fill(row + s.runs[node].begin, row + s.runs[node].end, s.parents[node]);
    }
  }
  return found;
}

} // namespace unet

#endif
