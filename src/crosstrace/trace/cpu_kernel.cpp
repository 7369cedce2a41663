// Sums over examples of functions of their gradients of a linear layer, on a CPU: see cpu_kernel.py for what is
// computed.
//
// The gradient of example b on a parameter [R, K] is G_b = sum_t left[b, t]^T right[b, t]. A tile of G_b, ROWS by
// some vectors, is multiplied in registers; |G_b|, G_b^2 and G_b are added to the sums from there, so that
// nothing but the sums is ever written to memory. Both factors are copied first to the order in which the tiles read
// them, without positions where the output's gradient is zero: those of padding, and those behind the last target.
//
// The file needs no header but the standard ones: it compiles in seconds with any GCC or Clang. Vectors are the
// compiler's own types, so the same source serves AVX-512, AVX2, SSE and NEON; only products of bfloat16 are AVX-512's
// alone (elsewhere they are widened while they are copied).

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define PAIRS 1
#else
#define PAIRS 0
#endif
#if defined(_OPENMP)
extern "C" int omp_get_thread_num(void);
#endif

namespace {

// ROWS of a tile: with more, a product waits less for the one before it, until the registers are full.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 5;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int VECTORS = 3;           // of a tile's row
constexpr int LINE = 64;             // bytes of a cache line
constexpr int64_t POSITIONS = 1536;  // of the factors that are held packed, unless one example has more: L2
constexpr int64_t CHUNK = 64 * ROWS; // rows that one thread takes at once
constexpr int64_t BLOCK = 8192;      // rows that are held packed, of a vocabulary's

typedef float vector __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t bits __attribute__((vector_size(LANES * 4)));

inline float widened(float x) { return x; }
inline float widened(uint16_t x) {
  uint32_t y = uint32_t(x) << 16;
  float z;
  std::memcpy(&z, &y, 4);
  return z;
}

template <class T> struct Freed {
  void operator()(T *p) const { std::free(p); }
};
template <class T> using Buffer = std::unique_ptr<T, Freed<T>>;
template <class T> Buffer<T> buffer(int64_t count) {
  size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  return Buffer<T>(static_cast<T *>(std::aligned_alloc(64, bytes)));
}

// A factor [B, T, N] whose last dimension is dense.
template <class In> struct Factor {
  const In *data;
  int64_t of_example, of_position;
  const In *at(int64_t example, int64_t position) const { return data + example * of_example + position * of_position; }
};

// What is added to, [R, K] each, or null.
struct Sums {
  float *sum, *abs, *square, *weighted;
  int64_t of_row;
};

// One step of the product: ROWS x V vectors += the outer product of the factors at one place of the packed order,
// which is one position, or two of bfloat16.
template <class Packed> struct Step;
template <> struct Step<float> {
  static inline void add(vector &sum, float x, vector y) { sum += x * y; }
};
#if PAIRS
template <> struct Step<uint32_t> {
  static inline void add(vector &sum, uint32_t x, vector y) {
    sum = (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)y);
  }
};
#endif

// One tile over the examples whose places are ends[0] to ends[1], ends[1] to ends[2], ...
template <class Packed, int V, bool SUM, bool ABS, bool SQUARE, bool WEIGHTED>
void tile(const Packed *left, const Packed *right, const std::vector<int64_t> &ends, const float *scale,
          const float *weights, const Sums &sums, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  vector total[ROWS][V] = {}, absolute[ROWS][V] = {}, squared[ROWS][V] = {}, weighted[ROWS][V] = {};
  for (size_t i = 0; i + 1 < ends.size(); i++) {
    vector g[ROWS][V] = {};
    for (int64_t p = ends[i]; p < ends[i + 1]; p++) {
      vector y[V];
      for (int v = 0; v < V; v++)
        y[v] = reinterpret_cast<const vector *>(right)[p * V + v];
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < V; v++)
          Step<Packed>::add(g[r][v], left[p * ROWS + r], y[v]);
    }
    float of_example = WEIGHTED ? weights[i] : 0;
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < V; v++) {
        if (scale)
          g[r][v] *= scale[i];
        if (SUM)
          total[r][v] += g[r][v];
        if (WEIGHTED)
          weighted[r][v] += of_example * g[r][v];
        if (ABS)
          absolute[r][v] += (vector)((bits)g[r][v] & 0x7fffffff);
        if (SQUARE)
          squared[r][v] += g[r][v] * g[r][v];
      }
  }
  auto store = [&](float *out, vector(&from)[ROWS][V]) {
    for (int r = 0; r < ROWS && row + r < rows; r++)
      for (int v = 0; v < V; v++) {
        float *to = out + (row + r) * sums.of_row + column + v * LANES;
        int64_t left_over = columns - column - v * LANES;
        if (left_over >= LANES)
          *reinterpret_cast<loose *>(to) += from[r][v];
        else
          for (int64_t k = 0; k < left_over; k++)
            to[k] += from[r][v][k];
      }
  };
  if (SUM)
    store(sums.sum, total);
  if (ABS)
    store(sums.abs, absolute);
  if (SQUARE)
    store(sums.square, squared);
  if (WEIGHTED)
    store(sums.weighted, weighted);
}

template <class Packed>
using Tile = void (*)(const Packed *, const Packed *, const std::vector<int64_t> &, const float *, const float *,
                      const Sums &, int64_t, int64_t, int64_t, int64_t);

template <class Packed, int V> Tile<Packed> tile_of(const Sums &s) {
#define CHOICE(a, b, c, d) tile<Packed, V, a, b, c, d>
#define CHOICES(a, b)                                                                                                  \
  {                                                                                                                    \
    CHOICE(a, b, 0, 0), CHOICE(a, b, 0, 1), CHOICE(a, b, 1, 0), CHOICE(a, b, 1, 1)                                     \
  }
  static const Tile<Packed> all[4][4] = {CHOICES(0, 0), CHOICES(0, 1), CHOICES(1, 0), CHOICES(1, 1)};
#undef CHOICES
#undef CHOICE
  return all[2 * bool(s.sum) + bool(s.abs)][2 * bool(s.square) + bool(s.weighted)];
}

// An example's positions that count, in the packed order: places of one position (or of two, the last perhaps none).
struct Places {
  std::vector<int64_t> example, position, second, ends;
};

// Columns `first` to `last` of a factor, in panels of `width` that lie one after the other; zeros fill the last up. The
// panels are written side by side, so that a cache line of the factor is read once.
// FIXED is the width where the compiler is to know it, else 0.
template <int FIXED, class In>
void pack(const Factor<In> &factor, const Places &places, int64_t first, int64_t last, int64_t any, const float *by,
          float *out) {
  const int64_t held = places.example.size(), width = FIXED ? FIXED : any;
  for (int64_t p = 0; p < held; p++) {
    const In *from = factor.at(places.example[p], places.position[p]);
    const float times = by ? by[p] : 1.0f;
    float *to = out + p * width;
    for (int64_t column = first; column < last; column += width, to += held * width) {
      if (FIXED && last - column >= FIXED) {
        for (int k = 0; k < FIXED; k++)
          to[k] = widened(from[column + k]) * times;
        continue;
      }
      const int64_t count = std::min(width, last - column);
      for (int64_t k = 0; k < count; k++)
        to[k] = widened(from[column + k]) * times;
      for (int64_t k = count; k < width; k++)
        to[k] = 0;
    }
  }
}

template <int FIXED>
void pack(const Factor<uint16_t> &factor, const Places &places, int64_t first, int64_t last, int64_t any, const float *,
          uint32_t *out) {
  const int64_t held = places.example.size(), width = FIXED ? FIXED : any;
  for (int64_t p = 0; p < held; p++) {
    const uint16_t *one = factor.at(places.example[p], places.position[p]);
    const bool paired = places.second[p] >= 0;
    const uint16_t *two = paired ? factor.at(places.example[p], places.second[p]) : one;
    const uint32_t mask = paired ? 0xffff0000u : 0;
    uint32_t *to = out + p * width;
    for (int64_t column = first; column < last; column += width, to += held * width) {
      if (FIXED && last - column >= FIXED) {
        for (int k = 0; k < FIXED; k++)
          to[k] = one[column + k] | (uint32_t(two[column + k]) << 16 & mask);
        continue;
      }
      const int64_t count = std::min(width, last - column);
      for (int64_t k = 0; k < count; k++)
        to[k] = one[column + k] | (uint32_t(two[column + k]) << 16 & mask);
      for (int64_t k = count; k < width; k++)
        to[k] = 0;
    }
  }
}

template <class In> bool is_zero(const In *x, int64_t count) {
  // (-0 counts as a number: that costs time, nothing else)
  for (int64_t k = 0; k < count; k += 64) {
    In any = 0;
    for (int64_t j = k; j < std::min(count, k + 64); j++)
      any = x[j] != 0 ? x[j] : any;
    if (any != 0)
      return false;
  }
  return true;
}

inline int number_of_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

struct Job {
  const int64_t *examples;
  const float *scale, *weights;
  int64_t count, positions, rows, columns;
  bool left_is_gradient;
  int threads;
};

// Whether there was memory for it.
template <class Packed, class Left, class Right>
bool run(const Factor<Left> &left, const Factor<Right> &right, const Job &job, const Sums &sums) {
  constexpr bool paired = sizeof(Left) == 2 && sizeof(Right) == 2 && !std::is_same<Packed, float>::value;
  const int64_t full = VECTORS * LANES; // columns of a tile
  const int64_t panels = (job.columns + full - 1) / full;
  const int64_t together = std::max<int64_t>(1, LINE / int64_t(sizeof(Left)) / ROWS); // tiles in a cache line of left
  const Tile<Packed> tiles[VECTORS] = {tile_of<Packed, 1>(sums), tile_of<Packed, 2>(sums), tile_of<Packed, 3>(sums)};

  int64_t done = 0;
  while (done < job.count) {
    // as many examples as are held packed at once
    Places places;
    places.ends.push_back(0);
    int64_t first = done;
    std::vector<float> by;
    for (; done < job.count && (done == first || int64_t(places.example.size()) + job.positions <= POSITIONS); done++) {
      int64_t example = job.examples[done];
      bool half = false;
      for (int64_t t = 0; t < job.positions; t++) {
        if (job.left_is_gradient ? is_zero(left.at(example, t), job.rows) : is_zero(right.at(example, t), job.columns))
          continue;
        if (paired && half) {
          places.second.back() = t;
          half = false;
          continue;
        }
        places.example.push_back(example);
        places.position.push_back(t);
        if (paired)
          places.second.push_back(-1);
        else
          by.push_back(job.scale ? job.scale[done] : 1.0f);
        half = paired;
      }
      places.ends.push_back(places.example.size());
    }
    const int64_t held = places.example.size();
    const float *scale = paired && job.scale ? job.scale + first : nullptr;
    const float *weights = job.weights ? job.weights + first : nullptr;
    for (int64_t start = 0; start < job.rows; start += BLOCK) {
      const int64_t end = std::min(start + BLOCK, job.rows), high = (end - start + ROWS - 1) / ROWS;
      const int64_t chunks = (end - start + CHUNK - 1) / CHUNK;
      Buffer<Packed> block = buffer<Packed>(high * ROWS * held);
      std::vector<Buffer<Packed>> spaces;
      for (int thread = 0; thread < job.threads; thread++)
        spaces.push_back(buffer<Packed>(full * held));
      if (!block || !std::all_of(spaces.begin(), spaces.end(), [](const Buffer<Packed> &x) { return bool(x); }))
        return false;

#pragma omp parallel num_threads(job.threads)
      {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < high; r += together)
          pack<ROWS>(left, places, start + r * ROWS, std::min(start + (r + together) * ROWS, end), ROWS, by.data(),
                     block.get() + r * ROWS * held);
        const Buffer<Packed> &panel = spaces[number_of_thread()];
        int64_t packed = -1;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < panels * chunks; item++) {
          const int64_t column = item / chunks * full, wide = std::min(full, job.columns - column);
          const int64_t vectors = (wide + LANES - 1) / LANES;
          if (packed != column)
            pack<0>(right, places, column, column + wide, vectors * LANES, nullptr, panel.get());
          packed = column;
          const int64_t top = start + item % chunks * CHUNK;
          for (int64_t row = top; row < std::min(top + CHUNK, end); row += ROWS)
            tiles[vectors - 1](block.get() + (row - start) * held, panel.get(), places.ends, scale, weights, sums, row,
                               job.rows, column, job.columns);
        }
      }
    }
  }
  return true;
}

} // namespace

extern "C" {

// All strides count elements. left_dtype, right_dtype: 0 float32, 1 bfloat16.
// 0: done; 1: there was no memory, and the sums may be incomplete.
int crosstrace_per_example_sums(const void *left, int left_dtype, int64_t left_b, int64_t left_t, const void *right,
                                int right_dtype, int64_t right_b, int64_t right_t, const int64_t *examples,
                                const float *scale, const float *weights, int64_t count, int64_t positions,
                                int64_t rows, int64_t columns, int left_is_gradient, int threads, float *sum,
                                float *abs, float *square, float *weighted, int64_t of_row) {
  Job job{examples, scale, weights, count, positions, rows, columns, bool(left_is_gradient), threads};
  Sums sums{sum, abs, square, weighted, of_row};
  Factor<float> left_float{static_cast<const float *>(left), left_b, left_t};
  Factor<float> right_float{static_cast<const float *>(right), right_b, right_t};
  Factor<uint16_t> left_half{static_cast<const uint16_t *>(left), left_b, left_t};
  Factor<uint16_t> right_half{static_cast<const uint16_t *>(right), right_b, right_t};
#if PAIRS
  if (left_dtype && right_dtype)
    return !run<uint32_t>(left_half, right_half, job, sums);
#endif
  if (left_dtype && right_dtype)
    return !run<float>(left_half, right_half, job, sums);
  else if (left_dtype)
    return !run<float>(left_half, right_float, job, sums);
  else if (right_dtype)
    return !run<float>(left_float, right_half, job, sums);
  else
    return !run<float>(left_float, right_float, job, sums);
}
}
