// carry on the CPU: digits of sliced weights that outgrew their base give their excess to the next slice.
//
// A row of 64 weights at a time, through all slices; every weight is a function of its own place, so the bits do not
// depend on threads. Meaning and oracle: gpuxbar/reference/carry.py.
#include <algorithm>

#include "draw.hpp"
#include "finite.hpp"
#include "gpuxbar/slices.cuh"
#include "writes.hpp"

using namespace gpuxbar;

namespace {

struct Arrays {
  float* g;                // [2 slices, R, C] S
  float* g_held;           // like g, or null
  const i32* pulse_count;  // like g, or null
  i64 rows, cols;
  const WideKeys& keys;
};

// 64 weights, of which `count` exist.
struct Spot {
  u32 row;
  i64 col0, count;
};

// Pairs of one slice. Units: the digit, and what both devices of a pair lie above g_min; 1 where both can be written.
struct Pairs {
  alignas(64) float digit[WIDE_ROW], common[WIDE_ROW], writable[WIDE_ROW];
};

i64 place(const Arrays& a, const Spot& at, u32 plane) { return ((i64)plane * a.rows + at.row) * a.cols + at.col0; }

void load_pairs(const Programming& p, const Slices& s, const Arrays& a, const Spot& at, i32 k, Pairs& pairs) {
  alignas(64) float side[2][WIDE_ROW] = {}, u[WIDE_ROW];
  std::fill(pairs.writable, pairs.writable + WIDE_ROW, 1.0f);
  for (i32 n = 0; n < 2; ++n) {
    const u32 plane = (u32)(n * s.count + k);
    const i64 first = place(a, at, plane);
    std::copy(a.g + first, a.g + first + at.count, side[n]);
    if (has_stuck(p)) {
      draw_stuck(p, a.keys, plane, at.row, at.col0, u);
      for (int j = 0; j < WIDE_ROW; ++j) pairs.writable[j] *= stuck(p, u[j]) ? 0.0f : 1.0f;
    }
    if (a.pulse_count)
      for (i64 j = 0; j < at.count; ++j) pairs.writable[j] *= a.pulse_count[first + j] < 0 ? 0.0f : 1.0f;
  }
  const float units = s.window / (p.g_max - p.g_min), g_min = p.g_min;
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    pairs.digit[j] = (side[0][j] - side[1][j]) * units;
    pairs.common[j] = (min(side[0][j], side[1][j]) - g_min) * units;
  }
}

// Write the digits of chosen pairs of slice k, which can be written: 1 where chosen.
void write_pairs(const Programming& p, const Slices& s, const Arrays& a, const Spot& at, i32 k, const float* digit,
                 const float* chosen) {
  if (std::all_of(chosen, chosen + at.count, [](float one) { return one == 0.0f; })) return;
  for (i32 n = 0; n < 2; ++n) {
    const u32 plane = (u32)(n * s.count + k);
    const i64 first = place(a, at, plane);
    const WriteDraws z(p, a.keys, CARRY, plane, at.row, at.col0);
    alignas(64) float value[WIDE_ROW];
    const float sign = n ? -1.0f : 1.0f;
    const Programming settings = p;
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j)
      value[j] = written(settings, digit_target(settings, sign * digit[j]), z.spread[j], z.noise[j], z.u[j]);
    for (float* cells : {a.g, a.g_held}) {
      if (!cells) continue;
#pragma omp simd
      for (i64 j = 0; j < at.count; ++j) cells[first + j] = chosen[j] != 0.0f ? value[j] : cells[first + j];
    }
  }
}

void carry_row(const Programming& p, const Slices s, const Arrays& a, const Spot& at, i32 due) {
  const i32 last = s.count - 1;
  const float base = power_of_two(s.bits);
  Pairs pairs[2];
  alignas(64) float in[WIDE_ROW] = {}, digit[WIDE_ROW], chosen[WIDE_ROW];
  load_pairs(p, s, a, at, 0, pairs[0]);
  for (i32 k = 0; k <= due; ++k) {  // the last of them only takes
    const bool gives = k < due, crowded = !p.balanced && (gives || due == last);
    const Pairs& here = pairs[k & 1];
    Pairs& next = pairs[~k & 1];
    if (gives) load_pairs(p, s, a, at, k + 1, next);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      const float total = here.digit[j] + in[j], both = here.writable[j] * next.writable[j];
      const float out = gives ? both * excess(total, s.bits) : 0.0f;
      const float full = crowded && here.common[j] >= 1.0f ? here.writable[j] : 0.0f;
      chosen[j] = in[j] != 0.0f || out != 0.0f ? 1.0f : full;
      digit[j] = fma(-base, out, total);
      in[j] = out;
    }
    write_pairs(p, s, a, at, k, digit, chosen);
  }
  if (due < last) return;
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {  // now of the highest slice
    in[j] = excess(digit[j], s.bits) != 0.0f ? pairs[last & 1].writable[j] : 0.0f;
    digit[j] = digit[j] < 0.0f ? 1.0f - base : base - 1.0f;
  }
  if (std::all_of(in, in + at.count, [](float one) { return one == 0.0f; })) return;
  for (i32 k = 0; k <= last; ++k) {  // beyond full
    load_pairs(p, s, a, at, k, pairs[0]);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) chosen[j] = in[j] * pairs[0].writable[j];
    write_pairs(p, s, a, at, k, digit, chosen);
  }
}

}  // namespace

// The step of `writes` is the number of updates so far.
extern "C" void gpuxbar_carry(const Programming* writes, const Slices* slices, float* g, float* g_held,
                              const i32* pulse_count, i64 interval, i64 rows, i64 cols, i64* bad) {
  const Programming p = *writes;
  const Slices s = *slices;
  const WideKeys keys(p.seed);
  const Arrays a{g, g_held, pulse_count, rows, cols, keys};
  const i32 due = slices_due(s, interval, p.step);
  if (due == 0) return;
  *bad = count_not_finite(g, 2 * s.count * rows * cols);
  if (*bad) return;
#pragma omp parallel for schedule(static) if (s.count * rows * cols >= WORTH_A_THREAD)
  for (i64 row = 0; row < rows; ++row)
    for (i64 col0 = 0; col0 < cols; col0 += WIDE_ROW)
      carry_row(p, s, a, Spot{(u32)row, col0, std::min<i64>(WIDE_ROW, cols - col0)}, due);
}
