// relax: what devices lose between updates, in place.
//
// Axes    P planes of R wordlines and C bitlines; C-contiguous [P, R, C].
// Launch  1-D grid-stride, four bitlines of a wordline a thread; the result does not depend on the launch.
// Random  normals and uniforms of (plane, wordline, bitline): see philox.cuh.
// Wrapper gpuxbar/ops/relax.py      Oracle gpuxbar/reference/relax.py
#include "gpuxbar/ageing.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    relax(float* __restrict__ g,                // [P, R, C] S
          const int* __restrict__ pulse_count,  // like g, below 0: failed devices, which stay; or null
          Retention law, u64 seed, i64 rows, int cols,
          i64 size)  // P * R * ceil(C / 4)
{
  const i64 stride = (i64)gridDim.x * blockDim.x, groups = (cols + 3) / 4;
  const bool aligned = (cols & 3) == 0 && ((u64)g & 15) == 0;
  const u32 key_lo = (u32)seed, key_hi = (u32)(seed >> 32);
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const u32 group = (u32)(e % groups), row = (u32)(e / groups % rows), plane = (u32)(e / groups / rows);
    const i64 first = (e / groups) * cols + 4 * (i64)group;
    const int count = cols - 4 * (int)group < 4 ? cols - 4 * (int)group : 4;
    Normals4 z{};
    Counter words = {0x80000000u, 0x80000000u, 0x80000000u, 0x80000000u};
    if (law.spread > 0.0f) z = normals4(counter(group, row, RETENTION, plane, 0), key_lo, key_hi);
    if (law.stuck_low + law.stuck_high > 0.0f) words = philox<10>(counter(group, row, STUCK, plane, 0), key_lo, key_hi);
    const u32 word[4] = {words.x, words.y, words.z, words.w};
    float x[4] = {};
    if (aligned) {
      const float4 v = *(const float4*)(g + first);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
      for (int q = 0; q < count; ++q) x[q] = g[first + q];
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool failed = pulse_count && q < count && pulse_count[first + q] < 0;
      x[q] = failed ? x[q] : relaxed(law, x[q], z.z[q], uniform(word[q]));
    }
    if (aligned)
      *(float4*)(g + first) = make_float4(x[0], x[1], x[2], x[3]);
    else
      for (int q = 0; q < count; ++q) g[first + q] = x[q];
  }
}

}  // namespace gpuxbar
