// Rows of random numbers for the elementwise host kernels: stages split so that each loop vectorises.
#pragma once
#include "gpuxbar/normal.cuh"

namespace gpuxbar {

constexpr int WIDE_ROW = 64;  // columns handled at a time, from a multiple of 4

// Where a row of draws is: see philox.cuh.
struct Draw {
  u32 purpose, slot, step;
  u64 seed;
};

// The words of columns col0 .. col0 + 63 of a row, four counters' worth apart: w[q][j] is word q of counter j.
static inline void draw_words(const Draw& d, u32 row, i64 col0, u32 w[4][WIDE_ROW / 4]) {
  const u32 key_lo = (u32)d.seed, key_hi = (u32)(d.seed >> 32), first = (u32)(col0 / 4);
#pragma omp simd
  for (int j = 0; j < WIDE_ROW / 4; ++j) {
    const Counter c = philox<10>(counter(first + (u32)j, row, d.purpose, d.slot, d.step), key_lo, key_hi);
    w[0][j] = c.x;
    w[1][j] = c.y;
    w[2][j] = c.z;
    w[3][j] = c.w;
  }
}

// Standard normals of columns col0 .. col0 + 63 of a row.
static inline void draw_normals(const Draw& d, u32 row, i64 col0, float* z) {
  alignas(64) u32 w[4][WIDE_ROW / 4];
  alignas(64) float n[4][WIDE_ROW / 4];
  draw_words(d, row, col0, w);
  for (int q = 0; q < 2; ++q)
#pragma omp simd
    for (int j = 0; j < WIDE_ROW / 4; ++j) {
      const Pair pair = normal_pair(w[2 * q][j], w[2 * q + 1][j]);
      n[2 * q][j] = pair.a;
      n[2 * q + 1][j] = pair.b;
    }
  for (int j = 0; j < WIDE_ROW / 4; ++j)
    for (int q = 0; q < 4; ++q) z[4 * j + q] = n[q][j];
}

// Uniforms in (0, 1) of columns col0 .. col0 + 63 of a row.
static inline void draw_uniforms(const Draw& d, u32 row, i64 col0, float* u) {
  alignas(64) u32 w[4][WIDE_ROW / 4];
  draw_words(d, row, col0, w);
  for (int j = 0; j < WIDE_ROW / 4; ++j)
    for (int q = 0; q < 4; ++q) u[4 * j + q] = uniform(w[q][j]);
}

}  // namespace gpuxbar
