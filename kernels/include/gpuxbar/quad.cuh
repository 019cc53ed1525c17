// quad: four neighbouring devices of one plane, which one counter draws; what the CUDA kernels that write devices share.
// Their host twin is kernels/host/cells.hpp.
//
// Macros  LAW  the law (enum Law)    SIDES  its `sides`    TRAITS  what it has (enum Trait)
//         MAPPED  devices come from a map
#pragma once
#include "gpuxbar/four.cuh"
#include "gpuxbar/update.cuh"

#ifndef LAW
#define LAW 0
#endif
#ifndef SIDES
#define SIDES 0
#endif
#ifndef TRAITS
#define TRAITS 0x1FFF
#endif
#ifndef MAPPED
#define MAPPED 0
#endif

namespace gpuxbar {

// The law as it is compiled. Those with tables are taken as they come, for a copy of a table would lie in local memory.
GPUXBAR_FN decltype(auto) compiled(const UpdateLaw& law) {
  if constexpr (LAW < PIECEWISE_STEP) {
    UpdateLaw s = with_traits<TRAITS>(law);
    s.sides = SIDES;
    return s;
  } else {
    return (law);
  }
}

// Two normals of each of four neighbouring cells by the fast generator, zeros unless `wanted`.
GPUXBAR_FN Normals8 draw_pairs(bool wanted, u32 purpose, u32 group, u32 row, u32 slot, u32 step,
                               const RoundKeys& keys) {
  if (!wanted) return Normals8{};
  return normals8_fast(counter(group, row, purpose, slot, step), keys);
}

// Which of four devices are stuck, a bit each; none where both rates are 0.
GPUXBAR_FN u32 stuck_ones(float stuck_low, float stuck_high, u32 group, u32 row, u32 plane, const RoundKeys& keys) {
  const Uniforms4 stuck = draw_stuck(stuck_low + stuck_high, group, row, plane, keys);
  u32 ones = 0;
#pragma unroll
  for (int q = 0; q < 4; ++q) ones |= (u32)(stuck.u[q] < stuck_low || stuck.u[q] > 1.0f - stuck_high) << q;
  return ones;
}

// What the devices keep for all time. `first`, `count`: index of the first cell in a plane of the map, and how many there
// are.
struct Quad {
  Spreads device[4];

  GPUXBAR_FN void make(DeviceMap map, i64 first, int count, u32 group, u32 row, u32 plane, const RoundKeys& keys) {
    if (!MAPPED)
      draw_spreads(group, row, plane, keys);
    else if (count == 4 && (((u64)map.normal >> 1 | (u64)first | (u64)map.cells) & 3) == 0)
      read(map, first, 4, true);
    else
      read(map, first, count, false);
  }

  GPUXBAR_FN void draw_spreads(u32 group, u32 row, u32 plane, const RoundKeys& keys) {
    const auto drawn = [&](u32 traits, u32 purpose) {
      return draw_pairs((TRAITS & traits) != 0, purpose, group, row, plane, 0, keys);
    };
    const Normals8 step = drawn(STEP_SPREAD | ASYMMETRY_SPREAD, UPDATE_SPREAD_STEP);
    const Normals8 window = drawn(LOW_SPREAD | HIGH_SPREAD, UPDATE_SPREAD_WINDOW);
    const Normals8 shape = drawn(SPREAD_UP | SPREAD_DOWN, UPDATE_SPREAD_SHAPE);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      device[q] = Spreads{step.z[2 * q],       step.z[2 * q + 1], window.z[2 * q],
                          window.z[2 * q + 1], shape.z[2 * q],    shape.z[2 * q + 1]};
  }

  GPUXBAR_FN void read(DeviceMap map, i64 first, int count, bool whole) {
    const u16* at = map.normal + first;
    const auto next = [&](u32 trait, float Spreads::* parameter) {
      float z[4] = {};
      if (TRAITS & trait) load(at, z, count, whole, 0.0f), at += map.cells;
#pragma unroll
      for (int q = 0; q < 4; ++q) device[q].*parameter = z[q];
    };
    next(STEP_SPREAD, &Spreads::step);
    next(ASYMMETRY_SPREAD, &Spreads::asymmetry);
    next(LOW_SPREAD, &Spreads::low);
    next(HIGH_SPREAD, &Spreads::high);
    next(SPREAD_UP, &Spreads::up);
    next(SPREAD_DOWN, &Spreads::down);
  }
};

}  // namespace gpuxbar
