// What a merge of blocks is made of, of one matrix in a register-tiled kernel, or of a matrix in every vector lane: products,
// transposes, inverses.
#pragma once
#include <algorithm>
#include <cstring>

#include "wide.hpp"

namespace gpuxbar::blocks {

constexpr int LEAF = 8;  // cells along a leaf's side; every block is a multiple of it
constexpr int GROUP_WIDE = 4, GROUP_HIGH = LANES / GROUP_WIDE;  // leaves along the sides of a group
constexpr int LEAVES = LANES;
#if defined(__AVX512F__)
constexpr int WIDTH = 16, MICRO = 8;  // floats of a vector, rows of the register tile
constexpr int ACROSS = 4;             // columns of that of lanes
#else
constexpr int WIDTH = 8, MICRO = 4;
constexpr int ACROSS = 2;
#endif

typedef float Lane __attribute__((vector_size(4 * LEAVES)));  // one value of every leaf of a group

using LaneMemory = Floats<LEAVES>::Vec;

inline Lane load(const float* from) { return *(const LaneMemory*)from; }
inline void store(float* to, const Lane& x) { *(LaneMemory*)to = x; }

template <int STEP, int COLS>
void tile_column(i64 rows, i64 depth, const float* at, i64 lda, const float* b, i64 ldb, const float* c0, i64 ldc0,
                 float sign, float* c, i64 ldc) {
  constexpr int ROWS = COLS > 1 ? MICRO : 8;  // fewer sums would wait for each other
  for (i64 i = 0; i < rows; i += ROWS)
    register_tile<STEP, ROWS, COLS>(depth, at + i, lda, b, ldb, c0 ? c0 + i * ldc0 : nullptr, ldc0, sign, c + i * ldc,
                                    ldc);
}

// c = c0 + sign at' b: at [depth, rows], b [depth, cols]; rows and cols are multiples of 8. One copy of it: with its loops in
// line, a merge would not fit the cache of instructions.
__attribute__((noinline)) inline void product(i64 rows, i64 cols, i64 depth, const float* at, i64 lda, const float* b,
                                              i64 ldb, const float* c0, i64 ldc0, float sign, float* c, i64 ldc) {
  i64 j = 0;
  for (; j + 2 * WIDTH <= cols; j += 2 * WIDTH)
    tile_column<WIDTH, 2>(rows, depth, at, lda, b + j, ldb, c0 ? c0 + j : nullptr, ldc0, sign, c + j, ldc);
  for (; j + WIDTH <= cols; j += WIDTH)
    tile_column<WIDTH, 1>(rows, depth, at, lda, b + j, ldb, c0 ? c0 + j : nullptr, ldc0, sign, c + j, ldc);
  for (; j < cols; j += 8)
    tile_column<8, 1>(rows, depth, at, lda, b + j, ldb, c0 ? c0 + j : nullptr, ldc0, sign, c + j, ldc);
}

template <int ROWS, int COLS>
inline void lane_tile(i64 depth, const Lane* at, i64 lda, const Lane* b, i64 ldb, const Lane* c0, i64 ldc0, float sign,
                      Lane* c, i64 ldc) {
  Lane sum[ROWS][COLS] = {};
  for (i64 k = 0; k < depth; ++k, at += lda, b += ldb) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) sum[i][j] += at[i] * b[j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) c[i * ldc + j] = (c0 ? c0[i * ldc0 + j] : Lane{}) + sign * sum[i][j];
}

template <int ROWS, int COLS>
GPUXBAR_METHOD void lane_product(i64 rows, i64 cols, i64 depth, const Lane* at, i64 lda, const Lane* b, i64 ldb,
                                 const Lane* c0, i64 ldc0, float sign, Lane* c, i64 ldc) {
  for (i64 i = 0; i < rows; i += ROWS)
    for (i64 j = 0; j < cols; j += COLS)
      lane_tile<ROWS, COLS>(depth, at + i, lda, b + j, ldb, c0 ? c0 + i * ldc0 + j : nullptr, ldc0, sign,
                            c + i * ldc + j, ldc);
}

// The same for a matrix in every lane; sizes are 1, 2, 4 or 8.
GPUXBAR_METHOD void product(i64 rows, i64 cols, i64 depth, const Lane* at, i64 lda, const Lane* b, i64 ldb,
                            const Lane* c0, i64 ldc0, float sign, Lane* c, i64 ldc) {
  const i64 least = std::min(rows, cols);
  if (rows * cols * depth == 1) {  // of cells
    *c = (c0 ? *c0 : Lane{}) + sign * (*at * *b);
    return;
  }
  if (least >= 4)
    lane_product<4, ACROSS>(rows, cols, depth, at, lda, b, ldb, c0, ldc0, sign, c, ldc);
  else if (least == 2)
    lane_product<2, 2>(rows, cols, depth, at, lda, b, ldb, c0, ldc0, sign, c, ldc);
  else
    lane_product<1, 1>(rows, cols, depth, at, lda, b, ldb, c0, ldc0, sign, c, ldc);
}

// to = from', from [rows, cols]. One copy of it, too.
__attribute__((noinline)) inline void mirror(i64 rows, i64 cols, const float* from, i64 ld_from, float* to, i64 ld_to) {
  transpose(from, ld_from, rows, cols, to, ld_to);
}

inline void mirror(i64 rows, i64 cols, const Lane* from, i64 ld_from, Lane* to, i64 ld_to) {
  for (i64 i = 0; i < rows; ++i)
    for (i64 j = 0; j < cols; ++j) to[j * ld_to + i] = from[i * ld_from + j];
}

// In place, without pivots: 1 + A Z with A, Z positive semidefinite keeps its pivots at 1 or above in the mean.
inline void invert(i64 n, Lane* m, i64 ld, Lane*) {
  for (i64 t = 0; t < n; ++t) {
    Lane* const pivot = m + t * ld;
    const Lane inverse = 1.0f / pivot[t];
    pivot[t] = Lane{} + 1.0f;
    for (i64 j = 0; j < n; ++j) pivot[j] *= inverse;
    for (i64 i = 0; i < n; ++i) {
      if (i == t) continue;
      Lane* const row = m + i * ld;
      const Lane factor = row[t];
      row[t] = Lane{};
      for (i64 j = 0; j < n; ++j) row[j] -= factor * pivot[j];
    }
  }
}

// A row of a LEAF x LEAF matrix in registers. `Floats` is of memory: by its references, clang++ takes it for aligned.
typedef float LeafRow __attribute__((vector_size(4 * LEAF)));

// The same of such a matrix.
inline void invert_rows(LeafRow (&m)[LEAF]) {
#pragma GCC unroll 8
  for (int t = 0; t < LEAF; ++t) {
    const float inverse = 1.0f / m[t][t];
    m[t][t] = 1.0f;
    m[t] *= inverse;
#pragma GCC unroll 8
    for (int i = 0; i < LEAF; ++i) {
      if (i == t) continue;
      const float factor = m[i][t];
      m[i][t] = 0.0f;
      m[i] -= factor * m[t];
    }
  }
}

// Gauss-Jordan by panels of LEAF rows; `work` holds 2 LEAF (n + LEAF) numbers.
inline void invert(i64 n, float* m, i64 ld, float* work) {
  using Panel = Floats<LEAF>::Vec;
  float* const across = work;           // [LEAF, n]: the panel's rows, times the inverse of its pivot block
  float* const down = work + LEAF * n;  // [LEAF, n]: its columns, transposed
  for (i64 t = 0; t < n; t += LEAF) {
    LeafRow pivot[LEAF];
    float turned[LEAF * LEAF];
    for (int i = 0; i < LEAF; ++i) pivot[i] = *(const Panel*)(m + (t + i) * ld + t);
    invert_rows(pivot);
    transpose_tile<LEAF>([&](int i) { return pivot + i; }, turned, LEAF);
    for (int i = 0; i < LEAF; ++i) {
      Panel unit = {};
      unit[i] = 1.0f;
      *(Panel*)(m + (t + i) * ld + t) = unit;
    }
    product(LEAF, n, LEAF, turned, LEAF, m + t * ld, ld, nullptr, 0, 1.0f, across, n);
    mirror(n, LEAF, m + t, ld, down, n);
    for (i64 k = 0; k < LEAF; ++k) *(Panel*)(down + k * n + t) = Panel{};
    for (i64 i = 0; i < n; ++i) *(Panel*)(m + i * ld + t) = Panel{};
    for (i64 k = 0; k < LEAF; ++k) std::memcpy(m + (t + k) * ld, across + k * n, sizeof(float) * n);
    product(n, n, LEAF, down, n, across, n, m, ld, -1.0f, m, ld);
  }
}

}  // namespace gpuxbar::blocks
