// quad: four neighbouring devices of one plane, which one counter draws; what the CUDA kernels that write devices share.
// Their host twin is kernels/host/cells.hpp.
#pragma once
#include "gpuxbar/update.cuh"

namespace gpuxbar {

// Normals of four neighbouring cells, zeros where their standard deviation is 0.
GPUXBAR_FN Normals4 draw(float deviation, u32 purpose, u32 group, u32 row, u32 slot, u32 step, u64 seed) {
  if (deviation == 0.0f) return Normals4{};
  return normals4(counter(group, row, purpose, slot, step), (u32)seed, (u32)(seed >> 32));
}

// What the devices keep for all time: their spreads, and 1 for those that move, 0 for stuck ones.
struct Quad {
  Spreads device[4];
  float free[4];

  GPUXBAR_FN void make(const UpdateLaw& s, u32 group, u32 row, u32 plane, u64 seed, float stuck_low, float stuck_high) {
    const Normals4 size = draw(s.step_spread, UPDATE_SPREAD_STEP, group, row, plane, 0, seed);
    const Normals4 asymmetry = draw(s.asymmetry_spread, UPDATE_SPREAD_ASYMMETRY, group, row, plane, 0, seed);
    const Normals4 low = draw(s.low_spread, UPDATE_SPREAD_LOW, group, row, plane, 0, seed);
    const Normals4 high = draw(s.high_spread, UPDATE_SPREAD_HIGH, group, row, plane, 0, seed);
    const Normals4 up = draw(s.spread_up, UPDATE_SPREAD_UP, group, row, plane, 0, seed);
    const Normals4 down = draw(s.spread_down, UPDATE_SPREAD_DOWN, group, row, plane, 0, seed);
    Counter words = {0x80000000u, 0x80000000u, 0x80000000u, 0x80000000u};
    if (stuck_low + stuck_high > 0.0f)
      words = philox<10>(counter(group, row, STUCK, plane, 0), (u32)seed, (u32)(seed >> 32));
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float u = uniform(word[q]);
      free[q] = u < stuck_low || u > 1.0f - stuck_high ? 0.0f : 1.0f;
      device[q] = Spreads{size.z[q], asymmetry.z[q], low.z[q], high.z[q], up.z[q], down.z[q]};
    }
  }
};

}  // namespace gpuxbar
