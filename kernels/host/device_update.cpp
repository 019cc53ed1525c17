// device_update on the CPU: wanted weight changes through the device law, and the weights read out afterwards.
//
// Blocks of 64 wordlines by 64 bitlines: weights lie transposed to conductances, and a block of both fits the first
// caches. Every cell is a function of its own place, so the bits do not depend on threads.
// Meaning and oracle: gpuxbar/reference/device_update.py.

// Of choices by one condition, one after another, g++ makes two paths, and a loop of vectors then works out both of them.
#pragma GCC optimize("no-thread-jumps", "no-split-paths")

#include <algorithm>

#include "cells.hpp"
#include "finite.hpp"
#include "gpuxbar/slices.cuh"

using namespace gpuxbar;

namespace {

constexpr int LINES = 64;

// Twin of `Update` in gpuxbar/ops/device_update.py.
struct Update {
  UpdateLaw law;
  Endurance endurance;
  Slices slices;
  i64 groups, inputs, outputs, step;
  u64 seed;
  float g_min, range;  // S
  float stuck_low, stuck_high;
  float factor;  // of wanted changes
};

struct Arrays {
  float* g;             // [2 slices, G * I, O] S
  float* g_held;        // like g: what devices hold where they show it with write noise; else null
  i32* pulse_count;     // like g: pulses taken, below 0 by failed devices; null where none fail
  DeviceMap map;        // planes like g
  const float* dw;      // [G, O, I], or null: `digits`
  const float* digits;  // [slices, G * I, O], wanted units of every slice, or null
  float* w;             // [G, O, I]
  const float* w_max;   // [G * O]
  const WideKeys& keys;
};

using Block = float[LINES][WIDE_ROW];

// A row of devices on one side of their pairs, in shares of the window.
struct alignas(64) Row {
  using Cells = float[WIDE_ROW];
  RowPlace at;
  i64 first;                                                 // place of the first device in its arrays
  alignas(64) Cells x, before, shown, shown_before;          // the last two with write noise
  alignas(64) Cells d, rising;                               // size of the change, and 1 where it is upwards
  alignas(64) Cells low, width, inverse_width, gain, shape;  // of `Device`
  alignas(64) Cells noise;
};

// What the devices are, and what they are asked for. LOGNORMAL and WHOLE are the law's `lognormal` and `integer_pulses`:
// loops of vectors would work out both ways.
template <i32 LOGNORMAL, i32 WHOLE>
void prepare(const Update& u, const Arrays& a, const float* change, i64 count, Row& r) {
  UpdateLaw s = u.law;
  s.lognormal = LOGNORMAL, s.integer_pulses = WHOLE;
  const bool positive = r.at.plane < (u32)u.slices.count;
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const float wanted = device_share(s.sides, positive, change[j]);
    r.d[j] = pulsed(s, wanted);
    r.rising[j] = wanted > 0.0f ? 1.0f : 0.0f;
  }
  const i32* taken = a.pulse_count ? a.pulse_count + r.first : nullptr;
  if (u.stuck_low + u.stuck_high > 0.0f) {
    alignas(64) float free[WIDE_ROW];
    draw_free(u.stuck_low, u.stuck_high, r.at, a.keys, free);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) r.d[j] *= free[j];
  }
  if (taken)
    for (i64 j = 0; j < count; ++j) r.d[j] = taken[j] < 0 ? 0.0f : r.d[j];
  const SpreadDraws draws(s, a.map, r.first, count, r.at, a.keys);
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const Device device = device_of(s, spreads(draws, j), r.rising[j] > 0.0f);
    r.low[j] = device.low, r.width[j] = device.width, r.inverse_width[j] = device.inverse_width;
    r.gain[j] = device.gain, r.shape[j] = device.shape;
  }
  if (noisy(s))
    draw_normals(Draw{CYCLE, r.at.plane, (u32)u.step, a.keys}, r.at.row, r.at.col0, r.noise);
  else
    std::fill(r.noise, r.noise + WIDE_ROW, 0.0f);
}

template <class L>
void move(const UpdateLaw s, Row& r) {
  if (FITTED<L> && s.low_spread + s.high_spread > 0.0f)
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      const Device device{r.low[j], r.width[j], r.inverse_width[j], r.gain[j], r.shape[j]};
      r.shape[j] = fitted_shape<L>(s, device, r.rising[j] > 0.0f);
    }
  alignas(64) Row::Cells from, by, per_square, fixed;  // of `Effort`
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const Device device{r.low[j], r.width[j], r.inverse_width[j], r.gain[j], r.shape[j]};
    const Effort effort = effort_of<L>(s, device, r.d[j], r.rising[j] > 0.0f);
    from[j] = effort.reach.from, by[j] = effort.reach.by;
    per_square[j] = effort.per_square, fixed[j] = effort.fixed;
  }
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const Device device{r.low[j], r.width[j], r.inverse_width[j], r.gain[j], r.shape[j]};
    const Effort effort{Reach{from[j], by[j]}, per_square[j], fixed[j]};
    r.x[j] = moved<L>(s, device, effort, r.x[j], r.d[j], r.rising[j] > 0.0f, r.noise[j], s.scatter);
  }
}

// What touched devices show.
void show(const Update& u, const WideKeys& keys, Row& r) {
  const UpdateLaw s = u.law;
  alignas(64) float write[WIDE_ROW];
  draw_normals(Draw{UPDATE_WRITE, r.at.plane, (u32)u.step, keys}, r.at.row, r.at.col0, write);
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j)
    r.shown[j] = r.d[j] > 0.0f ? max(fma(s.write_noise, write[j], r.x[j]), s.floor) : r.shown[j];
}

// Whole pulses of the changes.
void count_pulses(const Update& u, const WideKeys& keys, const Row& r, i32* pulses) {
  alignas(64) float part[WIDE_ROW];
  draw_uniforms(Draw{WEAR, r.at.plane, (u32)u.step, keys}, r.at.row, r.at.col0, part);
  const float most = u.law.pulses;
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) pulses[j] = r.d[j] > 0.0f ? whole_pulses(r.d[j] * most, part[j]) : 0;
}

// What pairs are asked for, in shares of their window, 0 behind the last one.
void load_digits(const float* units, float window, i64 count, float* asked) {
  std::fill(asked + count, asked + WIDE_ROW, 0.0f);
  each_cell(count, [=](i64 j) { asked[j] = units[j] / window; });
}

bool any(const float* change) {
  u32 asked = 0;
#pragma omp simd reduction(| : asked)
  for (int j = 0; j < WIDE_ROW; ++j) asked |= float_bits(change[j]) << 1;  // any but a zero of either sign
  return asked != 0;
}

// Move the devices of `sides` rows of as many pairs. Each step of the work is done for both before the next: many short
// chains of operations keep a processor busy, few long ones do not.
template <class L>
void update_rows(const Update& u, const Arrays& a, i32 sides, const float* change, i64 count, Row* rows) {
  const float inverse_range = 1.0f / u.range;
  float* held = a.g_held ? a.g_held : a.g;
  for (Row* r = rows; r < rows + sides; ++r) {
    load_shares(held + r->first, u.g_min, inverse_range, count, r->x, r->before);
    if (a.g_held) load_shares(a.g + r->first, u.g_min, inverse_range, count, r->shown, r->shown_before);
  }
  const auto prepared = u.law.lognormal ? (u.law.integer_pulses ? prepare<1, 1> : prepare<1, 0>)
                                        : (u.law.integer_pulses ? prepare<0, 1> : prepare<0, 0>);
  for (Row* r = rows; r < rows + sides; ++r) prepared(u, a, change, count, *r);
  for (Row* r = rows; r < rows + sides; ++r) move<L>(u.law, *r);
  for (Row* r = rows; r < rows + sides; ++r) {
    if (a.g_held) show(u, a.keys, *r);
    if (a.pulse_count) {
      alignas(64) i32 pulses[WIDE_ROW];
      count_pulses(u, a.keys, *r, pulses);
      float* const shown = a.g_held ? r->shown : nullptr;
      wear_row(u.endurance, r->at, a.keys, pulses, count, a.pulse_count + r->first, r->x, shown);
    }
    write_back(held + r->first, r->x, r->before, u.g_min, u.range, count);
    if (a.g_held) write_back(a.g + r->first, r->shown, r->shown_before, u.g_min, u.range, count);
  }
}

template <class L>
void update_block(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0) {
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  alignas(64) static thread_local Block change, weight;
  alignas(64) float inverse[WIDE_ROW] = {}, digit[WIDE_ROW];
  Row rows[2];
  const i64 output = group * u.outputs + o0, corner = output * u.inputs + i0;
  const float* top = a.w_max + output;
  for (i64 j = 0; j < count; ++j) inverse[j] = u.factor / top[j];
  if (a.dw) transpose(a.dw + corner, u.inputs, count, lines, change[0], WIDE_ROW);
  const float inverse_range = 1.0f / u.range;
  for (i64 i = 0; i < lines; ++i) {
    std::fill(change[i] + count, change[i] + WIDE_ROW, 0.0f);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) change[i][j] *= inverse[j];
    if (i + AHEAD < lines)
      for (i64 plane = 0; plane < 2 * u.slices.count; ++plane) {
        const i64 ahead = ((plane * u.groups + group) * u.inputs + i0 + i + AHEAD) * u.outputs + o0;
        fetch(a.g + ahead);
        if (a.g_held) fetch(a.g_held + ahead);
        if (a.map.normal)
          for (int k = 0; k < map_planes(u.law); ++k) fetch(a.map.normal + k * a.map.cells + ahead);
      }
    std::fill(weight[i], weight[i] + count, 0.0f);
    // a row of this block's weights, and one of the next block's changes
    if (lines == LINES && i < count) fetch(a.w + corner + i * u.inputs);
    if (a.dw && o0 + WIDE_ROW + i < u.outputs) fetch(a.dw + corner + (WIDE_ROW + i) * u.inputs);
    const i64 row = group * u.inputs + i0 + i;
    for (i32 k = 0; k < u.slices.count; ++k) {
      for (i32 side = 0; side < 2; ++side) {
        const u32 plane = (u32)(side * u.slices.count + k);
        rows[side].at = RowPlace{plane, (u32)row, o0};
        rows[side].first = ((i64)plane * u.groups * u.inputs + row) * u.outputs + o0;
      }
      if (a.digits)
        load_digits(a.digits + ((k * u.groups * u.inputs) + row) * u.outputs + o0, u.slices.window, count, digit);
      else if (u.slices.count == 1)
        std::copy(change[i], change[i] + WIDE_ROW, digit);
      else
#pragma omp simd
        for (int j = 0; j < WIDE_ROW; ++j) digit[j] = slice_change(u.slices, change[i][j], k);
      if (any(digit)) update_rows<L>(u, a, u.law.sides == REFERENCE ? 1 : 2, digit, count, rows);
      const float share = inverse_range * slice_weight(u.slices, k);
      const float *positive = a.g + rows[0].first, *negative = a.g + rows[1].first;
      float* sum = weight[i];
      each_cell(count, [=](i64 j) { sum[j] = fma(negative[j], -share, fma(positive[j], share, sum[j])); });
    }
#pragma omp simd
    for (i64 j = 0; j < count; ++j) weight[i][j] *= top[j];
  }
  transpose(weight[0], WIDE_ROW, lines, count, a.w + corner, u.inputs);
}

}  // namespace

extern "C" void gpuxbar_device_update(float* g, float* g_held, i32* pulse_count, const u16* device_map, const float* dw,
                                      const float* digits, float* w, const float* w_max, const Update* update,
                                      i64* bad) {
  const Update u = *update;
  const i64 size = u.groups * u.inputs * u.outputs;
  const WideKeys keys(u.seed);
  const Arrays a{g, g_held, pulse_count, DeviceMap{device_map, 2 * u.slices.count * size}, dw, digits, w, w_max, keys};
  *bad = dw ? count_not_finite(dw, size) : count_not_finite(digits, u.slices.count * size);
  if (*bad) return;
  const i64 row_blocks = (u.inputs + LINES - 1) / LINES, col_blocks = (u.outputs + WIDE_ROW - 1) / WIDE_ROW;
  with_law(u.law.law, [&](auto law) {
#pragma omp parallel for collapse(3) schedule(static) if (u.groups * row_blocks * col_blocks > 1)
    for (i64 group = 0; group < u.groups; ++group)
      for (i64 rb = 0; rb < row_blocks; ++rb)
        for (i64 cb = 0; cb < col_blocks; ++cb)
          update_block<typename decltype(law)::Type>(u, a, group, rb * LINES, cb * WIDE_ROW);
  });
}

// How many of the values are NaN or infinite.
extern "C" i64 gpuxbar_not_finite(const float* values, i64 size) { return count_not_finite(values, size); }
