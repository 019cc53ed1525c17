// drift and relax on the CPU: conductances some time after they were programmed, and between updates.
//
// A row of 64 cells at a time; every cell is a function of its own place, so the bits do not depend on threads.
// Meaning and oracles: gpuxbar/reference/drift.py and relax.py.
#include <algorithm>

#include "draw.hpp"
#include "gpuxbar/ageing.cuh"

using namespace gpuxbar;

namespace {

// Call work(plane, row, col0, place of the first cell, count) for every row of at most 64 cells of [planes, rows, cols].
template <class Work>
void for_rows(i64 planes, i64 rows, i64 cols, Work&& work) {
#pragma omp parallel for collapse(2) schedule(static) if (planes * rows * cols >= WORTH_A_THREAD)
  for (i64 plane = 0; plane < planes; ++plane)
    for (i64 row = 0; row < rows; ++row)
      for (i64 col0 = 0; col0 < cols; col0 += WIDE_ROW)
        work((u32)plane, (u32)row, col0, (plane * rows + row) * cols + col0, std::min<i64>(WIDE_ROW, cols - col0));
}

}  // namespace

extern "C" void gpuxbar_drift(const Drift* law, const float* g, float* aged, i64 planes, i64 rows, i64 cols, i64 seed,
                              i64 step, i64 flicker_step) {
  const Drift d = *law;
  const bool spread = d.std_max > 0.0f, noise = d.flicker > 0.0f;
  const WideKeys keys((u64)seed);
  for_rows(planes, rows, cols, [=, &keys](u32 plane, u32 row, i64 col0, i64 first, i64 count) {
    alignas(64) float x[WIDE_ROW] = {}, nu[WIDE_ROW] = {}, flicker[WIDE_ROW] = {};
    if (spread) draw_normals(Draw{DRIFT, plane, (u32)step, keys}, row, col0, nu);
    if (noise) draw_normals(Draw{FLICKER, plane, (u32)flicker_step, keys}, row, col0, flicker);
    std::copy(g + first, g + first + count, x);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) x[j] = drifted(d, x[j], nu[j], flicker[j]);
    std::copy(x, x + count, aged + first);
  });
}

extern "C" void gpuxbar_measured_drift(const MeasuredDrift* law, const float* g, float* aged, i64 planes, i64 rows,
                                       i64 cols, i64 seed, i64 step) {
  const MeasuredDrift d = *law;
  const WideKeys keys((u64)seed);
  for_rows(planes, rows, cols, [=, &keys](u32 plane, u32 row, i64 col0, i64 first, i64 count) {
    alignas(64) float z[WIDE_ROW];
    draw_normals(Draw{DRIFT, plane, (u32)step, keys}, row, col0, z);
    for (i64 j = 0; j < count; ++j) aged[first + j] = changed(d, g[first + j], z[j]);
  });
}

extern "C" void gpuxbar_relax(const Retention* law, float* g, const i32* pulse_count, i64 planes, i64 rows, i64 cols,
                              i64 seed) {
  const Retention s = *law;
  const WideKeys keys((u64)seed);
  for_rows(planes, rows, cols, [=, &keys](u32 plane, u32 row, i64 col0, i64 first, i64 count) {
    alignas(64) float x[WIDE_ROW] = {}, z[WIDE_ROW] = {}, u[WIDE_ROW];
    if (s.spread > 0.0f) draw_normals(Draw{RETENTION, plane, 0, keys}, row, col0, z);
    if (s.stuck_low + s.stuck_high > 0.0f)
      draw_uniforms(Draw{STUCK, plane, 0, keys}, row, col0, u);
    else
      std::fill(u, u + WIDE_ROW, 0.5f);
    std::copy(g + first, g + first + count, x);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) x[j] = relaxed(s, x[j], z[j], u[j]);
    for (i64 j = 0; j < count; ++j)
      if (!pulse_count || pulse_count[first + j] >= 0) g[first + j] = x[j];  // failed devices stay
  });
}
