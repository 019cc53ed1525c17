// measured_drift: conductances some time after they were programmed, as a table of measurements has it.
//
// Axes    P planes of R wordlines and C bitlines; C-contiguous [P, R, C].
// Launch  1-D grid-stride, four bitlines of a wordline a thread; the result does not depend on the launch.
// Random  a normal of (plane, wordline, bitline): see philox.cuh.
// Wrapper gpuxbar/ops/drift.py      Oracle gpuxbar/reference/drift.py
#include "gpuxbar/ageing.cuh"
#include "gpuxbar/four.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256) measured_drift(const float* __restrict__ g,  // [P, R, C] S
                                                                 float* __restrict__ aged,     // [P, R, C] S
                                                                 MeasuredDrift law,
                                                                 u32 step,  // of the write
                                                                 u64 seed, i64 rows, int cols,
                                                                 i64 size)  // P * R * ceil(C / 4)
{
  const i64 stride = (i64)gridDim.x * blockDim.x;
  const bool aligned = (cols & 3) == 0 && (((u64)g | (u64)aged) & 15) == 0;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const Four at(e, rows, cols);
    const Normals4 normal = draw(1.0f, DRIFT, at.group, at.row, at.plane, step, seed);
    float x[4];
    load(g + at.first, x, at.count, aligned, 0.0f);
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = changed(law, x[q], normal.z[q]);
    store(aged + at.first, x, at.count, aligned);
  }
}

}  // namespace gpuxbar
