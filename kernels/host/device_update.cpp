// device_update on the CPU: wanted weight changes through the device law, and the weights read out afterwards.
//
// Blocks of 64 wordlines by 64 bitlines: weights lie transposed to conductances, and a block of both fits the first
// caches. Every cell is a function of its own place, so the bits do not depend on threads.
// Meaning and oracle: gpuxbar/reference/device_update.py.
#include <algorithm>
#include <type_traits>

#include "cells.hpp"
#include "gpuxbar/endurance.cuh"
#include "gpuxbar/slices.cuh"

using namespace gpuxbar;

namespace {

constexpr int LINES = 64;
constexpr int AHEAD = 16;  // rows between asking for cells and moving them

// Twin of `Update` in gpuxbar/ops/device_update.py.
struct Update {
  UpdateLaw law;
  Endurance endurance;
  Slices slices;
  i64 groups, inputs, outputs, step;
  u64 seed;
  float g_min, range;  // S
  float stuck_low, stuck_high;
};

struct Arrays {
  float* g;            // [2 slices, G * I, O] S
  float* hidden;       // like g: what devices hold where they show it with write noise; else null
  i32* pulse_count;    // like g: pulses taken, below 0 by failed devices; null where none fail
  DeviceMap map;       // planes like g
  const float* dw;     // [G, O, I]
  float* w;            // [G, O, I]
  const float* w_max;  // [G * O]
};

using Block = float[LINES][WIDE_ROW];

// Count the pulses of changes d on a row of devices, and leave those that fail by them where they fail.
void wear_row(const Update& u, const Place& at, const float* d, i64 count, i32* taken, float* x, float* shown) {
  alignas(64) float z[WIDE_ROW] = {}, part[WIDE_ROW];
  const Endurance e = u.endurance;
  if (e.spread > 0.0f) draw_normals(Draw{ENDURANCE, at.plane, 0, u.seed}, at.row, at.col0, z);
  draw_uniforms(Draw{WEAR, at.plane, (u32)u.step, u.seed}, at.row, at.col0, part);
  alignas(64) i32 now[WIDE_ROW] = {};
  alignas(64) float none[WIDE_ROW] = {};
  std::copy(taken, taken + count, now);
  float* seen = shown ? shown : none;
  const float pulses = u.law.pulses;
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const bool touched = d[j] > 0.0f;  // and so alive
    const i32 after = after_wear(e, touched ? now[j] : 0, whole_pulses(d[j] * pulses, part[j]), z[j]);
    now[j] = touched ? after : now[j];
    x[j] = touched && after < 0 ? failed_share(e, x[j]) : x[j];
    seen[j] = touched && after < 0 ? failed_share(e, seen[j]) : seen[j];
  }
  std::copy(now, now + count, taken);
}

// One row of one plane of a block: x in and out in shares of the window, `shown` beside it with write noise.
template <class L>
void move_row(const Update& u, DeviceMap map, i64 first, const Place& at, const float* change, i64 count, i32* taken,
              float* x, float* shown) {
  const Draws draws(u.law, map, first, count, at, u.seed);
  alignas(64) float z[WIDE_ROW] = {}, free[WIDE_ROW], write[WIDE_ROW] = {};
  if (noisy(u.law)) draw_normals(Draw{CYCLE, at.plane, (u32)u.step, u.seed}, at.row, at.col0, z);
  if (shown) draw_normals(Draw{UPDATE_WRITE, at.plane, (u32)u.step, u.seed}, at.row, at.col0, write);
  draw_free(u.stuck_low, u.stuck_high, at, u.seed, free);
  if (taken)
    for (i64 j = 0; j < count; ++j) free[j] = taken[j] < 0 ? 0.0f : free[j];
  const UpdateLaw s = u.law;
  const bool positive = at.plane < (u32)u.slices.count;
  alignas(64) float wanted[WIDE_ROW], d[WIDE_ROW];
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    wanted[j] = device_share(s.sides, positive, change[j]);
    d[j] = free[j] * pulsed(s, wanted[j]);
  }
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) x[j] = moved_cell<L>(s, draws, j, x[j], d[j], wanted[j] > 0.0f, z[j]);
  if (shown)
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j)
      shown[j] = d[j] > 0.0f ? max(fma(s.write_noise, write[j], x[j]), s.floor) : shown[j];
  if (taken) wear_row(u, at, d, count, taken, x, shown);
}

// A cell that did not move keeps its bits.
void write_back(float* cells, const float* x, const float* before, float g_min, float range, i64 count) {
#pragma omp simd
  for (i64 j = 0; j < count; ++j) cells[j] = x[j] != before[j] ? fma(x[j], range, g_min) : cells[j];
}

// Shares of the window of `count` cells, 0 in the others.
void load_shares(const float* cells, float g_min, float inverse_range, i64 count, float* x) {
  std::fill(x + count, x + WIDE_ROW, 0.0f);
#pragma omp simd
  for (i64 j = 0; j < count; ++j) x[j] = (cells[j] - g_min) * inverse_range;
}

// Ask for the cells of a row ahead of their use: rows of a block lie too far apart to be foreseen.
template <class T>
void fetch(T* cells) {
  constexpr int LINE = 64 / sizeof(T);
  for (int j = 0; j < WIDE_ROW; j += LINE) __builtin_prefetch(cells + j, std::is_const_v<T> ? 0 : 1);
}

// What a row of pairs of slice k is asked for, in shares of its window; false if nothing.
bool digits(const Slices slices, const float* change, i32 k, float* digit) {
  u32 asked = 0;
#pragma omp simd reduction(| : asked)
  for (int j = 0; j < WIDE_ROW; ++j) {
    digit[j] = slice_change(slices, change[j], k);
    asked |= float_bits(digit[j]) << 1;  // any but a zero of either sign
  }
  return asked != 0;
}

// Move a row of devices, the first of them at place `first` of its arrays.
template <class L>
void update_row(const Update& u, const Arrays& a, const Place& at, const float* change, i64 first, i64 count) {
  float *cells = a.g + first, *held = a.hidden ? a.hidden + first : cells;
  alignas(64) float x[WIDE_ROW], before[WIDE_ROW], shown[WIDE_ROW], shown_before[WIDE_ROW];
  const float inverse_range = 1.0f / u.range;
  load_shares(held, u.g_min, inverse_range, count, x);
  std::copy(x, x + WIDE_ROW, before);
  if (a.hidden) {
    load_shares(cells, u.g_min, inverse_range, count, shown);
    std::copy(shown, shown + WIDE_ROW, shown_before);
  }
  i32* taken = a.pulse_count ? a.pulse_count + first : nullptr;
  move_row<L>(u, a.map, first, at, change, count, taken, x, a.hidden ? shown : nullptr);
  write_back(held, x, before, u.g_min, u.range, count);
  if (a.hidden) write_back(cells, shown, shown_before, u.g_min, u.range, count);
}

template <class L>
void update_block(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0) {
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  alignas(64) static thread_local Block change, weight;
  alignas(64) float inverse[WIDE_ROW] = {};
  const i64 output = group * u.outputs + o0, corner = output * u.inputs + i0;
  const float* top = a.w_max + output;
  for (i64 j = 0; j < count; ++j) inverse[j] = 1.0f / top[j];
  transpose(a.dw + corner, u.inputs, count, lines, change[0], WIDE_ROW);
  const float inverse_range = 1.0f / u.range;
  for (i64 i = 0; i < lines; ++i) {
    std::fill(change[i] + count, change[i] + WIDE_ROW, 0.0f);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) change[i][j] *= inverse[j];
    if (i + AHEAD < lines)
      for (i64 plane = 0; plane < 2 * u.slices.count; ++plane) {
        const i64 ahead = ((plane * u.groups + group) * u.inputs + i0 + i + AHEAD) * u.outputs + o0;
        fetch(a.g + ahead);
        if (a.hidden) fetch(a.hidden + ahead);
        if (a.map.normal)
          for (int k = 0; k < map_planes(u.law); ++k) fetch(a.map.normal + k * a.map.cells + ahead);
      }
    std::fill(weight[i], weight[i] + count, 0.0f);
    for (i32 k = 0; k < u.slices.count; ++k) {
      alignas(64) float digit[WIDE_ROW];
      const bool whole = u.slices.count == 1;
      const bool asked = whole || digits(u.slices, change[i], k, digit);
      for (i32 side = 0; side < 2; ++side) {
        const u32 plane = (u32)(side * u.slices.count + k);
        const i64 row = group * u.inputs + i0 + i, first = ((i64)plane * u.groups * u.inputs + row) * u.outputs + o0;
        float* cells = a.g + first;
        if (asked && (side == 0 || u.law.sides != REFERENCE))
          update_row<L>(u, a, Place{plane, (u32)row, o0}, whole ? change[i] : digit, first, count);
        const float share = inverse_range * slice_weight(u.slices, k), by = side ? -share : share;
        float* sum = weight[i];
#pragma omp simd
        for (i64 j = 0; j < count; ++j) sum[j] = fma(cells[j], by, sum[j]);
      }
    }
#pragma omp simd
    for (i64 j = 0; j < count; ++j) weight[i][j] *= top[j];
  }
  transpose(weight[0], WIDE_ROW, lines, count, a.w + corner, u.inputs);
}

}  // namespace

extern "C" void gpuxbar_device_update(float* g, float* hidden, i32* pulse_count, const u16* device_map, const float* dw,
                                      float* w, const float* w_max, const Update* update, i64* bad) {
  const Update u = *update;
  const i64 size = u.groups * u.inputs * u.outputs;
  const Arrays a{g, hidden, pulse_count, DeviceMap{device_map, 2 * u.slices.count * size}, dw, w, w_max};
  *bad = count_not_finite(dw, size);
  if (*bad) return;
  const i64 row_blocks = (u.inputs + LINES - 1) / LINES, col_blocks = (u.outputs + WIDE_ROW - 1) / WIDE_ROW;
  with_law(u.law.law, [&](auto law) {
#pragma omp parallel for collapse(3) schedule(static)
    for (i64 group = 0; group < u.groups; ++group)
      for (i64 rb = 0; rb < row_blocks; ++rb)
        for (i64 cb = 0; cb < col_blocks; ++cb)
          update_block<typename decltype(law)::Type>(u, a, group, rb * LINES, cb * WIDE_ROW);
  });
}
