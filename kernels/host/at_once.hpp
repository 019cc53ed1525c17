// at_once: the devices of a block, moved once by all coincidences of a batch.
//
// The order of pulses must not matter, which `check_train` in gpuxbar/spec/pulses.py sees to: steps are constant, or all
// lead one way and make no noise.
#pragma once
#include <algorithm>

#include "pulse_update.hpp"

namespace gpuxbar::pulses {

// f = 1: a LinearStep without slope, and its bits.
struct ConstantStep {
  GPUXBAR_METHOD explicit ConstantStep(const Direction&) {}
  GPUXBAR_METHOD Reach reach(float t) const { return Reach{t, 0.0f}; }
  GPUXBAR_METHOD float change(float, const Reach& reach) const { return reach.from; }
};

// x after constant pulses of cell j of a row; a struct made in a simd loop itself would keep it from vectorising.
GPUXBAR_FN float both_ways(const UpdateLaw& s, const SpreadDraws& z, int j, float x, float ups, float downs,
                           float noise) {
  return after_pulses<ConstantStep>(s, spreads(z, j), x, ups, downs, noise);
}

// The same after pulses upwards without noise.
template <class L>
GPUXBAR_FN float upwards(const UpdateLaw& s, const SpreadDraws& z, int j, float x, float ups) {
  const Device device = device_under<L>(s, spreads(z, j), true);
  const float y = min(max((x - device.low) * device.inverse_width, 0.0f), 1.0f);
  const float size = change_of<L>(s, device, effort_of<L>(s, device, ups * (1.0f / s.pulses), true), y, true).size;
  const float to = fma(y, device.width, device.low) + size;
  return ups > 0.0f ? min(max(to, device.low), device.low + device.width) : x;
}

inline void move_both_ways(const UpdateLaw& s, const SpreadDraws& z, const float* ups, const float* downs,
                           const float* noise, float* x) {
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) x[j] = both_ways(s, z, j, x[j], ups[j], downs[j], noise[j]);
}

template <class L>
void move_upwards(const UpdateLaw& s, const SpreadDraws& z, const float* ups, float* x) {
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) x[j] = upwards<L>(s, z, j, x[j], ups[j]);
}

// Pulses of a row's devices, of one plane, for coincidences that raise the weight and all.
inline void share_pulses(i32 sides, bool positive, const float* free, const i32* raise, const i32* all, float* ups,
                         float* downs) {
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const float raising = free[j] * (float)raise[j], lowering = free[j] * (float)(all[j] - raise[j]);
    ups[j] = pulses_up(sides, positive, raising, lowering);
    downs[j] = pulses_down(sides, positive, raising, lowering);
  }
}

template <class L>
void pulse_at_once(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Block& block) {
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const UpdateLaw s = u.law;
  const bool one_way = s.sides == ONE_SIDED && !noisy(s);
  alignas(64) float z[2][WIDE_ROW] = {}, ups[WIDE_ROW], downs[WIDE_ROW];
  for (i64 i = 0; i < lines; ++i) {
    if (noisy(s))
      draw_pairs(Draw{PULSE_CYCLE, 0, (u32)u.step, a.keys}, (u32)(group * u.inputs + i0 + i), o0, z[0], z[1]);
    for (u32 side = 0; side < u.sides(); ++side) {
      const Row row(u, a, u.place(side, group, i0 + i, o0), count, block.failures(side, i));
      share_pulses(s.sides, side == 0, row.free, block.raise[i], block.all[i], ups, downs);
      float* x = block.x[side][i];
      if (one_way)
        move_upwards<L>(s, row.draws, ups, x);
      else
        move_both_ways(s, row.draws, ups, downs, z[side], x);
      if (block.counted)
        for (int j = 0; j < WIDE_ROW; ++j) block.more[side][i][j] = (i32)(ups[j] + downs[j]);
    }
  }
}

}  // namespace gpuxbar::pulses
