// The C++ library from C++: no framework, an exit code. Python compares every number with the specification
// (tests/unet_kernels); here each function meets odd sizes, for the sanitizers of `make native` to watch, and laws that
// need no second implementation. And the union-find that CUDA shares runs as a GPU would run it: on threads, atomically.
#include "../src/components.h"
#include "unet_native.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Mask = std::vector<uint8_t>;
using Ids = std::vector<int32_t>;

int failures = 0;

void expect(bool met, const char *what) {
  if (met) return;
  ++failures;
  std::printf("not so: %s\n", what);
}

struct Shape {
  int64_t count, height, width;
  size_t pixels() const { return static_cast<size_t>(count * height * width); }
};

const Shape kShapes[] = {{1, 1, 1},  {3, 1, 1},   {1, 1, 17}, {2, 17, 1},   {1, 2, 2},   {2, 3, 2}, {3, 5, 7},
                         {1, 16, 1}, {2, 31, 33}, {1, 64, 3}, {1, 257, 65}, {0, 5, 5},   {2, 0, 5}, {2, 5, 0}};
const double kDensities[] = {0.0, 0.05, 0.4, 0.6, 0.95, 1.0}; // the first and last: all background, all cell

Mask random_mask(const Shape &shape, double density, std::mt19937 &random) {
  std::bernoulli_distribution cell(density);
  Mask mask(shape.pixels());
  for (uint8_t &m : mask) m = cell(random);
  return mask;
}

// coarse steps, so that many pixels are equal and many lie on a threshold
std::vector<float> random_prediction(const Shape &shape, std::mt19937 &random) {
  std::uniform_int_distribution<int> step(0, 8);
  std::vector<float> prediction(shape.pixels());
  for (float &p : prediction) p = static_cast<float>(step(random)) / 8;
  return prediction;
}

// one slice: the place of the first pixel of each pixel's component, -1 outside
Ids roots_by_flood(const uint8_t *mask, int64_t height, int64_t width, bool corners) {
  Ids roots(static_cast<size_t>(height * width), -1);
  std::vector<int64_t> todo;
  for (int64_t start = 0; start < height * width; ++start) {
    if (!mask[start] || roots[static_cast<size_t>(start)] >= 0) continue;
    roots[static_cast<size_t>(start)] = static_cast<int32_t>(start);
    todo.assign(1, start);
    while (!todo.empty()) {
      const int64_t at = todo.back(), y = at / width, x = at % width;
      todo.pop_back();
      for (int64_t ny = std::max<int64_t>(0, y - 1); ny <= std::min(height - 1, y + 1); ++ny) {
        for (int64_t nx = std::max<int64_t>(0, x - 1); nx <= std::min(width - 1, x + 1); ++nx) {
          const size_t there = static_cast<size_t>(ny * width + nx);
          if (!mask[there] || roots[there] >= 0 || (!corners && ny != y && nx != x)) continue;
          roots[there] = static_cast<int32_t>(start);
          todo.push_back(ny * width + nx);
        }
      }
    }
  }
  return roots;
}

// 1, 2 .. in the order of first pixels
Ids numbered(const Ids &roots) {
  Ids ids(roots.size(), 0);
  int32_t found = 0;
  for (size_t p = 0; p < roots.size(); ++p)
    if (roots[p] >= 0) ids[p] = roots[p] == static_cast<int32_t>(p) ? ++found : ids[static_cast<size_t>(roots[p])];
  return ids;
}

Ids numbered_by_flood(const Mask &mask, const Shape &shape, bool corners) {
  Ids all;
  for (int64_t n = 0; n < shape.count; ++n) {
    const uint8_t *slice = mask.data() + n * shape.height * shape.width;
    const Ids one = numbered(roots_by_flood(slice, shape.height, shape.width, corners));
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

template <class Test> void with_random_masks(Test test) {
  std::mt19937 random(20150518);
  for (const Shape &shape : kShapes)
    for (const double density : kDensities) test(shape, random_mask(shape, density, random), random);
}

// ---- what the library says of itself

void it_says_what_it_is() {
  expect(unet_abi_version() == UNET_ABI_VERSION, "library and header agree about the ABI");
  expect(unet_thread_count() >= 1, "there is a thread");
  expect(std::strlen(unet_processor()) > 0, "there is a processor");
  expect(std::strlen(unet_build_info()) > 0, "the build says what it is");
}

// ---- each function

void distances_are_distances() {
  const int32_t row[4] = {1, 0, 0, 7};
  float near[4], next[4];
  expect(unet_two_nearest_cells_cpu(row, 1, 1, 4, INFINITY, near, next) == UNET_OK, "two_nearest_cells has memory");
  expect(near[1] == 1 && next[1] == 2 && next[0] == 3, "distances along a row");
  with_random_masks([](const Shape &shape, const Mask &mask, std::mt19937 &random) {
    std::uniform_int_distribution<int32_t> id(-1, 4);
    Ids instances(mask.size());
    for (size_t p = 0; p < mask.size(); ++p) instances[p] = mask[p] ? id(random) : 0;
    for (const double radius : {0.0, 2.5, static_cast<double>(INFINITY)}) {
      std::vector<float> d1(mask.size(), -1), d2(mask.size(), -1);
      expect(unet_two_nearest_cells_cpu(instances.data(), shape.count, shape.height, shape.width, radius, d1.data(),
                                        d2.data()) == UNET_OK,
             "two_nearest_cells has memory");
      for (size_t p = 0; p < mask.size(); ++p) {
        expect((d1[p] == 0) == (instances[p] > 0), "a cell, and nothing else, is at no distance of itself");
        expect(d1[p] <= d2[p] && (std::isinf(d2[p]) || d2[p] <= radius), "near, then next, then nothing");
      }
    }
    std::vector<float> d1(mask.size()), d2(mask.size()), sum(mask.size(), -1);
    unet_two_nearest_cells_cpu(instances.data(), shape.count, shape.height, shape.width, INFINITY, d1.data(), d2.data());
    for (const float limit : {0.0f, 4.0f, 1e9f}) {
      for (const int32_t everywhere : {0, 1}) {
        expect(unet_border_sum_cpu(instances.data(), shape.count, shape.height, shape.width, limit, everywhere, 0,
                                   sum.data()) == UNET_OK,
               "border_sum has memory");
        for (size_t p = 0; p < mask.size(); ++p) {
          const bool there = instances[p] == 0 || (everywhere && instances[p] > 0);
          const bool counts = there && d1[p] + d2[p] <= limit;
          expect(counts ? sum[p] == d1[p] + d2[p] : std::isinf(sum[p]), "the sum of both, or nothing");
        }
      }
    }
  });
}

void components_are_those_of_a_flood() {
  with_random_masks([](const Shape &shape, const Mask &mask, std::mt19937 &) {
    for (const int connectivity : {4, 8}) {
      Ids ids(mask.size(), -9);
      expect(unet_connected_components_cpu(mask.data(), shape.count, shape.height, shape.width, connectivity,
                                           ids.data()) == UNET_OK,
             "connected_components has memory");
      expect(ids == numbered_by_flood(mask, shape, connectivity == 8), "components are those of a flood");
    }
  });
}

void basins_are_cells_grown_and_kept_apart() {
  with_random_masks([](const Shape &shape, const Mask &mask, std::mt19937 &) {
    Ids basins(mask.size(), -9);
    expect(unet_watershed_cells_cpu(mask.data(), shape.count, shape.height, shape.width, basins.data()) == UNET_OK,
           "watershed_cells has memory");
    const Ids cells = numbered_by_flood(mask, shape, false);
    const size_t size = static_cast<size_t>(shape.height * shape.width), width = static_cast<size_t>(shape.width);
    for (size_t first = 0; size && first < mask.size(); first += size) {
      const int32_t found = *std::max_element(cells.begin() + first, cells.begin() + first + size);
      for (size_t p = 0; p < size; ++p) {
        const int32_t basin = basins[first + p];
        expect(found ? basin >= 0 && basin <= found : basin == 1, "a basin for each cell, or one for all");
        expect(!mask[first + p] || basin == cells[first + p], "a cell lies in its basin");
        const auto apart = [&](size_t before) {
          const int32_t other = basins[first + before];
          expect(basin == other || basin == 0 || other == 0, "a dam between any two basins");
        };
        if (p % width) apart(p - 1);
        if (p >= width) apart(p - width);
      }
    }
  });
}

const double kThresholds[] = {-1.0, 0.25, 0.5, 2.0}; // all is cell, some, some, nothing is
constexpr int64_t kThresholdCount = 4;

void what_a_warp_leaves_is_counted_as_it_is_drawn() {
  with_random_masks([](const Shape &shape, const Mask &truth, std::mt19937 &random) {
    const auto prediction = random_prediction(shape, random);
    const Mask counted = random_mask(shape, 0.9, random);
    for (const int64_t radius : {int64_t{1}, int64_t{3}, INT64_MAX}) {
      for (const int64_t threshold_count : {int64_t{0}, int64_t{1}, kThresholdCount}) {
        const size_t tasks = static_cast<size_t>(threshold_count * shape.count);
        const size_t size = static_cast<size_t>(shape.height * shape.width);
        std::vector<int64_t> counts(tasks * UNET_KINDS, -9), alone = counts;
        Mask kinds(tasks * size, 99);
        for (uint8_t *drawn : {kinds.data(), static_cast<uint8_t *>(nullptr)}) {
          expect(unet_homotopic_warp_cpu(prediction.data(), truth.data(), counted.data(), shape.count, shape.height,
                                         shape.width, kThresholds, threshold_count, radius,
                                         drawn ? counts.data() : alone.data(), drawn) == UNET_OK,
                 "homotopic_warp has memory");
        }
        // an empty vector's data may be the null pointer too: then neither call draws
        if (!kinds.empty()) expect(counts == alone, "counts do not depend on the drawing");
        for (size_t task = 0; task < tasks && size; ++task) {
          std::vector<int64_t> drawn(UNET_KINDS, 0);
          const size_t from = task % static_cast<size_t>(shape.count) * size;
          for (size_t p = 0; p < size; ++p) {
            const uint8_t kind = kinds[task * size + p];
            expect(kind < UNET_KINDS && (kind == 0 || counted[from + p]), "a kind, where it counts");
            if (kind && kind < UNET_KINDS) ++drawn[kind];
          }
          expect(std::equal(drawn.begin(), drawn.end(), counts.begin() + static_cast<int64_t>(task) * UNET_KINDS),
                 "counts are those of the drawing");
        }
      }
    }
  });
}

void a_truth_warped_towards_itself_leaves_nothing() {
  with_random_masks([](const Shape &shape, const Mask &truth, std::mt19937 &) {
    const std::vector<float> prediction(truth.begin(), truth.end());
    const Mask counted(truth.size(), 1);
    const double threshold = 0.5;
    std::vector<int64_t> counts(static_cast<size_t>(shape.count) * UNET_KINDS, -9);
    unet_homotopic_warp_cpu(prediction.data(), truth.data(), counted.data(), shape.count, shape.height, shape.width,
                            &threshold, 1, 20, counts.data(), nullptr);
    expect(std::all_of(counts.begin(), counts.end(), [](int64_t c) { return c == 0; }), "nothing is wrong with itself");
  });
}

void overlaps_add_up() {
  with_random_masks([](const Shape &shape, const Mask &mask, std::mt19937 &random) {
    const auto prediction = random_prediction(shape, random);
    const int32_t names[] = {-7, 1, 3, 70000, std::numeric_limits<int32_t>::max()};
    std::uniform_int_distribution<size_t> name(0, 4);
    Ids truth(mask.size());
    for (size_t p = 0; p < mask.size(); ++p) truth[p] = mask[p] ? names[name(random)] : 0;
    for (const int32_t thinned : {0, 1}) {
      const size_t tasks = static_cast<size_t>(kThresholdCount * shape.count);
      const size_t size = static_cast<size_t>(shape.height * shape.width);
      std::vector<int64_t> squares(tasks * 4, -9);
      std::vector<double> logs(tasks * 3, -9);
      expect(unet_rand_sums_cpu(prediction.data(), truth.data(), shape.count, shape.height, shape.width, kThresholds,
                                kThresholdCount, thinned, squares.data(), logs.data()) == UNET_OK,
             "rand_sums has memory");
      for (size_t task = 0; task < tasks; ++task) {
        const auto first = truth.begin() + static_cast<int64_t>(task % static_cast<size_t>(shape.count) * size);
        const int64_t *of = squares.data() + task * 4;
        expect(of[0] == std::count_if(first, first + static_cast<int64_t>(size), [](int32_t t) { return t > 0; }),
               "the pixels of the cells");
        expect(of[0] <= of[3] && of[3] <= std::min(of[1], of[2]) && std::max(of[1], of[2]) <= of[0] * of[0],
               "parts are no larger than what they are parts of");
        expect(logs[task * 3 + 2] <= std::min(logs[task * 3], logs[task * 3 + 1]) * (1 + 1e-12), "nor are their logs");
      }
    }
  });
}

// ---- the warp

// An image and labels of a shape, and a map to another size: as it is, by some pixels, or far away and shrunk.
struct Warped {
  unet_warp warp{};
  std::vector<float> image, displacement, matrix, table, out, dout, dimage, du;
  std::vector<uint16_t> labels, warped;
  std::vector<double> dmatrix;

  Warped(const Shape &shape, int64_t height, int64_t width, int32_t order, float strength, std::mt19937 &random) {
    std::uniform_real_distribution<float> grey(0, 1);
    std::normal_distribution<float> normal;
    const int64_t channels = 2, pixels = shape.height * shape.width;
    image.resize(static_cast<size_t>(shape.count * channels * pixels));
    for (float &v : image) v = grey(random);
    labels.resize(static_cast<size_t>(shape.count * pixels));
    for (uint16_t &v : labels) v = static_cast<uint16_t>(1 + random() % 5);
    displacement.resize(static_cast<size_t>(shape.count * 2 * 3 * 2));
    for (float &v : displacement) v = strength * normal(random);
    matrix.resize(static_cast<size_t>(shape.count * 6));
    for (float &v : matrix) v = strength * normal(random);
    table = {0.0f, 0.2f, 1.5f, 1.0f};
    const size_t out_pixels = static_cast<size_t>(shape.count * height * width);
    out.resize(out_pixels * channels);
    dout.resize(out.size());
    for (float &v : dout) v = normal(random);
    warped.resize(out_pixels);
    dimage.resize(image.size());
    du.resize(out_pixels * 2);
    dmatrix.resize(static_cast<size_t>(shape.count * 6));
    warp.image = image.data();
    warp.labels = labels.data();
    warp.displacement = displacement.data();
    warp.count = shape.count;
    warp.channels = channels;
    warp.height = shape.height;
    warp.width = shape.width;
    warp.grid_height = 3;
    warp.grid_width = 2;
    warp.out_height = height;
    warp.out_width = width;
    const int64_t strides[4] = {channels * pixels, pixels, shape.width, 1};
    std::copy(strides, strides + 4, warp.image_stride);
    const int64_t label_strides[3] = {pixels, shape.width, 1};
    std::copy(label_strides, label_strides + 3, warp.label_stride);
    warp.entries = 4;
    warp.pixel = UNET_FLOAT32;
    warp.label_bytes = 2;
    warp.order = order;
  }
  bool forward() { return unet_elastic_warp_cpu(&warp, out.data(), warped.data()) == UNET_OK; }
  bool backward() {
    return unet_elastic_warp_backward_cpu(&warp, dout.data(), dimage.data(), du.data(), dmatrix.data()) == UNET_OK;
  }
};

double product(const std::vector<float> &a, const std::vector<float> &b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

template <class Test> void on_each_processor(Test test) {
  for (const char *name : {"baseline", "avx2", "avx512"}) {
    setenv("UNET_PROCESSOR", name, 1);
    // where there is one
    if (!std::strcmp(unet_processor(), name)) test();
  }
  unsetenv("UNET_PROCESSOR");
}

void a_warp_is_what_its_laws_say() {
  std::mt19937 random(7);
  for (const Shape &shape : kShapes) {
    if (shape.height == 0 || shape.width == 0) continue; // no image has no pixel
    for (const int32_t order : {1, 3}) {
      Warped still(shape, shape.height, shape.width, order, 0.0f, random);
      on_each_processor([&] {
        expect(still.forward(), "elastic_warp has memory");
        expect(still.out == still.image && still.warped == still.labels, "no displacement changes nothing");
      });
      for (const float strength : {0.5f, 40.0f}) {
        for (const bool affine : {false, true}) {
          // more than a block, or a few pixels that read far from each other
          const bool near = strength < 1;
          Warped moved(shape, near ? 33 : 5, near ? 66 : 7, order, strength, random);
          if (affine) moved.warp.matrix = moved.matrix.data();
          std::vector<float> first;
          on_each_processor([&] {
            expect(moved.forward() && moved.backward(), "elastic_warp has memory");
            expect(std::all_of(moved.warped.begin(), moved.warped.end(), [](uint16_t v) { return v >= 1 && v <= 5; }),
                   "no label is invented");
            // the image's gradient is the transpose of the warp
            const double there = product(moved.out, moved.dout), back = product(moved.image, moved.dimage);
            expect(std::abs(there - back) <= 1e-3 * (1 + std::sqrt(product(moved.dout, moved.dout))),
                   "the transpose of the warp");
            if (first.empty()) first = moved.out;
            expect(first == moved.out, "the same bits on every processor");
          });
          moved.warp.table = moved.table.data();
          expect(moved.forward() && moved.backward(), "elastic_warp has memory");
          expect(std::all_of(moved.out.begin(), moved.out.end(), [](float v) { return v >= 0.0f && v <= 1.5f; }),
                 "grey values are the table's");
          // each gradient alone is what it is with the others
          const std::vector<float> dimage = moved.dimage, du = moved.du;
          const std::vector<double> dmatrix = moved.dmatrix;
          std::fill(moved.du.begin(), moved.du.end(), 0.0f);
          std::fill(moved.dimage.begin(), moved.dimage.end(), 0.0f);
          unet_elastic_warp_backward_cpu(&moved.warp, moved.dout.data(), moved.dimage.data(), nullptr, nullptr);
          unet_elastic_warp_backward_cpu(&moved.warp, moved.dout.data(), nullptr, moved.du.data(), nullptr);
          unet_elastic_warp_backward_cpu(&moved.warp, moved.dout.data(), nullptr, nullptr, moved.dmatrix.data());
          expect(dimage == moved.dimage && du == moved.du && dmatrix == moved.dmatrix, "gradients one by one");
        }
      }
    }
  }
}

void what_is_no_number_reads_inside_the_image() {
  std::mt19937 random(8);
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY, 3e38f, -5e9f}) {
    for (const int32_t order : {1, 3}) {
      Warped moved({1, 9, 11}, 20, 13, order, 1.0f, random);
      moved.displacement[4] = bad;
      on_each_processor([&] {
        expect(moved.forward() && moved.backward(), "elastic_warp has memory");
        expect(std::all_of(moved.warped.begin(), moved.warped.end(), [](uint16_t v) { return v >= 1 && v <= 5; }),
               "no label is invented");
      });
    }
  }
}

// ---- the union-find as a GPU runs it

struct AtomicMemory {
  static int32_t read(const int32_t *parent) { return __atomic_load_n(parent, __ATOMIC_RELAXED); }
  static int32_t lower(int32_t *parent, int32_t to) {
    std::this_thread::yield(); // between a root's finding and its lowering is where another may come in
    int32_t before = read(parent);
    while (to < before &&
           !__atomic_compare_exchange_n(parent, &before, to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return before;
  }
};

// Threads seldom meet on few cores. Here they always do: before a step lowers a parent, the next steps run to their end.
struct InterruptedMemory {
  static inline std::function<void()> others;
  static int32_t read(const int32_t *parent) { return *parent; }
  static int32_t lower(int32_t *parent, int32_t to) {
    others();
    return unet::PlainMemory::lower(parent, to);
  }
};

struct Merging {
  const Mask &mask;
  Ids &parents;
  int32_t width;
  bool corners;
  Ids order; // of the pixels

  Merging(const Mask &m, Ids &p, int32_t w, bool c, std::mt19937 &random)
      : mask(m), parents(p), width(w), corners(c), order(m.size()) {
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::shuffle(order.begin(), order.end(), random);
  }
  template <class Memory> void step(size_t i) const {
    unet::merge<Memory>(mask.data(), parents.data(), order[i], width, corners);
  }

  // dealt to threads that begin together
  void on_threads(size_t threads) const {
    size_t waiting = threads;
    std::vector<std::thread> running;
    for (size_t t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        __atomic_sub_fetch(&waiting, 1, __ATOMIC_ACQ_REL);
        while (__atomic_load_n(&waiting, __ATOMIC_ACQUIRE)) std::this_thread::yield();
        for (size_t i = t; i < order.size(); i += threads) step<AtomicMemory>(i);
      });
    }
    for (std::thread &thread : running) thread.join();
  }

  // each step interrupted by others, and those again, up to so many at a time
  void interrupted(int most) const {
    size_t next = 0;
    int nested = 0;
    InterruptedMemory::others = [&] {
      if (nested == most || next == order.size()) return;
      ++nested;
      step<InterruptedMemory>(next++);
      --nested;
    };
    while (next < order.size()) step<InterruptedMemory>(next++);
  }
};

// one winding path: its root is as far as can be from its end
Mask snake(int64_t height, int64_t width) {
  Mask mask(static_cast<size_t>(height * width), 0);
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x)
      mask[static_cast<size_t>(y * width + x)] = y % 2 == 0 || x == (y % 4 == 1 ? width - 1 : 0);
  }
  return mask;
}

void the_order_of_merges_does_not_matter() {
  std::mt19937 random(3);
  for (const auto &[height, width] : {std::pair<int32_t, int32_t>{1, 40}, {40, 1}, {2, 2}, {13, 17}, {64, 48}}) {
    for (const double density : {0.3, 0.5, 0.6, 0.7, 1.0, -1.0}) {
      const Mask mask = density < 0 ? snake(height, width) : random_mask({1, height, width}, density, random);
      for (const bool corners : {false, true}) {
        const Ids want = roots_by_flood(mask.data(), height, width, corners);
        for (const int crowd : {1, 2, 4, 50}) {
          for (const bool on_threads : {false, true}) {
            if (on_threads && crowd > 4) continue;
            Ids parents(mask.size());
            for (int32_t p = 0; p < height * width; ++p) unet::begin(mask.data(), parents.data(), p);
            const Merging merging(mask, parents, width, corners, random);
            if (on_threads)
              merging.on_threads(static_cast<size_t>(crowd));
            else
              merging.interrupted(crowd);
            for (int32_t p = 0; p < height * width; ++p) {
              const int32_t parent = parents[static_cast<size_t>(p)];
              expect(parent <= p, "a parent lies at or before its pixel");
              const int32_t root = parent == unet::kNoParent ? parent : unet::root_of<AtomicMemory>(parents.data(), p);
              expect(root == want[static_cast<size_t>(p)],
                     on_threads ? "roots are first pixels, on threads" : "roots are first pixels, interrupted");
            }
          }
        }
      }
    }
  }
}

} // namespace

int main() {
  it_says_what_it_is();
  distances_are_distances();
  components_are_those_of_a_flood();
  basins_are_cells_grown_and_kept_apart();
  what_a_warp_leaves_is_counted_as_it_is_drawn();
  a_truth_warped_towards_itself_leaves_nothing();
  overlaps_add_up();
  a_warp_is_what_its_laws_say();
  what_is_no_number_reads_inside_the_image();
  the_order_of_merges_does_not_matter();
  std::printf("%s, %d threads: %d failures\n", unet_build_info(), unet_thread_count(), failures);
  return failures != 0;
}
