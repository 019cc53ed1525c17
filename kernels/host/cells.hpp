// Rows of cells for the host kernels that write devices: their spreads, and the choice of the law.
#pragma once
#include <algorithm>
#include <utility>

#include "draw.hpp"
#include "gpuxbar/update.cuh"

namespace gpuxbar {

// 64 cells of one plane: a wordline, from bitline col0.
struct Place {
  u32 plane, row;
  i64 col0;
};

// Planes of a map of devices of this law.
static inline int map_planes(const UpdateLaw& s) {
  return (s.step_spread != 0.0f) + (s.asymmetry_spread != 0.0f) + (s.low_spread != 0.0f) + (s.high_spread != 0.0f) +
         (s.spread_up != 0.0f) + (s.spread_down != 0.0f);
}

// The spreads of a row of devices; parameters without spread draw nothing.
struct Draws {
  alignas(64) float step[WIDE_ROW] = {}, asymmetry[WIDE_ROW] = {}, low[WIDE_ROW] = {}, high[WIDE_ROW] = {},
                    up[WIDE_ROW] = {}, down[WIDE_ROW] = {};

  // `first`, `count`: index of the row's first cell in a plane of the map, and how many there are.
  Draws(const UpdateLaw& s, DeviceMap map, i64 first, i64 count, const Place& at, u64 seed) {
    if (map.normal) {
      const auto next = [&](float spread, float* to) {
        if (spread == 0.0f) return;
#pragma omp simd
        for (i64 j = 0; j < count; ++j) to[j] = half_value(map.normal[first + j]);
        map.normal += map.cells;
      };
      next(s.step_spread, step);
      next(s.asymmetry_spread, asymmetry);
      next(s.low_spread, low);
      next(s.high_spread, high);
      next(s.spread_up, up);
      next(s.spread_down, down);
      return;
    }
    const auto draw = [&](float spread, Purpose purpose, float* a, float* b) {
      if (spread != 0.0f) draw_pairs(Draw{purpose, at.plane, 0, seed}, at.row, at.col0, a, b);
    };
    draw(s.step_spread + s.asymmetry_spread, UPDATE_SPREAD_STEP, step, asymmetry);
    draw(s.low_spread + s.high_spread, UPDATE_SPREAD_WINDOW, low, high);
    draw(abs(s.spread_up) + abs(s.spread_down), UPDATE_SPREAD_SHAPE, up, down);
  }
};

GPUXBAR_FN Spreads spreads(const Draws& z, int j) {
  return Spreads{z.step[j], z.asymmetry[j], z.low[j], z.high[j], z.up[j], z.down[j]};
}

// `moved` for cell j of a row; a struct made in a simd loop itself would keep it from vectorising.
template <class L>
GPUXBAR_FN float moved_cell(const UpdateLaw& s, const Draws& z, int j, float x, float d, bool rising, float noise) {
  return moved<L>(s, spreads(z, j), x, d, rising, noise, s.scatter);
}

static inline bool noisy(const UpdateLaw& s) {
  return s.law == LOOKUP_TABLE || s.gamma2 + s.cycle2 + s.pulse_cycle2 + s.range_cycle2 > 0.0f;
}

// 1 for cells that move, 0 for stuck ones.
static inline void draw_free(float stuck_low, float stuck_high, const Place& at, u64 seed, float* free) {
  if (stuck_low + stuck_high > 0.0f) {
    draw_uniforms(Draw{STUCK, at.plane, 0, seed}, at.row, at.col0, free);
    for (int j = 0; j < WIDE_ROW; ++j) free[j] = free[j] < stuck_low || free[j] > 1.0f - stuck_high ? 0.0f : 1.0f;
  } else {
    std::fill(free, free + WIDE_ROW, 1.0f);
  }
}

static inline i64 count_not_finite(const float* values, i64 size) {
  constexpr i64 PIECE = 4096;  // counts of a piece stay in the lanes that compare
  i64 count = 0;
  for (i64 first = 0; first < size; first += PIECE) {
    const i64 end = std::min(first + PIECE, size);
    u32 found = 0;
#pragma omp simd reduction(+ : found)
    for (i64 e = first; e < end; ++e) found += (float_bits(values[e]) & 0x7F800000u) == 0x7F800000u;
    count += found;
  }
  return count;
}

template <int KIND>
struct LawTag {
  using Type = LawOf<KIND>;
};

// Call work with the tag of a law known at run time.
template <int KIND = 0, class Work>
void with_law(i32 law, Work&& work) {
  if constexpr (KIND <= LOOKUP_TABLE) {
    if (law == KIND)
      work(LawTag<KIND>{});
    else
      with_law<KIND + 1>(law, std::forward<Work>(work));
  }
}

}  // namespace gpuxbar
