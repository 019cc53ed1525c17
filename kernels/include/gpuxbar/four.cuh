// four: four neighbouring cells of a wordline, which one counter draws and one thread of the CUDA kernels handles.
// The host handles whole rows: kernels/host/draw.hpp.
#pragma once
#include "gpuxbar/normal.cuh"

namespace gpuxbar {

// The e-th four of planes of `rows` wordlines and `cols` bitlines, [P, R, C].
struct Four {
  u32 group, row, plane;  // group: of columns 4 group .. 4 group + 3
  i64 first;              // index of the first cell
  int count;              // how many of them exist

  GPUXBAR_FN Four(i64 e, i64 rows, int cols) {
    const i64 groups = (cols + 3) / 4;
    group = (u32)(e % groups), row = (u32)(e / groups % rows), plane = (u32)(e / groups / rows);
    first = (e / groups) * cols + 4 * (i64)group;
    count = cols - 4 * (int)group < 4 ? cols - 4 * (int)group : 4;
  }
};

// Values of the cells that exist, `otherwise` for the others; `whole`: all exist, at a multiple of 16 bytes.
GPUXBAR_FN void load(const float* from, float to[4], int count, bool whole, float otherwise) {
  if (whole) {
    const float4 v = *(const float4*)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) to[q] = q < count ? from[q] : otherwise;
  }
}

// The same of halves; `whole`: at a multiple of 8 bytes.
GPUXBAR_FN void load(const u16* from, float to[4], int count, bool whole, float otherwise) {
  if (whole) {
    const uint2 v = *(const uint2*)from;
    half_values(v.x, to[0], to[1]), half_values(v.y, to[2], to[3]);
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) to[q] = q < count ? half_value(from[q]) : otherwise;
  }
}

GPUXBAR_FN void store(float* to, const float from[4], int count, bool whole) {
  if (whole) {
    *(float4*)to = make_float4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (q < count) to[q] = from[q];
  }
}

// Normals of four cells, zeros where their standard deviation is 0. `key`: the seed, or `RoundKeys` of it.
template <class Key>
GPUXBAR_FN Normals4 draw(float deviation, u32 purpose, u32 group, u32 row, u32 slot, u32 step, const Key& key) {
  if (deviation == 0.0f) return Normals4{};
  return normals4(counter(group, row, purpose, slot, step), key);
}

struct Uniforms4 {
  float u[4];
};

// Uniforms that say which of four cells are stuck, as compared with their rates; 1/2 where both rates are 0.
template <class Key>
GPUXBAR_FN Uniforms4 draw_stuck(float rates, u32 group, u32 row, u32 plane, const Key& key) {
  if (rates <= 0.0f) return Uniforms4{{0.5f, 0.5f, 0.5f, 0.5f}};
  const Counter w = philox<10>(counter(group, row, STUCK, plane, 0), key);
  return Uniforms4{{uniform(w.x), uniform(w.y), uniform(w.z), uniform(w.w)}};
}

}  // namespace gpuxbar
