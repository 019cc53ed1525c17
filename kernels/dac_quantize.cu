// dac_quantize: digital values to DAC codes.
//
// Axes    n leading indices with a step of their own or one for all, each of per_row values; C-contiguous [n, per_row].
// Launch  1-D grid-stride, four values a thread; the result does not depend on the launch.
// Wrapper gpuxbar/ops/dac_quantize.py      Oracle gpuxbar/reference/dac_quantize.py
#include "gpuxbar/converter.cuh"

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
    float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (whole && count == 4) {
      const float4 v = *(const float4*)(x + e);
      value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
    } else {
      for (int i = 0; i < count; ++i) value[i] = x[e + i];
    }
    i16 code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float inverse = 1.0f / lsb[lsb_count > 1 && i < count ? (e + i) / per_row : 0];
      code[i] = (i16)(i32)dac_code(value[i], inverse, code_min, code_max);
    }
    if (whole && count == 4)
      *(short4*)(codes + e) = make_short4(code[0], code[1], code[2], code[3]);
    else
      for (int i = 0; i < count; ++i) codes[e + i] = code[i];
  }
}

}  // namespace gpuxbar
