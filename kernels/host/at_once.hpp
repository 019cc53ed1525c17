// at_once: the devices of a block, moved once by all coincidences of a batch.
//
// The order of pulses must not matter, which `check_train` in gpuxbar/spec/pulses.py sees to: steps are constant, or all
// lead one way and make no noise.
#pragma once
#include <algorithm>

#include "pulse_update.hpp"

namespace gpuxbar::pulses {

// Pairs that move of a wordline's 64, from which on all are moved together: a counter then draws for four neighbours. Fewer are
// gathered from the lines of a block, and each draws for itself.
constexpr i64 TOGETHER = 28;

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

// Moves 64 devices of a plane from their shares x; `more`: the pulses that they take.
template <class L>
void move_devices(const UpdateLaw& s, bool positive, const Row& row, const i32* raise, const i32* all,
                  const float* noise, float* x, i32* more) {
  alignas(64) float ups[WIDE_ROW], downs[WIDE_ROW];
  share_pulses(s.sides, positive, row.free, raise, all, ups, downs);
  if (s.sides == ONE_SIDED && !noisy(s))
    move_upwards<L>(s, row.draws, ups, x);
  else
    move_both_ways(s, row.draws, ups, downs, noise, x);
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) more[j] = (i32)(ups[j] + downs[j]);
}

// Moves the pairs of a wordline.
template <class L>
void pulse_line(const Update& u, const Arrays& a, i64 group, i64 line, i64 o0, i64 count, const i32* raise,
                const i32* all) {
  alignas(64) float z[2][WIDE_ROW] = {}, x[WIDE_ROW], before[WIDE_ROW];
  alignas(64) i32 more[WIDE_ROW];
  bool failed[WIDE_ROW] = {};
  if (noisy(u.law))
    draw_pairs(Draw{PULSE_CYCLE, 0, (u32)u.step, a.keys}, (u32)(group * u.inputs + line), o0, z[0], z[1]);
  for (u32 side = 0; side < u.sides(); ++side) {
    const RowPlace at = u.place(side, group, line, o0);
    float* cells = a.g + u.cell(at.plane, at.row, o0);
    i32* taken = a.pulse_count ? a.pulse_count + (cells - a.g) : nullptr;
    if (taken)
      for (i64 j = 0; j < count; ++j) failed[j] = taken[j] < 0;
    load_shares(a.held() + (cells - a.g), u.g_min, 1.0f / u.range, count, x, before);
    const Row row(u, a, at, count, taken ? failed : nullptr);
    move_devices<L>(u.law, side == 0, row, raise, all, z[side], x, more);
    keep_row(u, a, at, count, more, before, x);
  }
}

// Moves up to 64 pairs of a block, of which none is tracked: line * WIDE_ROW + column of each.
template <class L>
void pulse_some(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, const u32* pairs, i64 count,
                const Counts& raise, const Counts& all) {
  PairsOfBlock at(u, group, i0, o0, pairs, count);
  alignas(64) u32 word[WIDE_ROW];
  alignas(64) i32 raising[WIDE_ROW] = {}, together[WIDE_ROW] = {}, more[WIDE_ROW];
  alignas(64) float z[2][WIDE_ROW] = {}, x[WIDE_ROW] = {}, before[WIDE_ROW];
  const i32 *ups = raise[0], *both = all[0];
  for (i64 k = 0; k < count; ++k) raising[k] = ups[pairs[k]], together[k] = both[pairs[k]];
  if (noisy(u.law)) {
    at.lie_in(u, 0);
    draw_words<7>(PULSE_CYCLE, (u32)u.step, a.keys, at, word);
    make_pairs(word, at.count, z[0], z[1]);
  }
  for (u32 side = 0; side < u.sides(); ++side) {
    at.lie_in(u, side);
    for (i64 k = 0; k < at.count; ++k) x[k] = before[k] = (a.g[at.cells[k]] - u.g_min) * (1.0f / u.range);
    move_devices<L>(u.law, side == 0, Row(u, a, at), raising, together, z[side], x, more);
    for (i64 k = 0; k < count; ++k)
      a.g[at.cells[k]] = x[k] != before[k] ? fma(x[k], u.range, u.g_min) : a.g[at.cells[k]];
  }
}

// `raise`, `all`: coincidences of a block's pairs over the batch. `moved`: which wordlines have any.
template <class L>
void pulse_at_once(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, const Counts& raise, const Counts& all,
                   bool* moved) {
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const i64 together = a.tracked() ? 1 : TOGETHER;
  alignas(64) u32 moving[WIDE_ROW], few[2 * WIDE_ROW + LANES];
  i64 kept = 0;
  for (i64 i = 0; i < lines; ++i) {
    if (i + AHEAD < lines)
      for (u32 side = 0; side < u.sides(); ++side)
        fetch(a.g + u.cell(side * u.slices.count, group * u.inputs + i0 + i + AHEAD, o0));
#pragma omp simd
    for (i64 j = 0; j < WIDE_ROW; ++j) moving[j] = j < count && all[i][j] ? (u32)(i * WIDE_ROW + j) | NEGATIVE : 0u;
    const i64 more = keep(moving, WIDE_ROW, few + kept);
    moved[i] = more > 0;
    if (more >= together) {
      pulse_line<L>(u, a, group, i0 + i, o0, count, raise[i], all[i]);
      continue;
    }
    for (i64 k = kept; k < kept + more; ++k) few[k] &= SLOTS;
    kept += more;
    if (kept >= WIDE_ROW) {
      pulse_some<L>(u, a, group, i0, o0, few, WIDE_ROW, raise, all);
      kept -= WIDE_ROW;
      std::copy_n(few + WIDE_ROW, kept, few);
    }
  }
  if (kept) pulse_some<L>(u, a, group, i0, o0, few, kept, raise, all);
}

}  // namespace gpuxbar::pulses
