// The truth of a slice, warped towards a prediction by flips of simple points, and what the mismatches that remain are:
// the specification, with its sources, is unet_kernels/reference/topology.py.
#include "components.h"
#include "threads.h"
#include "unet_native.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

namespace {

// the neighbours of a pixel in a circle: bit i of a ring is the neighbour at kRow[i], kColumn[i]; odd ones share an edge
constexpr int kRow[8] = {-1, -1, -1, 0, 1, 1, 1, 0};
constexpr int kColumn[8] = {-1, 0, 1, 1, 1, 0, -1, -1};

// Round the circle each stretch of cell (4-connected) or background (8-connected) is a component of the ring. A corner
// alone is no 4-neighbour of the middle: a stretch of cell counts only if it has an edge; two stretches of background
// that are parted by a single corner of cell are neighbours of each other, across it.
constexpr int stretches(int ring, bool cell) {
  int found = 0;
  for (int start = 0; start < 8; ++start) {
    const auto in = [&](int i) { return ((ring >> (i & 7)) & 1) == (cell ? 1 : 0); };
    if (!in(start) || in(start + 7)) continue; // each stretch once, from its start
    bool edge = false;
    int i = start;
    for (; i < start + 8 && in(i); ++i) edge = edge || (i & 1);
    if (cell) {
      found += edge;
    } else {
      // the stretch after a lone corner of cell is the same component: count it there
      const bool lone_corner = !(i & 1) && !in(i) && in(i + 1);
      found += !lone_corner;
    }
  }
  return found;
}

constexpr std::array<bool, 256> simple_rings() {
  std::array<bool, 256> simple{};
  for (int ring = 0; ring < 256; ++ring) simple[ring] = stretches(ring, true) == 1 && stretches(ring, false) == 1;
  return simple;
}
constexpr std::array<bool, 256> kSimple = simple_rings();

struct Scratch {
  std::vector<uint8_t> warped, differs, stale;
  std::vector<uint64_t> order, spare;
  std::vector<int64_t> mismatches, todo;
  std::vector<int32_t> ids;
  unet::Runs components;
};

struct Slice {
  const float *prediction;
  const uint8_t *truth, *counted;
  int64_t height, width, pitch; // pitch: of the padded image, one pixel of background all round
  double threshold;

  int64_t padded(int64_t y, int64_t x) const { return (y + 1) * pitch + x + 1; }
};

int ring_at(const uint8_t *image, int64_t at, int64_t pitch) {
  int ring = 0;
  for (int i = 0; i < 8; ++i) ring |= (image[at + kRow[i] * pitch + kColumn[i]] ? 1 : 0) << i;
  return ring;
}

// Ascending, by digits of 11 bits; a digit that all have alike is passed over.
void sort(std::vector<uint64_t> &keys, std::vector<uint64_t> &other) {
  if (keys.size() < 1024) {
    std::sort(keys.begin(), keys.end());
    return;
  }
  other.resize(keys.size());
  for (int shift = 0; shift < 64; shift += 11) {
    std::array<size_t, 2048> place{};
    for (const uint64_t key : keys) ++place[(key >> shift) & 2047];
    if (place[(keys[0] >> shift) & 2047] == keys.size()) continue;
    size_t before = 0;
    for (size_t &each : place) {
      const size_t count = each;
      each = before;
      before += count;
    }
    for (const uint64_t key : keys) other[place[(key >> shift) & 2047]++] = key;
    keys.swap(other);
  }
}

// A float is above `threshold`, compared in double, where it is above the greatest float that is not.
float as_float(double threshold) {
  const float nearest = static_cast<float>(threshold);
  return static_cast<double>(nearest) > threshold ? std::nextafter(nearest, -INFINITY) : nearest;
}

// Leaves the warped truth in s.warped and what still differs in s.mismatches.
void warp(const Slice &slice, Scratch &s) {
  const size_t padded_size = static_cast<size_t>((slice.height + 2) * slice.pitch);
  s.warped.assign(padded_size, 0);
  s.stale.assign(padded_size, 1);
  s.differs.assign(static_cast<size_t>(slice.width) + 8, 0);
  s.order.clear();
  const float threshold = as_float(slice.threshold);
  for (int64_t y = 0; y < slice.height; ++y) {
    const float *prediction = slice.prediction + y * slice.width;
    const uint8_t *truth = slice.truth + y * slice.width, *counted = slice.counted + y * slice.width;
    std::copy_n(truth, slice.width, s.warped.data() + slice.padded(y, 0));
    uint8_t *differs = s.differs.data();
    for (int64_t x = 0; x < slice.width; ++x)
      differs[x] = static_cast<uint8_t>((truth[x] ^ static_cast<uint8_t>(prediction[x] > threshold)) & counted[x]);
    for (int64_t x = 0; x < slice.width; ++x) {
      uint64_t eight;
      std::memcpy(&eight, differs + x, sizeof eight); // nothing beyond the row differs
      if (eight == 0) {
        x += 7;
        continue;
      }
      if (!differs[x]) continue;
      // the strongest disagreement first, then column by column: distances are not negative, so their bits sort as they
      const float strength = static_cast<float>(std::fabs(static_cast<double>(prediction[x]) - slice.threshold));
      uint32_t bits;
      std::memcpy(&bits, &strength, sizeof bits);
      const uint32_t rank = std::isnan(strength) ? UINT32_MAX : ~bits; // NaN last, as numpy sorts
      s.order.push_back(uint64_t{rank} << 32 | static_cast<uint32_t>(x * slice.height + y));
    }
  }
  sort(s.order, s.spare);
  s.mismatches.clear();
  for (const uint64_t key : s.order) {
    const int64_t place = static_cast<uint32_t>(key);
    s.mismatches.push_back(slice.padded(place % slice.height, place / slice.height));
  }
  for (bool flipped = true; flipped;) {
    flipped = false;
    size_t left = 0;
    for (const int64_t at : s.mismatches) {
      // whether a point is simple can only have changed with its neighbours
      if (s.stale[at]) {
        s.stale[at] = 0;
        if (kSimple[ring_at(s.warped.data(), at, slice.pitch)]) {
          s.warped[at] ^= 1;
          for (int i = 0; i < 8; ++i) s.stale[at + kRow[i] * slice.pitch + kColumn[i]] = 1;
          flipped = true;
          continue;
        }
      }
      s.mismatches[left++] = at;
    }
    s.mismatches.resize(left);
  }
}

// Whether a cell pixel, taken away, leaves its 8 neighbours in more than two parts within the window: background is one,
// and each 4-connected piece of cell another.
bool parts_its_neighbours(const Slice &slice, Scratch &s, int64_t y, int64_t x, int64_t radius) {
  const int64_t top = std::max<int64_t>(0, y - radius), bottom = std::min(slice.height - 1, y + radius);
  const int64_t left = std::max<int64_t>(0, x - radius), right = std::min(slice.width - 1, x + radius);
  const int64_t middle = slice.padded(y, x);
  uint8_t *image = s.warped.data();
  // in-window neighbours that are cell and not reached yet
  std::array<int64_t, 8> pieces;
  int waiting = 0, background = 0, found = 0;
  for (int i = 0; i < 8; ++i) {
    const int64_t ny = y + kRow[i], nx = x + kColumn[i];
    if (ny < top || ny > bottom || nx < left || nx > right) continue;
    const int64_t at = slice.padded(ny, nx);
    if (image[at])
      pieces[waiting++] = at;
    else
      background = 1;
  }
  // what is reached is 2 for the time being
  image[middle] = 2;
  std::vector<int64_t> &todo = s.todo;
  todo.clear();
  size_t next = 0;
  while (waiting && found + background <= 2) {
    ++found;
    todo.push_back(pieces[waiting - 1]);
    image[todo.back()] = 2;
    for (; next < todo.size() && waiting; ++next) {
      const int64_t at = todo[next];
      for (int i = 0; i < waiting;) {
        if (pieces[i] == at)
          pieces[i] = pieces[--waiting];
        else
          ++i;
      }
      const int64_t ay = at / slice.pitch - 1, ax = at % slice.pitch - 1;
      const auto reach = [&](int64_t ny, int64_t nx) {
        if (ny < top || ny > bottom || nx < left || nx > right) return;
        const int64_t there = slice.padded(ny, nx);
        if (image[there] != 1) return;
        image[there] = 2;
        todo.push_back(there);
      };
      reach(ay - 1, ax);
      reach(ay + 1, ax);
      reach(ay, ax - 1);
      reach(ay, ax + 1);
    }
  }
  for (const int64_t at : todo) image[at] = 1;
  image[middle] = 1;
  return found + background > 2;
}

uint8_t kind_of(const Slice &slice, Scratch &s, int64_t y, int64_t x, int64_t radius) {
  int32_t ids[8];
  int distinct = 0;
  for (int i = 0; i < 8; ++i) {
    const int64_t ny = y + kRow[i], nx = x + kColumn[i];
    if (ny < 0 || ny >= slice.height || nx < 0 || nx >= slice.width) continue;
    const int32_t id = s.ids[static_cast<size_t>(ny * slice.width + nx)];
    if (std::find(ids, ids + distinct, id) == ids + distinct) ids[distinct++] = id;
  }
  const bool cell = s.warped[slice.padded(y, x)];
  if (distinct == 0 || (distinct == 1 && ids[0] == 0)) return cell ? UNET_OBJECT_DELETION : UNET_OBJECT_ADDITION;
  if (distinct == 1) return cell ? UNET_HOLE_ADDITION : UNET_HOLE_DELETION;
  if (distinct > 2) return cell ? UNET_SPLIT : UNET_MERGE;
  if (!cell) return UNET_HOLE_ADDITION;
  return parts_its_neighbours(slice, s, y, x, radius) ? UNET_SPLIT : UNET_HOLE_DELETION;
}

} // namespace

int32_t unet_homotopic_warp_cpu(const float *prediction, const uint8_t *truth, const uint8_t *counted, int64_t count,
                                int64_t height, int64_t width, const double *thresholds, int64_t threshold_count,
                                int64_t radius, int64_t *counts, uint8_t *kinds) {
  const int64_t size = height * width;
  radius = std::min(radius, std::max(height, width)); // no window is larger than the image, and no sum overflows
  return unet::for_each_task<Scratch>(count * threshold_count, [&](int64_t task, Scratch &s) {
    const int64_t at = task % count * size;
    const Slice slice = {prediction + at, truth + at, counted + at, height, width, width + 2, thresholds[task / count]};
    warp(slice, s);
    int64_t *counted_here = counts + task * UNET_KINDS;
    std::fill(counted_here, counted_here + UNET_KINDS, 0);
    uint8_t *kinds_here = kinds ? kinds + task * size : nullptr;
    if (kinds_here) std::fill(kinds_here, kinds_here + size, uint8_t{0});
    if (s.mismatches.empty()) return;
    s.ids.resize(static_cast<size_t>(size));
    unet::label(s.warped.data() + slice.padded(0, 0), slice.pitch, static_cast<int32_t>(height),
                static_cast<int32_t>(width), false, s.ids.data(), s.components);
    for (const int64_t where : s.mismatches) {
      const int64_t y = where / slice.pitch - 1, x = where % slice.pitch - 1;
      const uint8_t kind = kind_of(slice, s, y, x, radius);
      ++counted_here[kind];
      if (kinds_here) kinds_here[y * width + x] = kind;
    }
  });
}
