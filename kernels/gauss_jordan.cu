// gauss_jordan: the inverse of many small matrices, in place, without pivots.
//
// Axes    m: N matrices of `size` rows and columns, `stride` apart, `ld` a row; size at most 32.
// Launch  8 warps a block, a matrix a warp; grid ceil(N / 8).
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle numpy.linalg.inv
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

constexpr int WARPS = 8, SIDE = 32;

extern "C" __global__ void __launch_bounds__(256)
    gauss_jordan(float* __restrict__ m, int size, int ld, i64 stride, i64 count,
                 float diagonal)  // added to the diagonal before
{
  __shared__ float square[WARPS][SIDE][SIDE + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 which = (i64)blockIdx.x * WARPS + warp;
  if (which >= count) return;
  float* const own = m + which * stride;
  float (*a)[SIDE + 1] = square[warp];
  for (int i = 0; i < size; ++i)
    if (lane < size) a[i][lane] = own[(i64)i * ld + lane] + (i == lane ? diagonal : 0.0f);
  __syncwarp();
  for (int t = 0; t < size; ++t) {
    const float inverse = 1.0f / a[t][t];
    const float row = (lane == t ? 1.0f : a[t][lane]) * inverse;
    float column[SIDE];
#pragma unroll
    for (int i = 0; i < SIDE; ++i) column[i] = i < size ? a[i][t] : 0.0f;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < SIDE; ++i)
      if (i < size && lane < size) a[i][lane] = i == t ? row : fma(-column[i], row, lane == t ? 0.0f : a[i][lane]);
    __syncwarp();
  }
  for (int i = 0; i < size; ++i)
    if (lane < size) own[(i64)i * ld + lane] = a[i][lane];
}

}  // namespace gpuxbar
