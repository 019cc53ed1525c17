// chop: signs of wordlines that flip at random, in place.
//
// Axes    sign [G, I]; n of the wordlines, the same in every group.
// Launch  1-D grid-stride, a sign a thread; the result does not depend on the launch.
// Random  a uniform of (group and wordline, step): see philox.cuh; `step` is read from memory where given.
// Wrapper gpuxbar/ops/chop.py      Oracle gpuxbar/reference/chop.py
#include "gpuxbar/philox.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    chop(float* __restrict__ sign,       // [G, I]
         const i64* __restrict__ lines,  // [n]  wordlines, each at most once
         const i64* __restrict__ step,   // [1], or null: step_value
         i64 step_value, u64 seed,
         u32 flips,  // of the 2^24 values that a draw may have
         i64 inputs, i64 count,
         i64 size)  // G * n
{
  const i64 stride = (i64)gridDim.x * blockDim.x;
  const u32 when = (u32)(step ? *step : step_value);
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const i64 row = e / count * inputs + lines[e % count];
    const Counter words = philox<10>(counter(0, (u32)row, CHOPPER, 0, when), (u32)seed, (u32)(seed >> 32));
    if (words.x >> 8 < flips) sign[row] = -sign[row];
  }
}

}  // namespace gpuxbar
