// device_update on the CPU: wanted weight changes through the device law, and the weights read out afterwards.
//
// Blocks of 16 wordlines by 64 bitlines: weights lie transposed to conductances, and a block of both fits the first
// cache. Every cell is a function of its own place, so the bits do not depend on threads.
// Meaning and oracle: gpuxbar/reference/device_update.py.
#include <algorithm>

#include "draw.hpp"
#include "gpuxbar/update.cuh"

using namespace gpuxbar;

namespace {

constexpr int LINES = 16;

// One row of one plane: `wanted` in shares of the window, x in and out in shares of the window.
void update_row(const UpdateLaw& law, const float* wanted, float* x, u32 plane, u32 row, i64 col0, u32 step, u64 seed,
                float stuck_low, float stuck_high) {
  alignas(64) float up[WIDE_ROW], down[WIDE_ROW], z[WIDE_ROW] = {}, free[WIDE_ROW];
  if (law.spread > 0.0f) {
    draw_normals(Draw{UPDATE_SPREAD_UP, plane, 0, seed}, row, col0, up);
    draw_normals(Draw{UPDATE_SPREAD_DOWN, plane, 0, seed}, row, col0, down);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      up[j] = device_rate(law, law.rate_up, law.label_up, up[j]);
      down[j] = device_rate(law, law.rate_down, law.label_down, down[j]);
    }
  } else {
    std::fill(up, up + WIDE_ROW, law.rate_up);
    std::fill(down, down + WIDE_ROW, law.rate_down);
  }
  if (law.gamma2 + law.cycle2 + law.pulse_cycle2 + law.range_cycle2 > 0.0f)
    draw_normals(Draw{CYCLE, plane, step, seed}, row, col0, z);
  if (stuck_low + stuck_high > 0.0f)
    draw_uniforms(Draw{STUCK, plane, 0, seed}, row, col0, free);
  else
    std::fill(free, free + WIDE_ROW, 0.5f);
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const float moved = updated(law, x[j], wanted[j], up[j], down[j], z[j]);
    x[j] = free[j] < stuck_low || free[j] > 1.0f - stuck_high ? x[j] : moved;
  }
}

}  // namespace

extern "C" void gpuxbar_device_update(float* g, const float* dw, float* w, const float* w_max, const UpdateLaw* law,
                                      i64 groups, i64 inputs, i64 outputs, i64 step, i64 seed, double g_min,
                                      double g_max, double stuck_low, double stuck_high, i64* bad) {
  const float range = (float)(g_max - g_min), inverse_range = 1.0f / range, low = (float)g_min;
  const i64 row_blocks = (inputs + LINES - 1) / LINES, col_blocks = (outputs + WIDE_ROW - 1) / WIDE_ROW;
  i64 not_finite = 0;
  for (i64 e = 0; e < groups * inputs * outputs; ++e) not_finite += (float_bits(dw[e]) & 0x7F800000u) == 0x7F800000u;
  *bad = not_finite;
  if (not_finite) return;
#pragma omp parallel for collapse(3) schedule(static)
  for (i64 group = 0; group < groups; ++group)
    for (i64 rb = 0; rb < row_blocks; ++rb)
      for (i64 cb = 0; cb < col_blocks; ++cb) {
        const i64 i0 = rb * LINES, o0 = cb * WIDE_ROW;
        const i64 lines = std::min<i64>(LINES, inputs - i0), count = std::min<i64>(WIDE_ROW, outputs - o0);
        alignas(64) float change[LINES][WIDE_ROW] = {}, weight[LINES][WIDE_ROW] = {};
        float top[WIDE_ROW];
        for (i64 j = 0; j < count; ++j) {
          const i64 output = group * outputs + o0 + j;
          top[j] = w_max[output];
          const float half = 0.5f / top[j];
          for (i64 i = 0; i < lines; ++i) change[i][j] = dw[output * inputs + i0 + i] * half;
        }
        for (i64 i = 0; i < lines; ++i)
          for (u32 plane = 0; plane < 2; ++plane) {
            const i64 row = group * inputs + i0 + i;
            float* cells = g + ((i64)plane * groups * inputs + row) * outputs + o0;
            alignas(64) float x[WIDE_ROW] = {}, wanted[WIDE_ROW];
            const float sign = plane ? -1.0f : 1.0f;
            for (i64 j = 0; j < count; ++j) x[j] = (cells[j] - low) * inverse_range;
            for (int j = 0; j < WIDE_ROW; ++j) wanted[j] = sign * change[i][j];
            alignas(64) float before[WIDE_ROW];
            std::copy(x, x + WIDE_ROW, before);
            update_row(*law, wanted, x, plane, (u32)row, o0, (u32)step, (u64)seed, (float)stuck_low, (float)stuck_high);
            for (i64 j = 0; j < count; ++j) {
              if (x[j] != before[j]) cells[j] = fma(x[j], range, low);  // a cell that did not move keeps its bits
              weight[i][j] += sign * (cells[j] * inverse_range);
            }
          }
        for (i64 j = 0; j < count; ++j)
          for (i64 i = 0; i < lines; ++i) w[(group * outputs + o0 + j) * inputs + i0 + i] = weight[i][j] * top[j];
      }
}
