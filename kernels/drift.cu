// drift: conductances some time after they were programmed.
//
// Axes    P planes of R wordlines and C bitlines; C-contiguous [P, R, C].
// Launch  1-D grid-stride, four bitlines of a wordline a thread; the result does not depend on the launch.
// Random  normals of (plane, wordline, bitline): see philox.cuh.
// Wrapper gpuxbar/ops/drift.py      Oracle gpuxbar/reference/drift.py
#include "gpuxbar/ageing.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256) drift(const float* __restrict__ g,  // [P, R, C] S
                                                        float* __restrict__ aged,     // [P, R, C] S
                                                        Drift law,
                                                        u32 step,          // of the write, for exponents
                                                        u32 flicker_step,  // of the write and the age, for noise
                                                        u64 seed, i64 rows, int cols,
                                                        i64 size)  // P * R * ceil(C / 4)
{
  const i64 stride = (i64)gridDim.x * blockDim.x, groups = (cols + 3) / 4;
  const bool aligned = (cols & 3) == 0 && (((u64)g | (u64)aged) & 15) == 0;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const u32 group = (u32)(e % groups), row = (u32)(e / groups % rows), plane = (u32)(e / groups / rows);
    const i64 first = (e / groups) * cols + 4 * (i64)group;
    const int count = cols - 4 * (int)group < 4 ? cols - 4 * (int)group : 4;
    Normals4 nu{}, flicker{};
    if (law.std_max > 0.0f) nu = normals4(counter(group, row, DRIFT, plane, step), (u32)seed, (u32)(seed >> 32));
    if (law.flicker > 0.0f)
      flicker = normals4(counter(group, row, FLICKER, plane, flicker_step), (u32)seed, (u32)(seed >> 32));
    float x[4] = {};
    if (aligned) {
      const float4 v = *(const float4*)(g + first);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
      for (int q = 0; q < count; ++q) x[q] = g[first + q];
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = drifted(law, x[q], nu.z[q], flicker.z[q]);
    if (aligned)
      *(float4*)(aged + first) = make_float4(x[0], x[1], x[2], x[3]);
    else
      for (int q = 0; q < count; ++q) aged[first + q] = x[q];
  }
}

}  // namespace gpuxbar
