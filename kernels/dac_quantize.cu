// dac_quantize: digital values to DAC codes.
//
// Axes    n leading indices with a step of their own or one for all, each of per_row values; C-contiguous [n, per_row].
// Launch  1-D grid-stride, four values a thread; the result does not depend on the launch.
// Wrapper gpuxbar/ops/dac_quantize.py      Oracle gpuxbar/reference/dac_quantize.py
#include "gpuxbar/converter.cuh"
#include "gpuxbar/four.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    dac_quantize(const float* __restrict__ x,    // [n, per_row]  digital value, finite
                 const float* __restrict__ lsb,  // [1] or [n]    value of one code, above 0
                 i16* __restrict__ codes,        // [n, per_row]
                 float code_min, float code_max, i64 per_row, i64 lsb_count, i64 size)  // size = n * per_row
{
  const i64 stride = 4 * (i64)gridDim.x * blockDim.x;
  const bool whole = (((u64)x & 15) | ((u64)codes & 7)) == 0;
  for (i64 e = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x); e < size; e += stride) {
    const int count = size - e < 4 ? (int)(size - e) : 4;
    float value[4];
    load(x + e, value, count, whole && count == 4, 0.0f);
    const float* of = lsb;  // the step of the value at hand, and how many values from e on it and those before it have
    int end = 4;
    if (lsb_count > 1) {
      const i64 n = e / per_row, left = (n + 1) * per_row - e;
      of += n, end = left < 4 ? (int)left : 4;
    }
    float inverse = 1.0f / *of;
    i16 code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i == end && i < count) inverse = 1.0f / *++of, end += per_row < 4 ? (int)per_row : 4;
      code[i] = (i16)(i32)dac_code(value[i], inverse, code_min, code_max);
    }
    if (whole && count == 4) {
      *(short4*)(codes + e) = make_short4(code[0], code[1], code[2], code[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) codes[e + i] = code[i];
    }
  }
}

}  // namespace gpuxbar
