// gauss_jordan: the inverse of many small matrices, in place, without pivots.
//
// Axes    m: N matrices of SIZE rows and columns, `stride` apart, `ld` a row.
// Launch  256 threads a block, a column a thread; grid ceil(N SIZE / 256).
// Macros  SIZE: 16 or 32.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle numpy.linalg.inv
#include "gpuxbar/inverse.cuh"

#ifndef SIZE
#define SIZE 32
#endif

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    gauss_jordan(float* __restrict__ m, int ld, i64 stride, i64 count, float diagonal)  // added to the diagonal before
{
  const i64 which = ((i64)blockIdx.x * 256 + threadIdx.x) / SIZE;
  const int j = threadIdx.x % SIZE;
  float* const own = m + which * stride + j;
  float column[SIZE];
#pragma unroll
  for (int i = 0; i < SIZE; ++i) column[i] = (which < count ? own[(i64)i * ld] : 0.0f) + (i == j ? diagonal : 0.0f);
  invert<~0u>(j, column);
  if (which >= count) return;
#pragma unroll
  for (int i = 0; i < SIZE; ++i) own[(i64)i * ld] = column[i];
}

}  // namespace gpuxbar
