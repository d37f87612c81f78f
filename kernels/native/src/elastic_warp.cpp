// The elastic warp of an image and its labels, and its derivative, by blocks of output pixels: where each pixel reads; the
// rectangle of the image that all of them read, as float32 and with its mirrored borders unfolded; and the taps from
// there. The derivative goes the same way back, and folds the rectangle into the gradient of the image.
// Every product and every sum is rounded, and in the order of the specification (unet_kernels/reference/warp.py), so that
// the bits are the specification's on every processor: this file is compiled without contraction (CMakeLists.txt).
#include "threads.h"
#include "unet_native.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#define UNET_X86 1
#else
#define UNET_X86 0
#endif

// what is compiled once for each processor must be a part of what calls it
#if defined(__GNUC__)
#define UNET_INLINE inline __attribute__((always_inline))
#else
#define UNET_INLINE inline
#endif

namespace {

// Of a block of the output, and of what it may read at once: as much as stays in a core's caches.
constexpr int kRows = 32, kColumns = 128, kPixels = kRows * kColumns;
constexpr int64_t kWindow = int64_t{1} << 16;
// no image is so large; positions beyond lie here
constexpr float kFar = 1073741824.0f;
// adding and taking away 1.5 x 2^23 rounds what is smaller to the nearest whole number, halves to even
constexpr float kRound = 12582912.0f;

// ---- taps

// 2 or 4 numbers side by side, one a tap: compilers make a vector of them.
template <int N> struct Lanes {
  float of[N];
  UNET_INLINE Lanes operator*(float b) const {
    Lanes product;
    for (int i = 0; i < N; ++i) product.of[i] = of[i] * b;
    return product;
  }
  UNET_INLINE Lanes operator+(Lanes b) const {
    for (int i = 0; i < N; ++i) b.of[i] += of[i];
    return b;
  }
  static UNET_INLINE Lanes load(const float *from) {
    Lanes lanes;
    std::memcpy(&lanes.of, from, sizeof(lanes.of));
    return lanes;
  }
  UNET_INLINE void store(float *to) const { std::memcpy(to, &of, sizeof(of)); }
};

// Of a position f in [0, 1) behind pixel 0: the weight of each pixel that it reads, the first of which is kFirst, and its
// derivative by f.
enum class Of { weight, slope };
template <int Order> struct Taps;
template <> struct Taps<1> {
  static constexpr int kFirst = 0, kCount = 2;
  template <Of what> static UNET_INLINE float at(int tap, float f) {
    if (what == Of::slope) return tap ? 1.0f : -1.0f;
    return tap ? f : 1.0f - f;
  }
};
// Keys' cubic, a = -0.75.
template <> struct Taps<3> {
  static constexpr int kFirst = -1, kCount = 4;
  template <Of what> static UNET_INLINE float at(int tap, float f) {
    // from the pixel's side: t is how near the position is to the pixel beyond
    const float g = 1.0f - f, t = tap < 2 ? f : g, rest = tap < 2 ? g : f;
    const bool outer = tap == 0 || tap == 3;
    if (what == Of::weight) return outer ? -0.75f * (f * g) * rest : (1.25f * t - 2.25f) * t * t + 1.0f;
    const float slope = outer ? -0.75f * rest * (rest - 2.0f * t) : (3.75f * t - 4.5f) * t;
    return tap < 2 ? slope : -slope;
  }
};

// ---- where output pixels lie in the grid

// One axis: of each output pixel its place in the image, the grid point before it, and the weights of the four around.
struct Axis {
  int64_t first, points;
  std::vector<int32_t> low, run; // run: where the next pixel with another point before it comes
  std::vector<float> weight[4];

  Axis(int64_t out, int64_t pixels, int64_t grid_points)
      : points(grid_points), low(static_cast<size_t>(out)), run(low.size()) {
    const int64_t margin = pixels - out;
    first = (margin - (margin < 0)) / 2; // rounded down
    for (auto &weights : weight) weights.resize(low.size());
    const float scale =
        pixels > 1 ? static_cast<float>(static_cast<double>(points - 1) / static_cast<double>(pixels - 1)) : 0.0f;
    for (int64_t p = 0; p < out; ++p) {
      const int64_t inside = std::min(std::max(p + first, int64_t{0}), pixels - 1);
      const float at = static_cast<float>(inside) * scale, before = std::floor(at);
      low[static_cast<size_t>(p)] = static_cast<int32_t>(before);
      for (int i = 0; i < 4; ++i) weight[i][static_cast<size_t>(p)] = Taps<3>::at<Of::weight>(i, at - before);
    }
    for (size_t p = low.size(); p-- > 0;)
      run[p] = p + 1 < low.size() && low[p + 1] == low[p] ? run[p + 1] : static_cast<int32_t>(p + 1);
  }
  int64_t clamped(int64_t point) const { return std::min(std::max(point, int64_t{0}), points - 1); }
};

// Output pixels of one image.
struct Part {
  int32_t row, column, rows, columns;
  int pixels() const { return rows * columns; }
};

// What all blocks have in common.
struct Job {
  const unet_warp &warp;
  Axis rows, columns;
  int64_t down, across; // blocks
  void *out = nullptr, *warped = nullptr;
  const float *dout = nullptr;
  float *dimage = nullptr, *du = nullptr;
  double *sums = nullptr; // 6 a block

  explicit Job(const unet_warp &w)
      : warp(w), rows(w.out_height, w.height, w.grid_height), columns(w.out_width, w.width, w.grid_width),
        down((w.out_height + kRows - 1) / kRows), across((w.out_width + kColumns - 1) / kColumns) {}
  int64_t blocks() const { return warp.count * down * across; }
  int64_t out_pixels() const { return warp.out_height * warp.out_width; }
  // block `i` of an image
  Part part(int64_t i) const {
    const int64_t row = i / across * kRows, column = i % across * kColumns;
    return {static_cast<int32_t>(row), static_cast<int32_t>(column),
            static_cast<int32_t>(std::min<int64_t>(kRows, warp.out_height - row)),
            static_cast<int32_t>(std::min<int64_t>(kColumns, warp.out_width - column))};
  }
  float highest() const { return warp.pixel == UNET_UINT8 ? 255.0f : warp.pixel == UNET_UINT16 ? 65535.0f : 1.0f; }
};

// What a thread works with.
struct Scratch {
  int64_t n = 0; // the image
  Part part{};   // of it, with the places that its pixels read:
  float y[kPixels], x[kPixels], fy[kPixels], fx[kPixels];
  int32_t low_y[kPixels], low_x[kPixels], at[kPixels]; // at: in the rectangle, see aim()
  float from_y[kPixels], from_x[kPixels]; // before the affine map, from the centre
  // the rectangle that they read: its rows and columns, where in the image each of them lies, room for its pixels
  int64_t top = 0, left = 0, height = 0, width = 0;
  std::vector<int64_t> row, column;
  std::tuple<std::vector<float>, std::vector<uint8_t>, std::vector<uint16_t>, std::vector<uint32_t>,
             std::vector<uint64_t>>
      rooms;
  std::vector<float> gradient;
  std::vector<Part> todo;
  std::vector<float> grid[2];
  // of a row
  float taps[4][kColumns], sums[4 * kColumns], line[kColumns], by_y[kColumns], by_x[kColumns];
  // of a part
  float dy[kPixels], dx[kPixels];
};

// The largest whole number that is not above v, for |v| < 2^31; without a call, for any processor.
UNET_INLINE int32_t floor_of(float v) {
  const int32_t cut = static_cast<int32_t>(v);
  return cut - (static_cast<float>(cut) > v ? 1 : 0);
}

// A row of p + u(p), and of where that leads.
UNET_INLINE void read_row(const Job &job, Scratch &s, int row) {
  const Axis &rows = job.rows, &columns = job.columns;
  const Part &part = s.part;
  const size_t out_row = static_cast<size_t>(part.row + row), begin = static_cast<size_t>(part.column);
  const int64_t first = columns.low[begin], last = columns.low[begin + static_cast<size_t>(part.columns) - 1] + 3;
  for (int axis = 0; axis < 2; ++axis) {
    // the grid's columns at this row, the first and the last one repeated
    const float *plane = job.warp.displacement + (s.n * 2 + axis) * rows.points * columns.points;
    s.grid[axis].resize(static_cast<size_t>(columns.points) + 3);
    for (int64_t g = first; g <= last; ++g) {
      float sum = 0;
      for (int i = 0; i < 4; ++i) {
        const int64_t point = rows.clamped(rows.low[out_row] + i - 1) * columns.points + columns.clamped(g - 1);
        const float term = plane[point] * rows.weight[i][out_row];
        sum = i ? sum + term : term;
      }
      s.grid[axis][static_cast<size_t>(g)] = sum;
    }
  }
  float *y = s.y + row * part.columns, *x = s.x + row * part.columns;
  const float at_y = static_cast<float>(part.row + row + rows.first);
  const int32_t at_x = static_cast<int32_t>(part.column + columns.first);
  const float *w0 = columns.weight[0].data() + begin, *w1 = columns.weight[1].data() + begin,
              *w2 = columns.weight[2].data() + begin, *w3 = columns.weight[3].data() + begin;
  const int32_t *low = columns.low.data() + begin;
  for (int c = 0; c < part.columns;) {
    // pixels between the same grid points
    const int end = std::min(part.columns, columns.run[begin + static_cast<size_t>(c)] - part.column);
    float u_y[4], u_x[4];
    std::copy_n(s.grid[0].data() + low[c], 4, u_y);
    std::copy_n(s.grid[1].data() + low[c], 4, u_x);
    for (; c < end; ++c) {
      y[c] = at_y + (((w0[c] * u_y[0] + w1[c] * u_y[1]) + w2[c] * u_y[2]) + w3[c] * u_y[3]);
      x[c] = static_cast<float>(at_x + c) + (((w0[c] * u_x[0] + w1[c] * u_x[1]) + w2[c] * u_x[2]) + w3[c] * u_x[3]);
    }
  }
}

// Where the part's pixels read.
UNET_INLINE void read(const Job &job, Scratch &s) {
  const int pixels = s.part.pixels();
  for (int row = 0; row < s.part.rows; ++row) read_row(job, s, row);
  if (!job.warp.matrix) return;
  const float *m = job.warp.matrix + s.n * 6;
  const float middle_y = static_cast<float>(static_cast<double>(job.warp.height - 1) / 2);
  const float middle_x = static_cast<float>(static_cast<double>(job.warp.width - 1) / 2);
  for (int p = 0; p < pixels; ++p) {
    const float from_y = s.y[p] - middle_y, from_x = s.x[p] - middle_x;
    s.from_y[p] = from_y;
    s.from_x[p] = from_x;
    s.y[p] = ((m[0] * from_y + m[1] * from_x) + m[2]) + middle_y;
    s.x[p] = ((m[3] * from_y + m[4] * from_x) + m[5]) + middle_x;
  }
}

struct Span {
  int32_t low, high;
};

// Whole pixels and what is left, of positions; the span of the former. What is no number leaves none behind.
UNET_INLINE Span split(const float *positions, int pixels, int32_t *whole, float *rest) {
  Span span{std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()};
  for (int p = 0; p < pixels; ++p) {
    const float v = positions[p];
    float near = v > -kFar ? v : -kFar;
    near = near < kFar ? near : kFar;
    const int32_t low = floor_of(near);
    whole[p] = low;
    rest[p] = (near - static_cast<float>(low)) + (v - v);
    span.low = low < span.low ? low : span.low;
    span.high = low > span.high ? low : span.high;
  }
  return span;
}

// 1234 -> 32123432, wherever the index lies.
UNET_INLINE int64_t mirrored(int64_t index, int64_t size) {
  const int64_t period = size > 1 ? 2 * (size - 1) : 1;
  index %= period;
  if (index < 0) index += period;
  return index < size ? index : period - index;
}

UNET_INLINE void lay(std::vector<int64_t> &places, int64_t first, int64_t count, int64_t size) {
  places.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) places[static_cast<size_t>(i)] = mirrored(first + i, size);
}

UNET_INLINE void begin(const Job &job, Scratch &s, int64_t n, int64_t block) {
  s.n = n;
  s.todo.assign(1, job.part(block));
}

// The next part of what is to do, where its pixels read, and the rectangle around; false when all is done. A part that
// reads too much at once (a map that shrinks, or that leads far away) is halved, down to a pixel if need be.
template <int Order> UNET_INLINE bool next(const Job &job, Scratch &s) {
  while (!s.todo.empty()) {
    s.part = s.todo.back();
    s.todo.pop_back();
    read(job, s);
    const Span rows = split(s.y, s.part.pixels(), s.low_y, s.fy), columns = split(s.x, s.part.pixels(), s.low_x, s.fx);
    s.top = int64_t{rows.low} + Taps<Order>::kFirst;
    s.left = int64_t{columns.low} + Taps<Order>::kFirst;
    s.height = int64_t{rows.high} - rows.low + Taps<Order>::kCount;
    s.width = int64_t{columns.high} - columns.low + Taps<Order>::kCount;
    if (s.part.pixels() > 1 && s.height * s.width > kWindow) {
      Part first = s.part, second = s.part;
      if (first.rows > first.columns) {
        first.rows /= 2;
        second.row += first.rows;
        second.rows -= first.rows;
      } else {
        first.columns /= 2;
        second.column += first.columns;
        second.columns -= first.columns;
      }
      s.todo.push_back(second);
      s.todo.push_back(first);
      continue;
    }
    lay(s.row, s.top, s.height, job.warp.height);
    lay(s.column, s.left, s.width, job.warp.width);
    return true;
  }
  return false;
}

// Of each pixel of the part, the place of the first pixel that it reads, in a rectangle with rows so far apart.
template <int Order> UNET_INLINE void aim(Scratch &s, int64_t pitch) {
  const int32_t top = static_cast<int32_t>(s.top - Taps<Order>::kFirst), apart = static_cast<int32_t>(pitch),
                left = static_cast<int32_t>(s.left - Taps<Order>::kFirst);
  for (int p = 0; p < s.part.pixels(); ++p) s.at[p] = (s.low_y[p] - top) * apart + (s.low_x[p] - left);
}

// ---- from the image to the output

// The rectangle's pixels of a plane, and how far its rows are apart.
template <class Pixel> struct View {
  const Pixel *first;
  int64_t pitch;
};

// Where they lie, if they are such numbers side by side; else as such numbers, and unfolded.
template <class To, class From>
UNET_INLINE View<To> look(const Job &job, Scratch &s, const From *plane, const int64_t *stride) {
  const unet_warp &warp = job.warp;
  if constexpr (std::is_same_v<From, To>) {
    const bool inside = s.left >= 0 && s.left + s.width <= warp.width && s.top >= 0 && s.top + s.height <= warp.height;
    // places in it are 32 bits wide
    if (inside && stride[1] == 1 && stride[0] * s.height <= std::numeric_limits<int32_t>::max())
      return {plane + s.top * stride[0] + s.left, stride[0]};
  }
  std::vector<To> &room = std::get<std::vector<To>>(s.rooms);
  room.resize(static_cast<size_t>(s.height * s.width));
  // the columns that lie in the image as they lie in memory
  const int64_t whole = stride[1] == 1 ? warp.width : 0;
  const int64_t begin = std::min(std::max(-s.left, int64_t{0}), s.width);
  const int64_t end = std::max(begin, std::min(whole - s.left, s.width));
  const int64_t *column = s.column.data();
  To *to = room.data();
  for (int64_t r = 0; r < s.height; ++r, to += s.width) {
    const From *from = plane + s.row[static_cast<size_t>(r)] * stride[0];
    for (int64_t c = 0; c < begin; ++c) to[c] = static_cast<To>(from[column[c] * stride[1]]);
    for (int64_t c = begin; c < end; ++c) to[c] = static_cast<To>(from[s.left + c]);
    for (int64_t c = end; c < s.width; ++c) to[c] = static_cast<To>(from[column[c] * stride[1]]);
  }
  return {room.data(), s.width};
}

UNET_INLINE View<float> look_at_channel(const Job &job, Scratch &s, int64_t channel) {
  const int64_t *stride = job.warp.image_stride + 2;
  const int64_t plane = s.n * job.warp.image_stride[0] + channel * job.warp.image_stride[1];
  switch (job.warp.pixel) {
    case UNET_UINT8: return look<float>(job, s, static_cast<const uint8_t *>(job.warp.image) + plane, stride);
    case UNET_UINT16: return look<float>(job, s, static_cast<const uint16_t *>(job.warp.image) + plane, stride);
    default: return look<float>(job, s, static_cast<const float *>(job.warp.image) + plane, stride);
  }
}

// Of each pixel of a row of the part, the sums down the columns that it reads, into s.sums.
template <int Order, Of what> UNET_INLINE void down(Scratch &s, View<float> image, int row) {
  using T = Taps<Order>;
  const int columns = s.part.columns;
  const float *f = s.fy + row * columns;
  const int32_t *first = s.at + row * columns;
  float *sums = s.sums;
  // the taps of many pixels at a time, then all columns of a pixel
  for (int i = 0; i < T::kCount; ++i)
    for (int c = 0; c < columns; ++c) s.taps[i][c] = T::template at<what>(i, f[c]);
  for (int c = 0; c < columns; ++c) {
    const float *at = image.first + first[c];
    auto sum = Lanes<T::kCount>::load(at) * s.taps[0][c];
    for (int i = 1; i < T::kCount; ++i) sum = sum + Lanes<T::kCount>::load(at + i * image.pitch) * s.taps[i][c];
    sum.store(sums + c * T::kCount);
  }
}

// And from there across, into `line`.
template <int Order, Of what> UNET_INLINE void across(const Scratch &s, int row, float *line) {
  using T = Taps<Order>;
  const int columns = s.part.columns;
  const float *f = s.fx + row * columns, *sums = s.sums;
  for (int c = 0; c < columns; ++c) {
    float sum = sums[c * T::kCount] * T::template at<what>(0, f[c]);
    for (int j = 1; j < T::kCount; ++j) sum = sum + sums[c * T::kCount + j] * T::template at<what>(j, f[c]);
    line[c] = sum;
  }
}

// A row of the part, interpolated, into s.line.
template <int Order> UNET_INLINE void sample(Scratch &s, View<float> image, int row) {
  down<Order, Of::weight>(s, image, row);
  across<Order, Of::weight>(s, row, s.line);
}

// The grey-value table of an image.
struct Table {
  const float *entries;
  float factor, last;

  Table(const Job &job, int64_t n)
      : entries(job.warp.table + n * job.warp.table_stride),
        factor(static_cast<float>(static_cast<double>(job.warp.entries - 1) / job.highest())),
        last(static_cast<float>(job.warp.entries - 1)) {}
  // the entry before a value, which is a number
  UNET_INLINE int32_t entry(float position) const {
    const int32_t before = static_cast<int32_t>(position);
    return before > static_cast<int32_t>(last) - 1 ? static_cast<int32_t>(last) - 1 : before;
  }
  UNET_INLINE float operator()(float value) const {
    const float known = value == value ? value : 0.0f;
    float position = known * factor;
    position = position > 0.0f ? position : 0.0f;
    position = position < last ? position : last;
    const int32_t before = entry(position);
    const float left = entries[before], right = entries[before + 1];
    const float found = left + (right - left) * (position - static_cast<float>(before));
    return value == value ? found : value;
  }
  // the derivative; flat beyond the ends, and where there is no number
  UNET_INLINE float slope(float value) const {
    const float position = value * factor;
    if (!(position >= 0.0f && position <= last)) return 0.0f;
    const int32_t before = entry(position);
    return (entries[before + 1] - entries[before]) * factor;
  }
};

template <class Pixel> UNET_INLINE void round(const float *line, int columns, float highest, Pixel *to) {
  for (int c = 0; c < columns; ++c) {
    float v = line[c] > 0.0f ? line[c] : 0.0f;
    v = v < highest ? v : highest;
    to[c] = static_cast<Pixel>(static_cast<int32_t>((v + kRound) - kRound));
  }
}

template <int Order, class Label> UNET_INLINE void take_nearest(const Job &job, Scratch &s) {
  const Label *plane = static_cast<const Label *>(job.warp.labels) + s.n * job.warp.label_stride[0];
  const View<Label> labels = look<Label>(job, s, plane, job.warp.label_stride + 1);
  aim<Order>(s, labels.pitch);
  const int pixels = s.part.pixels(), columns = s.part.columns;
  const int32_t below = static_cast<int32_t>(labels.pitch), here = -Taps<Order>::kFirst * (below + 1);
  // from the first pixel to the nearest
  for (int p = 0; p < pixels; ++p) s.at[p] += here + (s.fy[p] >= 0.5f ? below : 0) + (s.fx[p] >= 0.5f ? 1 : 0);
  Label *to = static_cast<Label *>(job.warped) + s.n * job.out_pixels() + s.part.row * job.warp.out_width +
              s.part.column;
  for (int row = 0; row < s.part.rows; ++row, to += job.warp.out_width) {
    const int32_t *at = s.at + row * columns;
    for (int c = 0; c < columns; ++c) to[c] = labels.first[at[c]];
  }
}

// A block of the output: image and labels.
struct Forward {
  template <int Order> static UNET_INLINE void run(const Job &job, int64_t task, Scratch &s) {
    const unet_warp &warp = job.warp;
    const int64_t per_image = job.down * job.across;
    begin(job, s, task / per_image, task % per_image);
    while (next<Order>(job, s)) {
      const int columns = s.part.columns;
      for (int64_t c = 0; c < warp.channels; ++c) {
        const View<float> image = look_at_channel(job, s, c);
        aim<Order>(s, image.pitch);
        for (int row = 0; row < s.part.rows; ++row) {
          sample<Order>(s, image, row);
          if (warp.table) {
            const Table table(job, s.n);
            for (int i = 0; i < columns; ++i) s.line[i] = table(s.line[i]);
          }
          const int64_t to = (s.n * warp.channels + c) * job.out_pixels() +
                             (s.part.row + row) * warp.out_width + s.part.column;
          switch (warp.pixel) {
            case UNET_UINT8: round(s.line, columns, job.highest(), static_cast<uint8_t *>(job.out) + to); break;
            case UNET_UINT16: round(s.line, columns, job.highest(), static_cast<uint16_t *>(job.out) + to); break;
            default: std::memcpy(static_cast<float *>(job.out) + to, s.line, static_cast<size_t>(columns) * sizeof(float));
          }
        }
      }
      if (!warp.labels) continue;
      switch (warp.label_bytes) {
        case 1: take_nearest<Order, uint8_t>(job, s); break;
        case 2: take_nearest<Order, uint16_t>(job, s); break;
        case 4: take_nearest<Order, uint32_t>(job, s); break;
        default: take_nearest<Order, uint64_t>(job, s);
      }
    }
  }
};

// ---- and back

UNET_INLINE const float *dout_of(const Job &job, const Scratch &s, int64_t channel, int row) {
  return job.dout + (s.n * job.warp.channels + channel) * job.out_pixels() +
         (s.part.row + row) * job.warp.out_width + s.part.column;
}

// The gradient of the part's grey values, in s.dy, to that of what was read, before the table.
template <int Order> UNET_INLINE void to_before_the_table(const Job &job, Scratch &s, int64_t channel) {
  const View<float> image = look_at_channel(job, s, channel);
  const Table table(job, s.n);
  aim<Order>(s, image.pitch);
  for (int row = 0; row < s.part.rows; ++row) {
    sample<Order>(s, image, row);
    float *d = s.dy + row * s.part.columns;
    for (int i = 0; i < s.part.columns; ++i) d[i] *= table.slope(s.line[i]);
  }
}

// All blocks of a channel of an image, one after the other: every output value handed back to the pixels that it was
// read from.
struct ImageGradient {
  template <int Order> static UNET_INLINE void run(const Job &job, int64_t plane, Scratch &s) {
    using T = Taps<Order>;
    const int64_t c = plane % job.warp.channels;
    float *dimage = job.dimage + plane * job.warp.height * job.warp.width;
    std::fill(dimage, dimage + job.warp.height * job.warp.width, 0.0f);
    for (int64_t block = 0; block < job.down * job.across; ++block) {
      begin(job, s, plane / job.warp.channels, block);
      while (next<Order>(job, s)) {
        const int columns = s.part.columns;
        for (int row = 0; row < s.part.rows; ++row) {
          const float *dout = dout_of(job, s, c, row);
          std::copy(dout, dout + columns, s.dy + row * columns);
        }
        if (job.warp.table) to_before_the_table<Order>(job, s, c);
        aim<Order>(s, s.width);
        s.gradient.assign(static_cast<size_t>(s.height * s.width), 0.0f);
        for (int row = 0; row < s.part.rows; ++row) {
          const float *d = s.dy + row * columns, *fy = s.fy + row * columns, *fx = s.fx + row * columns;
          for (int i = 0; i < T::kCount; ++i)
            for (int c = 0; c < columns; ++c) s.taps[i][c] = T::template at<Of::weight>(i, fy[c]) * d[c];
          for (int c = 0; c < columns; ++c)
            for (int i = 0; i < T::kCount; ++i) s.sums[c * T::kCount + i] = T::template at<Of::weight>(i, fx[c]);
          for (int c = 0; c < columns; ++c) {
            const auto taps = Lanes<T::kCount>::load(s.sums + c * T::kCount);
            float *at = s.gradient.data() + s.at[row * columns + c];
            for (int i = 0; i < T::kCount; ++i, at += s.width)
              (Lanes<T::kCount>::load(at) + taps * s.taps[i][c]).store(at);
          }
        }
        for (int64_t r = 0; r < s.height; ++r) {
          float *to = dimage + s.row[static_cast<size_t>(r)] * job.warp.width;
          const float *from = s.gradient.data() + r * s.width;
          const int64_t *column = s.column.data();
          for (int64_t i = 0; i < s.width; ++i) to[column[i]] += from[i];
        }
      }
    }
  }
};

// A block of the output: the derivative by the row and the column that each pixel reads, and from there by u and by the
// matrix.
struct PositionGradient {
  template <int Order> static UNET_INLINE void run(const Job &job, int64_t task, Scratch &s) {
    const int64_t per_image = job.down * job.across;
    double sums[6] = {};
    begin(job, s, task / per_image, task % per_image);
    while (next<Order>(job, s)) {
      const int pixels = s.part.pixels(), columns = s.part.columns;
      std::fill(s.dy, s.dy + pixels, 0.0f);
      std::fill(s.dx, s.dx + pixels, 0.0f);
      for (int64_t c = 0; c < job.warp.channels; ++c) {
        const View<float> image = look_at_channel(job, s, c);
        aim<Order>(s, image.pitch);
        for (int row = 0; row < s.part.rows; ++row) {
          const float *dout = dout_of(job, s, c, row);
          down<Order, Of::weight>(s, image, row);
          across<Order, Of::slope>(s, row, s.by_x);
          if (job.warp.table) across<Order, Of::weight>(s, row, s.line);
          down<Order, Of::slope>(s, image, row);
          across<Order, Of::weight>(s, row, s.by_y);
          for (int i = 0; i < columns; ++i) {
            const float d = job.warp.table ? dout[i] * Table(job, s.n).slope(s.line[i]) : dout[i];
            s.dy[row * columns + i] += d * s.by_y[i];
            s.dx[row * columns + i] += d * s.by_x[i];
          }
        }
      }
      if (job.warp.matrix) {
        const float *m = job.warp.matrix + s.n * 6;
        for (int p = 0; p < pixels; ++p) {
          const float dy = s.dy[p], dx = s.dx[p];
          const double from[3] = {s.from_y[p], s.from_x[p], 1.0};
          for (int k = 0; k < 3; ++k) {
            sums[k] += dy * from[k];
            sums[3 + k] += dx * from[k];
          }
          s.dy[p] = m[0] * dy + m[3] * dx;
          s.dx[p] = m[1] * dy + m[4] * dx;
        }
      }
      if (!job.du) continue;
      for (int row = 0; row < s.part.rows; ++row) {
        float *to = job.du + s.n * 2 * job.out_pixels() + (s.part.row + row) * job.warp.out_width + s.part.column;
        const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
        std::memcpy(to, s.dy + row * columns, bytes);
        std::memcpy(to + job.out_pixels(), s.dx + row * columns, bytes);
      }
    }
    if (job.sums) std::copy(sums, sums + 6, job.sums + task * 6);
  }
};

// ---- one code for each processor

template <class What, int Order> void on_baseline(const Job &job, int64_t task, Scratch &scratch) {
  What::template run<Order>(job, task, scratch);
}
#if UNET_X86
template <class What, int Order>
__attribute__((target("avx2"))) void on_avx2(const Job &job, int64_t task, Scratch &scratch) {
  What::template run<Order>(job, task, scratch);
}
template <class What, int Order>
__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq"))) void on_avx512(const Job &job, int64_t task,
                                                                             Scratch &scratch) {
  What::template run<Order>(job, task, scratch);
}
#endif

enum class Processor { baseline, avx2, avx512 };

Processor processor() {
#if UNET_X86
  const char *asked = std::getenv("UNET_PROCESSOR");
  const auto allowed = [asked](const char *name) { return !asked || !std::strcmp(asked, name); };
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx512 && allowed("avx512")) return Processor::avx512;
  if (__builtin_cpu_supports("avx2") && (allowed("avx2") || allowed("avx512"))) return Processor::avx2;
#endif
  return Processor::baseline;
}

using Work = void (*)(const Job &, int64_t, Scratch &);

template <class What, int Order> Work work_of_order() {
#if UNET_X86
  switch (processor()) {
    case Processor::avx512: return on_avx512<What, Order>;
    case Processor::avx2: return on_avx2<What, Order>;
    case Processor::baseline: break;
  }
#endif
  return on_baseline<What, Order>;
}

template <class What> Work work_of(const Job &job) {
  return job.warp.order == 1 ? work_of_order<What, 1>() : work_of_order<What, 3>();
}

} // namespace

const char *unet_processor(void) {
  switch (processor()) {
    case Processor::avx512: return "avx512";
    case Processor::avx2: return "avx2";
    case Processor::baseline: break;
  }
  return "baseline";
}

int32_t unet_elastic_warp_cpu(const unet_warp *warp, void *out, void *warped) {
  try {
    Job job(*warp);
    job.out = out;
    job.warped = warped;
    const Work work = work_of<Forward>(job);
    return unet::for_each_task<Scratch>(job.blocks(),
                                        [&](int64_t task, Scratch &scratch) { work(job, task, scratch); });
  } catch (const std::bad_alloc &) {
    return UNET_OUT_OF_MEMORY;
  }
}

int32_t unet_elastic_warp_backward_cpu(const unet_warp *warp, const float *dout, float *dimage, float *du,
                                       double *dmatrix) {
  try {
    Job job(*warp);
    job.dout = dout;
    job.dimage = dimage;
    job.du = du;
    if (dimage) {
      const Work work = work_of<ImageGradient>(job);
      const int32_t status =
          unet::for_each_task<Scratch>(warp->count * warp->channels,
                                       [&](int64_t task, Scratch &scratch) { work(job, task, scratch); });
      if (status) return status;
    }
    if (!du && !dmatrix) return UNET_OK;
    std::vector<double> sums(static_cast<size_t>(job.blocks()) * 6);
    job.sums = sums.data();
    const Work work = work_of<PositionGradient>(job);
    const int32_t status = unet::for_each_task<Scratch>(
        job.blocks(), [&](int64_t task, Scratch &scratch) { work(job, task, scratch); });
    if (dmatrix && !status) {
      std::fill(dmatrix, dmatrix + warp->count * 6, 0.0);
      for (int64_t i = 0; i < job.blocks() * 6; ++i)
        dmatrix[i / (job.down * job.across * 6) * 6 + i % 6] += sums[static_cast<size_t>(i)];
    }
    return status;
  } catch (const std::bad_alloc &) {
    return UNET_OUT_OF_MEMORY;
  }
}
