// quad: four neighbouring devices of one plane, which one counter draws; what the CUDA kernels that write devices share.
// Their host twin is kernels/host/cells.hpp.
#pragma once
#include "gpuxbar/four.cuh"
#include "gpuxbar/update.cuh"

namespace gpuxbar {

// Two normals of each of four neighbouring cells by the fast generator, zeros where both deviations are 0.
GPUXBAR_FN Normals8 draw_pairs(float deviations, u32 purpose, u32 group, u32 row, u32 slot, u32 step, u64 seed) {
  if (deviations == 0.0f) return Normals8{};
  return normals8_fast(counter(group, row, purpose, slot, step), (u32)seed, (u32)(seed >> 32));
}

// What the devices keep for all time: their spreads, and 1 for those that move, 0 for stuck ones.
struct Quad {
  Spreads device[4];
  float free[4];

  // `first`, `count`: index of the first cell in a plane of the map, and how many there are.
  GPUXBAR_FN void make(const UpdateLaw& s, DeviceMap map, i64 first, int count, u32 group, u32 row, u32 plane, u64 seed,
                       float stuck_low, float stuck_high) {
    const Uniforms4 stuck = draw_stuck(stuck_low + stuck_high, group, row, plane, seed);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float u = stuck.u[q];
      free[q] = u < stuck_low || u > 1.0f - stuck_high ? 0.0f : 1.0f;
    }
    if (map.normal)
      read(s, map, first, count);
    else
      draw_spreads(s, group, row, plane, seed);
  }

  GPUXBAR_FN void draw_spreads(const UpdateLaw& s, u32 group, u32 row, u32 plane, u64 seed) {
    const Normals8 step =
        draw_pairs(s.step_spread + s.asymmetry_spread, UPDATE_SPREAD_STEP, group, row, plane, 0, seed);
    const Normals8 window = draw_pairs(s.low_spread + s.high_spread, UPDATE_SPREAD_WINDOW, group, row, plane, 0, seed);
    const Normals8 shape =
        draw_pairs(abs(s.spread_up) + abs(s.spread_down), UPDATE_SPREAD_SHAPE, group, row, plane, 0, seed);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      device[q] = Spreads{step.z[2 * q],       step.z[2 * q + 1], window.z[2 * q],
                          window.z[2 * q + 1], shape.z[2 * q],    shape.z[2 * q + 1]};
  }

  GPUXBAR_FN void read(const UpdateLaw& s, DeviceMap map, i64 first, int count) {
    const bool whole = count == 4 && (((u64)map.normal >> 1 | (u64)first | (u64)map.cells) & 3) == 0;
    const auto next = [&](float spread, float Spreads::* parameter) {
      u16 bits[4] = {};
      if (spread != 0.0f) load(map.normal + first, bits, count, whole), first += map.cells;
#pragma unroll
      for (int q = 0; q < 4; ++q) device[q].*parameter = half_value(bits[q]);
    };
    next(s.step_spread, &Spreads::step);
    next(s.asymmetry_spread, &Spreads::asymmetry);
    next(s.low_spread, &Spreads::low);
    next(s.high_spread, &Spreads::high);
    next(s.spread_up, &Spreads::up);
    next(s.spread_down, &Spreads::down);
  }
};

}  // namespace gpuxbar
