// inverse: the inverse of a small matrix by Gauss and Jordan, without pivots, one of its columns in a thread.
//
// CUDA only.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// One of K steps on a column; `pivot`: the step's column before it. The step's row is the first, and becomes the last.
template <int K>
__device__ __forceinline__ void eliminate(const float (&pivot)[K], bool is_pivot, float (&column)[K]) {
  const float row = (is_pivot ? 1.0f : column[0]) * (1.0f / pivot[0]);
#pragma unroll
  for (int i = 1; i < K; ++i) column[i - 1] = fma(-pivot[i], row, is_pivot ? 0.0f : column[i]);
  column[K - 1] = row;
}

// Column j of a matrix, held by K neighbouring threads, becomes that of its inverse; LANES: those of a warp that hold any.
template <u32 LANES, int K>
__device__ __forceinline__ void invert(int j, float (&column)[K]) {
#pragma unroll 1
  for (int t = 0; t < K; ++t) {
    float pivot[K];
#pragma unroll
    for (int i = 0; i < K; ++i) pivot[i] = __shfl_sync(LANES, column[i], t, K);
    eliminate(pivot, j == t, column);
  }
}

}  // namespace gpuxbar
