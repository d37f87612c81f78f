// Foreground-restricted overlap of a prediction's segments with the truth's cells, as the sums that Rand and information
// scores are made of; and the segments by watershed. The specification is unet_kernels/reference/topology.py.
#include "components.h"
#include "threads.h"
#include "unet_native.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace {

constexpr int32_t kDry = -1, kQueued = -2;

struct Scratch {
  std::vector<uint8_t> cells;
  std::vector<int32_t> segments;
  std::vector<int64_t> queue;
  unet::Runs components;
  std::vector<std::pair<uint64_t, int64_t>> runs;
  std::vector<int64_t> of_segment;
};

// Floods the background from the cells, first come, first served; where two basins meet stands a dam of one pixel.
int32_t watershed(const uint8_t *cells, int64_t height, int64_t width, int32_t *basins, Scratch &s) {
  const int64_t size = height * width;
  std::vector<int64_t> &queue = s.queue;
  const int32_t found = unet::label(cells, width, static_cast<int32_t>(height), static_cast<int32_t>(width), false,
                                    basins, s.components);
  if (found == 0) {
    std::fill(basins, basins + size, 1); // a plain without a source is one basin
    return 1;
  }
  const auto with_neighbours = [&](int64_t y, int64_t x, auto visit) {
    if (y > 0) visit((y - 1) * width + x);
    if (x + 1 < width) visit(y * width + x + 1);
    if (y + 1 < height) visit((y + 1) * width + x);
    if (x > 0) visit(y * width + x - 1);
  };
  for (int64_t p = 0; p < size; ++p)
    if (!cells[p]) basins[p] = kDry;
  queue.clear();
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t y = 0; y < height; ++y) {
      if (cells[y * width + x]) continue;
      bool shore = false;
      with_neighbours(y, x, [&](int64_t q) { shore = shore || cells[q]; });
      if (!shore) continue;
      basins[y * width + x] = kQueued;
      queue.push_back(y * width + x);
    }
  }
  for (size_t next = 0; next < queue.size(); ++next) {
    const int64_t p = queue[next];
    int32_t basin = 0; // one between dams is a dam
    bool met = false;
    with_neighbours(p / width, p % width, [&](int64_t q) {
      if (basins[q] == kDry) {
        basins[q] = kQueued;
        queue.push_back(q);
      } else if (basins[q] > 0) {
        met = met || (basin > 0 && basins[q] != basin);
        basin = basins[q];
      }
    });
    basins[p] = met ? 0 : basin;
  }
  return found;
}

double n_log_n(int64_t n) { return n > 1 ? static_cast<double>(n) * std::log(static_cast<double>(n)) : 0.0; }

// the sums of one slice, with segment 0 taken as so many segments of one pixel
void add_up(const int32_t *truth, int64_t height, int64_t width, int32_t segment_count, Scratch &s, int64_t *squares,
            double *logs) {
  s.runs.clear();
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width;) {
      const int64_t at = y * width + x;
      int64_t length = 1;
      while (x + length < width && truth[at + length] == truth[at] && s.segments[at + length] == s.segments[at]) ++length;
      if (truth[at] > 0)
        s.runs.emplace_back(static_cast<uint64_t>(truth[at]) << 32 | static_cast<uint32_t>(s.segments[at]), length);
      x += length;
    }
  }
  std::sort(s.runs.begin(), s.runs.end());
  s.of_segment.assign(static_cast<size_t>(segment_count) + 1, 0);
  int64_t pixels = 0, singles = 0, joint = 0, truth_squares = 0;
  double joint_logs = 0, truth_logs = 0;
  for (size_t i = 0; i < s.runs.size();) {
    const uint64_t cell = s.runs[i].first >> 32;
    int64_t of_cell = 0;
    while (i < s.runs.size() && s.runs[i].first >> 32 == cell) {
      const uint64_t pair = s.runs[i].first;
      int64_t n = 0;
      for (; i < s.runs.size() && s.runs[i].first == pair; ++i) n += s.runs[i].second;
      of_cell += n;
      const uint32_t segment = static_cast<uint32_t>(pair);
      if (segment == 0) {
        singles += n;
      } else {
        s.of_segment[segment] += n;
        joint += n * n;
        joint_logs += n_log_n(n);
      }
    }
    pixels += of_cell;
    truth_squares += of_cell * of_cell;
    truth_logs += n_log_n(of_cell);
  }
  int64_t segment_squares = singles;
  double segment_logs = 0;
  for (const int64_t n : s.of_segment) {
    segment_squares += n * n;
    segment_logs += n_log_n(n);
  }
  squares[0] = pixels;
  squares[1] = truth_squares;
  squares[2] = segment_squares;
  squares[3] = joint + singles;
  logs[0] = truth_logs;
  logs[1] = segment_logs;
  logs[2] = joint_logs;
}

} // namespace

int32_t unet_watershed_cells_cpu(const uint8_t *mask, int64_t count, int64_t height, int64_t width, int32_t *basins) {
  return unet::for_each_task<Scratch>(count, [&](int64_t slice, Scratch &s) {
    const int64_t at = slice * height * width;
    watershed(mask + at, height, width, basins + at, s);
  });
}

int32_t unet_rand_sums_cpu(const float *prediction, const int32_t *truth, int64_t count, int64_t height, int64_t width,
                           const double *thresholds, int64_t threshold_count, int32_t thinned, int64_t *squares,
                           double *logs) {
  const int64_t size = height * width;
  return unet::for_each_task<Scratch>(count * threshold_count, [&](int64_t task, Scratch &s) {
    const int64_t at = task % count * size;
    const double threshold = thresholds[task / count];
    s.cells.resize(static_cast<size_t>(size));
    s.segments.resize(static_cast<size_t>(size));
    for (int64_t p = 0; p < size; ++p)
      s.cells[p] = truth[at + p] >= 0 && static_cast<double>(prediction[at + p]) > threshold;
    const int32_t segment_count =
        thinned ? watershed(s.cells.data(), height, width, s.segments.data(), s)
                : unet::label(s.cells.data(), width, static_cast<int32_t>(height), static_cast<int32_t>(width), false,
                              s.segments.data(), s.components);
    add_up(truth + at, height, width, segment_count, s, squares + task * 4, logs + task * 3);
  });
}
