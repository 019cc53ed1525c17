// lanes: the vector work of a block of ROWS driven vectors by COLS bitlines. Vectors run along the rows, so that
// one Philox counter a lane makes the noise of neighbouring columns where it is needed, without a shuffle.
#pragma once
#include "draw.hpp"
#include "wide.hpp"

namespace gpuxbar {

constexpr int ROWS = 64;  // driven vectors of a block; whole lines of most images
constexpr int COLS = 16;  // bitlines of a panel; a multiple of the columns of a counter
#if defined(__AVX512F__)
constexpr int MICRO = 8, DEEP = 2;  // columns and vectors of the register tile
constexpr int TURNS = 1;            // vectors of counters drawn in turns
#else
constexpr int MICRO = 4, DEEP = 3;
constexpr int TURNS = 2;
#endif
constexpr int VECTORS = ROWS / LANES;
static_assert(ROWS % (TURNS * LANES) == 0 && COLS % MICRO == 0 && COLS % 8 == 0);

// A plane of a block: [COLS][ROWS].
struct alignas(64) Plane {
  float at[COLS * ROWS];
};

// What drives a block's rows: vector v of those on wordline k lies at a + line[k] + vector[v].
struct Rows {
  const float* a;
  const i64* line;
  i64 vector[VECTORS];
};

// c[j][i] = sum_k a[k][i] b[k][j] for V vectors of rows, from vector `first` on, and M columns. A function of
// its own has the registers for itself: among the caller's values, the loop would fetch its pointers anew at every step.
template <int M, int V>
__attribute__((noinline)) void multiply(i64 length, const Rows& rows, i64 first, const float* b, float* c) {
  const float* part[V];
  for (int v = 0; v < V; ++v) part[v] = rows.a + rows.vector[first + v];
  const i64* line = rows.line;
  const auto right = [=](i64 k, int v) { return part[v] + line[k]; };
  register_tile<LANES, M, V>(length, b, COLS, right, nullptr, 0, 1.0f, c, ROWS);
}

// Columns begin .. end - 1 of a block of `count` rows over `length` wordlines, M at a time, and then fewer.
template <int M = MICRO>
inline void multiply_block(i64 count, i64 begin, i64 end, i64 length, const Rows& rows, const float* b, Plane& c) {
  constexpr int V = M > 1 ? DEEP : VECTORS;  // fewer sums would wait for each other
  const i64 whole = end - (end - begin) % M;
  for (i64 i = 0; i < count && begin < whole; i += V * LANES)
    for (i64 j = begin; j < whole; j += M) {
      float* to = c.at + j * ROWS + i;
      if (V > 3 || count - i > (V - 1) * LANES)
        multiply<M, V>(length, rows, i / LANES, b + j, to);
      else if (V > 2 && count - i > LANES)
        multiply<M, 2>(length, rows, i / LANES, b + j, to);
      else
        multiply<M, 1>(length, rows, i / LANES, b + j, to);
    }
  if constexpr (M > 1) multiply_block<M / 2>(count, whole, end, length, rows, b, c);
}

// What all draws of one conversion share.
struct Draws {
  u32 third, step;  // the counter's third word: purpose and slot
  const WideKeys& keys;
};

// words[q][i]: word q of the counter of `group` and row `row + i`, in whole TURNS of vectors.
template <int ROUNDS>
inline void draw_words(const Draws& d, u32 group, u32 row, i64 rows, u32 (*words)[ROWS]) {
  for (i64 i = 0; i < rows; i += TURNS * LANES) {
    WideCounter c[2 * TURNS];
#pragma GCC unroll 4
    for (int n = 0; n < 2 * TURNS; ++n)
      c[n] = WideCounter{group + Wide{}, even_lanes() + (u64)(u32)(row + i + n / 2 * LANES + n % 2), d.third + Wide{},
                         d.step + Wide{}};
    philox_lanes<ROUNDS>(c, d.keys, words[0] + i, words[1] + i, words[2] + i, words[3] + i);
  }
}

// c[j][i] += deviation[j][i] z[j][i], or sigma z where `deviation` is null: standard normals z of columns
// begin .. end - 1 (whole counters around them) of a panel that starts at column `column`.
template <bool FAST>
inline void add_noise(const Draws& d, u32 column, u32 row, i64 rows, i64 begin, i64 end, float sigma,
                      const Plane* deviation, Plane& c) {
  constexpr int EACH = FAST ? 8 : 4, PAIRS = EACH / 2;  // columns and pairs of a counter
  alignas(64) u32 words[4][ROWS];
  const i64 lanes = (rows + LANES - 1) / LANES * LANES;
  for (i64 j = begin / EACH * EACH; j < end; j += EACH) {
    draw_words<FAST ? 7 : 10>(d, (column + (u32)j) / EACH, row, rows, words);
    for (int q = 0; q < PAIRS; ++q) {
      float* first = c.at + (j + 2 * q) * ROWS;
      if (!deviation) {
#pragma omp simd
        for (i64 i = 0; i < lanes; ++i) {
          const Pair z = pair_of<FAST>(words, q, i);
          first[i] = fma(sigma, z.a, first[i]);
          first[ROWS + i] = fma(sigma, z.b, first[ROWS + i]);
        }
      } else {
        const float* spread = deviation->at + (j + 2 * q) * ROWS;
#pragma omp simd
        for (i64 i = 0; i < lanes; ++i) {
          const Pair z = pair_of<FAST>(words, q, i);
          first[i] = fma(spread[i], z.a, first[i]);
          first[ROWS + i] = fma(spread[ROWS + i], z.b, first[ROWS + i]);
        }
      }
    }
  }
}

}  // namespace gpuxbar
