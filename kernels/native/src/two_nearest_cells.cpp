// Exact distances to the two nearest distinct cells of a label image, and their sum for Eq. 2. Separable: each column
// keeps, for every row, its two nearest distinct ids (that two are enough is proven in docs/mathematics.md, section 5);
// then each pixel looks along its row, outward, until no column further out can improve it, or Eq. 2 has ended.
#include "threads.h"
#include "unet_native.h"

#include <cmath>
#include <cstddef>
#include <limits>
#include <new>
#include <vector>

namespace {

// an id of 0 is no cell and lies this far away; twice it does not overflow
constexpr int64_t kFar = int64_t{1} << 60;

struct Two {
  int64_t first = kFar, second = kFar; // squared distances
  int32_t id_first = 0, id_second = 0;

  void offer(int32_t id, int64_t squared) {
    if (id == id_first) {
      if (squared < first) first = squared;
    } else if (squared < first) {
      second = first;
      id_second = id_first;
      first = squared;
      id_first = id;
    } else if (squared < second) {
      second = squared;
      id_second = id;
    }
  }
};

// the last two distinct ids met on the way along a column, each with the row where it was met last
struct Met {
  int32_t id1 = 0, id2 = 0;
  int64_t row1 = 0, row2 = 0;

  void meet(int32_t id, int64_t row) {
    if (id <= 0) return;
    if (id != id1) {
      id2 = id1;
      row2 = row1;
      id1 = id;
    }
    row1 = row;
  }
  void offer_to(Two &two, int64_t row) const {
    if (id1 > 0) two.offer(id1, (row - row1) * (row - row1));
    if (id2 > 0) two.offer(id2, (row - row2) * (row - row2));
  }
};

float distance(int64_t squared, double reach) {
  if (squared >= kFar || static_cast<double>(squared) > reach) return std::numeric_limits<float>::infinity();
  return static_cast<float>(std::sqrt(static_cast<double>(squared)));
}

// `row(y, columns of that row)` is called for every row of the image, by whatever thread
template <typename Row>
void one_image(const int32_t *ids, int64_t height, int64_t width, std::vector<Two> &columns, const Row &row) {
#pragma omp parallel if (unet::may_share_work())
  {
    // blocks of columns, so that rows are read in runs and no two threads share a column
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (width + 63) / 64; ++block) {
      const int64_t begin = block * 64, end = begin + 64 < width ? begin + 64 : width;
      Met met[64];
      for (int64_t y = 0; y < height; ++y) {
        for (int64_t x = begin; x < end; ++x) {
          Two &two = columns[static_cast<size_t>(y * width + x)];
          two = Two{};
          met[x - begin].meet(ids[y * width + x], y);
          met[x - begin].offer_to(two, y);
        }
      }
      for (int64_t i = 0; i < 64; ++i) met[i] = Met{};
      for (int64_t y = height - 1; y >= 0; --y) {
        for (int64_t x = begin; x < end; ++x) {
          met[x - begin].meet(ids[y * width + x], y);
          met[x - begin].offer_to(columns[static_cast<size_t>(y * width + x)], y);
        }
      }
    }
#pragma omp for schedule(dynamic, 8)
    for (int64_t y = 0; y < height; ++y) row(y, columns.data() + y * width);
  }
}

// what column x + dx and column x - dx of a row offer to pixel x
void look(const Two *row, int64_t width, int64_t x, int64_t dx, Two &best) {
  for (const int64_t from : {x - dx, x + dx}) {
    if (from < 0 || from >= width) continue;
    const Two &there = row[from];
    if (there.first < kFar) best.offer(there.id_first, there.first + dx * dx);
    if (there.second < kFar) best.offer(there.id_second, there.second + dx * dx);
  }
}

// 0, 1, or 2 for more: nobody looks for a cell that is not there
int how_many(const int32_t *ids, int64_t size) {
  int32_t first = 0;
  for (int64_t p = 0; p < size; ++p) {
    if (ids[p] <= 0 || ids[p] == first) continue;
    if (first) return 2;
    first = ids[p];
  }
  return first ? 1 : 0;
}

bool touches(const int32_t *ids, int64_t height, int64_t width, int64_t y, int64_t x) {
  const int32_t *at = ids + y * width + x;
  const auto other = [&](int32_t id) { return id > 0 && id != *at; };
  return *at > 0 && ((y > 0 && other(at[-width])) || (y + 1 < height && other(at[width])) ||
                     (x > 0 && other(at[-1])) || (x + 1 < width && other(at[1])));
}

} // namespace

int32_t unet_two_nearest_cells_cpu(const int32_t *instances, int64_t count, int64_t height, int64_t width,
                                   double max_radius, float *d1, float *d2) {
  const double reach = max_radius * max_radius;
  // ids that a bounded search can reach lie in this many columns to each side
  const int64_t furthest =
      max_radius < static_cast<double>(width) ? static_cast<int64_t>(std::floor(max_radius)) : width;
  try {
    std::vector<Two> columns(static_cast<size_t>(height * width));
    for (int64_t n = 0; n < count; ++n) {
      const int64_t image = n * height * width;
      const int cells = how_many(instances + image, height * width);
      one_image(instances + image, height, width, columns, [&](int64_t y, const Two *row) {
        for (int64_t x = 0; x < width; ++x) {
          Two best = row[x];
          for (int64_t dx = 1; cells && dx <= furthest && dx * dx < (cells > 1 ? best.second : best.first); ++dx) {
            if (x - dx < 0 && x + dx >= width) break;
            look(row, width, x, dx, best);
          }
          d1[image + y * width + x] = distance(best.first, reach);
          d2[image + y * width + x] = distance(best.second, reach);
        }
      });
    }
  } catch (const std::bad_alloc &) {
    return UNET_OUT_OF_MEMORY;
  }
  return UNET_OK;
}

int32_t unet_border_sum_cpu(const int32_t *instances, int64_t count, int64_t height, int64_t width, float limit,
                            int32_t everywhere, int32_t gap, float *sum) {
  constexpr float kNone = std::numeric_limits<float>::infinity();
  const double all = std::numeric_limits<double>::infinity();
  try {
    std::vector<Two> columns(static_cast<size_t>(height * width));
    for (int64_t n = 0; n < count; ++n) {
      const int32_t *ids = instances + n * height * width;
      float *out = sum + n * height * width;
      one_image(ids, height, width, columns, [&](int64_t y, const Two *row) {
        for (int64_t x = 0; x < width; ++x) {
          const int32_t here = ids[y * width + x];
          const bool wanted =
              here == 0 || (here > 0 && (everywhere || (gap && touches(ids, height, width, y, x))));
          float found = kNone;
          if (wanted) {
            Two best = row[x];
            float near = distance(best.first, all);
            for (int64_t dx = 1; dx * dx < best.second; ++dx) {
              if (x - dx < 0 && x + dx >= width) break;
              // what is still to be found lies dx away at least
              const float step = static_cast<float>(dx);
              if ((near < step ? near : step) + step > limit) break;
              const int64_t before = best.first;
              look(row, width, x, dx, best);
              if (best.first != before) near = distance(best.first, all);
            }
            found = near + distance(best.second, all);
          }
          out[y * width + x] = found > limit ? kNone : found;
        }
      });
    }
  } catch (const std::bad_alloc &) {
    return UNET_OUT_OF_MEMORY;
  }
  return UNET_OK;
}
