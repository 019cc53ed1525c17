// Rows of random numbers for the elementwise host kernels: stages split so that each loop vectorises.
#pragma once
#include "gpuxbar/normal.cuh"
#include "threads.hpp"
#include "wide.hpp"

namespace gpuxbar {

constexpr int WIDE_ROW = 64;  // columns handled at a time, from a multiple of 4

// Pair q of normals of counters, of whose words k is words[k]: fast ones take a word, exact ones two.
template <bool FAST, int N>
static inline Pair pair_of(const u32 (&words)[4][N], int q, i64 i) {
  if constexpr (FAST)
    return normal_pair_fast(words[q][i]);
  else
    return normal_pair(words[2 * q][i], words[2 * q + 1][i]);
}

// Where a row of draws is: see philox.cuh.
struct Draw {
  u32 purpose, slot, step;
  const WideKeys& keys;
};

constexpr int VECTORS_OF_ROW = WIDE_ROW / 2 / LANES;  // of the counters of a row
typedef WideCounter RowCounters[VECTORS_OF_ROW];
static_assert(WIDE_ROW % (2 * LANES) == 0);

// The words of columns col0 .. col0 + 63 of a row, in their counters.
template <int ROUNDS>
static inline void draw_counters(const Draw& d, u32 row, i64 col0, RowCounters& c) {
  const Wide first = column_lanes() + (u64)(u32)(col0 / 4);
  for (int n = 0; n < VECTORS_OF_ROW; ++n)
    c[n] = WideCounter{first + (u64)(n * LANES / 2), row + Wide{}, (u64)(d.purpose << 24 | d.slot) + Wide{},
                       d.step + Wide{}};
  philox_wide<ROUNDS>(c, d.keys);
}

// The same, one a column.
template <int ROUNDS = 10>
static inline void draw_words(const Draw& d, u32 row, i64 col0, u32* word) {
  RowCounters c;
  draw_counters<ROUNDS>(d, row, col0, c);
  for (int n = 0; n < VECTORS_OF_ROW; ++n) store_words(c[n], word + 2 * n * LANES);
}

// Standard normals of columns col0 .. col0 + 63 of a row.
static inline void draw_normals(const Draw& d, u32 row, i64 col0, float* z) {
  alignas(64) u32 radius[WIDE_ROW / 2], phase[WIDE_ROW / 2];
  alignas(64) float a[WIDE_ROW / 2], b[WIDE_ROW / 2];
  RowCounters c;
  draw_counters<10>(d, row, col0, c);
  for (int n = 0; n < VECTORS_OF_ROW; ++n) {
    *(Wide*)(radius + n * LANES) = join(c[n].x, c[n].z);
    *(Wide*)(phase + n * LANES) = join(c[n].y, c[n].w);
  }
#pragma omp simd
  for (int j = 0; j < WIDE_ROW / 2; ++j) {
    const Pair pair = normal_pair(radius[j], phase[j]);
    a[j] = pair.a;
    b[j] = pair.b;
  }
  for (int j = 0; j < WIDE_ROW / 2; j += LANES) store_pairs(*(const Vec*)(a + j), *(const Vec*)(b + j), z + 2 * j);
}

// Uniforms in (0, 1) of columns col0 .. col0 + 63 of a row.
static inline void draw_uniforms(const Draw& d, u32 row, i64 col0, float* u) {
  alignas(64) u32 word[WIDE_ROW];
  draw_words(d, row, col0, word);
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) u[j] = uniform(word[j]);
}

// The words of `count` counters, in whole vectors, that differ in group, row and slot: words[q][j] is word q of counter j.
template <int ROUNDS, int N>
static inline void draw_words_at(u32 purpose, u32 step, const WideKeys& keys, const u32 (&group)[N],
                                 const u32 (&row)[N], const u32 (&slot)[N], u32 (&words)[4][N], i64 count = N) {
  static_assert(N % LANES == 0);
  const auto evens = [](const u32* values) { return *(const Wide*)values; };  // high halves hold anything
  const auto odds = [](const u32* values) { return *(const Wide*)values >> 32; };
  const Wide kind = (u64)(purpose << 24) + Wide{}, when = step + Wide{};
  for (i64 j = 0; j < count; j += LANES)
    philox_lanes<ROUNDS>(WideCounter{evens(group + j), evens(row + j), evens(slot + j) | kind, when},
                         WideCounter{odds(group + j), odds(row + j), odds(slot + j) | kind, when}, keys, words[0] + j,
                         words[1] + j, words[2] + j, words[3] + j);
}

typedef u32 Lines[WIDE_ROW];

// One word of each of `count` cells, in whole vectors, each in a row, a column and a slot of its own.
template <int ROUNDS>
static inline void draw_words_at(u32 purpose, u32 step, const WideKeys& keys, i64 count, const Lines& rows,
                                 const Lines& columns, const Lines& slots, u32* word) {
  alignas(64) Lines words[4], group;
  for (i64 j = 0; j < count; ++j) group[j] = columns[j] / 4;
  draw_words_at<ROUNDS>(purpose, step, keys, group, rows, slots, words, count);
#pragma omp simd
  for (i64 j = 0; j < count; ++j) {
    const u32 even = columns[j] & 2 ? words[2][j] : words[0][j], odd = columns[j] & 2 ? words[3][j] : words[1][j];
    word[j] = columns[j] & 1 ? odd : even;
  }
}

// Two normals of each of `count` words by the fast generator, in whole vectors.
static inline void make_pairs(const u32* word, int count, float* a, float* b) {
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const Pair pair = normal_pair_fast(word[j]);
    a[j] = pair.a;
    b[j] = pair.b;
  }
}

// Two normals of each column of a row by the fast generator.
static inline void draw_pairs(const Draw& d, u32 row, i64 col0, float* a, float* b) {
  alignas(64) u32 word[WIDE_ROW];
  draw_words<7>(d, row, col0, word);
  make_pairs(word, WIDE_ROW, a, b);
}

}  // namespace gpuxbar
