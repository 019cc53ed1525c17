// ladder: the effective conductances of tiles with every line on its own, or of first order in the resistances.
//
// Axes    g, g_eff, share [T, R, C].
// Launch  one block of 256 threads a tile, a thread a line; grid T.
// Macros  FIRST_ORDER: relative drops are added instead of factors multiplied.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/parasitics.cuh"

#ifndef FIRST_ORDER
#define FIRST_ORDER 0
#endif

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256, 2)
    ladder(const float* __restrict__ g,           // [T, R, C] S
           const float* __restrict__ r_wordline,  // [R] ohm, or null: wordline_value; the others alike
           const float* __restrict__ r_bitline, const float* __restrict__ r_source, const float* __restrict__ r_sink,
           float* __restrict__ share,  // scratch
           float* __restrict__ g_eff, float wordline_value, float bitline_value, float source_value, float sink_value,
           int rows, int cols) {
  const i64 tile = (i64)blockIdx.x * rows * cols;
  const Wires wires{r_wordline, r_bitline, r_source, r_sink, wordline_value, bitline_value, source_value, sink_value};
  const float* const from = g + tile;
  float* const along = share + tile;
  float* const down = g_eff + tile;
  for (int r = threadIdx.x; r < rows; r += blockDim.x)
    walk<FIRST_ORDER>(from + (i64)r * cols, along + (i64)r * cols, cols, 1, wires.at_source(r), wires.along(r));
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    const i64 last = (i64)(rows - 1) * cols + c;
    walk<FIRST_ORDER>(from + last, down + last, rows, -(i64)cols, wires.at_sink(c), wires.down(c));
  }
  __syncthreads();
  for (int e = threadIdx.x; e < rows * cols; e += blockDim.x)
    down[e] = from[e] * (FIRST_ORDER ? 1.0f - along[e] - down[e] : along[e] * down[e]);
}

}  // namespace gpuxbar
