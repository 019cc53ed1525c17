// ladder: the effective conductances of tiles with every line on its own, or of first order in the resistances.
//
// Axes    g, g_eff, share [T, R, C].
// Launch  one block of 256 threads a tile, a warp 32 lines; grid T.
// Macros  FIRST_ORDER: relative drops are added instead of factors multiplied.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/parasitics.cuh"

#ifndef FIRST_ORDER
#define FIRST_ORDER 0
#endif

namespace gpuxbar {

constexpr int WARPS = 8, SIDE = 32;

// Cells of `count` wordlines in a square, a column a lane where there is one, from an array or to it; the warp sees them then.
using Square = float[SIDE + 1];
GPUXBAR_FN void take(Square* square, const float* from, int cols, int count, bool real) {
  const int lane = threadIdx.x & 31;
#pragma unroll 8
  for (int i = 0; i < count; ++i)
    if (real) square[i][lane] = from[(i64)i * cols];
  __syncwarp();
}
GPUXBAR_FN void give(const Square* square, float* to, int cols, int count, bool real) {
  const int lane = threadIdx.x & 31;
  __syncwarp();
#pragma unroll 8
  for (int i = 0; i < count; ++i)
    if (real) to[(i64)i * cols] = square[i][lane];
  __syncwarp();
}

// 32 wordlines from `first` on, by a warp: 32 cells of each at a time in shared memory, so that every access runs along its
// array.
GPUXBAR_FN void walk_wordlines(const float* g, float* share, Square* square, const Wires& wires, int first, int rows,
                               int cols) {
  const int lane = threadIdx.x & 31, count = rows - first < SIDE ? rows - first : SIDE;
  const int row = lane < count ? first + lane : first;
  const float end = wires.at_source(row), segment = wires.along(row);
  const i64 start = (i64)first * cols + lane;
  float beyond = 0.0f, reach = FIRST_ORDER ? 0.0f : 1.0f;
  for (int c0 = (cols - 1) / SIDE * SIDE; c0 >= 0; c0 -= SIDE) {
    take(square, g + start + c0, cols, count, c0 + lane < cols);
    for (int j = (cols - c0 < SIDE ? cols - c0 : SIDE) - 1; j >= 0; --j)
      square[lane][j] = walk_back<FIRST_ORDER>(square[lane][j], c0 + j ? segment : end, beyond);
    give(square, share + start + c0, cols, count, c0 + lane < cols);
  }
  for (int c0 = 0; c0 < cols; c0 += SIDE) {
    take(square, share + start + c0, cols, count, c0 + lane < cols);
    for (int j = 0; j < SIDE && c0 + j < cols; ++j) square[lane][j] = walk_on<FIRST_ORDER>(square[lane][j], reach);
    give(square, share + start + c0, cols, count, c0 + lane < cols);
  }
}

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
  __shared__ float squares[WARPS][SIDE][SIDE + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wordlines = (rows + SIDE - 1) / SIDE;
  for (int strip = warp; strip < wordlines + (cols + SIDE - 1) / SIDE; strip += WARPS) {  // of 32 lines
    const int c = (strip - wordlines) * SIDE + lane;
    const i64 last = (i64)(rows - 1) * cols + c;
    if (strip < wordlines)
      walk_wordlines(from, along, squares[warp], wires, strip * SIDE, rows, cols);
    else if (c < cols)
      walk<FIRST_ORDER>(from + last, down + last, rows, -(i64)cols, wires.at_sink(c), wires.down(c));
  }
  __syncthreads();
  for (int e = threadIdx.x; e < rows * cols; e += blockDim.x)
    down[e] = from[e] * (FIRST_ORDER ? 1.0f - along[e] - down[e] : along[e] * down[e]);
}

}  // namespace gpuxbar
