// relax: what devices lose between updates, in place.
//
// Axes    P planes of R wordlines and C bitlines; C-contiguous [P, R, C].
// Launch  1-D grid-stride, four bitlines of a wordline a thread; the result does not depend on the launch.
// Random  normals and uniforms of (plane, wordline, bitline): see philox.cuh.
// Wrapper gpuxbar/ops/relax.py      Oracle gpuxbar/reference/relax.py
#include "gpuxbar/ageing.cuh"
#include "gpuxbar/four.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    relax(float* __restrict__ g,                // [P, R, C] S
          const int* __restrict__ pulse_count,  // like g, below 0: failed devices, which stay; or null
          Retention law, u64 seed, i64 rows, int cols,
          i64 size)  // P * R * ceil(C / 4)
{
  const i64 stride = (i64)gridDim.x * blockDim.x;
  const bool aligned = (cols & 3) == 0 && ((u64)g & 15) == 0;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const Four at(e, rows, cols);
    const Normals4 z = draw(law.spread, RETENTION, at.group, at.row, at.plane, 0, seed);
    const Uniforms4 stuck = draw_stuck(law.stuck_low + law.stuck_high, at.group, at.row, at.plane, seed);
    float x[4];
    load(g + at.first, x, at.count, aligned, 0.0f);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool failed = pulse_count && q < at.count && pulse_count[at.first + q] < 0;
      x[q] = failed ? x[q] : relaxed(law, x[q], z.z[q], stuck.u[q]);
    }
    store(g + at.first, x, at.count, aligned);
  }
}

}  // namespace gpuxbar
