// conductance_out: the effective conductances of tiles, out of their last merge.
//
// Axes    g_eff [T, R, C]; the tile is padded to `high` x `wide` cells, at the top and the right.
//         direct: the left and lower side of one block (the lower, the left or the only one), `direct_ld` a row;
//         cross: from the other block, null if there is none: [T, high / 2, wide] from its left side where the last
//         merge joined lower to upper, [T, wide / 2, high] from its lower side where it joined left to right.
// Launch  1-D grid-stride over g_eff; the result does not depend on the launch.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    conductance_out(const float* __restrict__ direct, const float* __restrict__ cross, float* __restrict__ g_eff,
                    i64 direct_stride, int direct_ld, int along_rows, int rows, int cols, int high, int wide,
                    i64 size) {
  const i64 stride = (i64)gridDim.x * blockDim.x;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const i64 tile = e / ((i64)rows * cols);
    int row = (int)(e / cols % rows) + high - rows;
    const int col = (int)(e % cols);
    const bool other = cross && (along_rows ? col >= wide / 2 : row < high / 2);
    if (other) {
      const i64 at = along_rows ? (i64)(col - wide / 2) * high + row : (i64)row * wide + col;
      g_eff[e] = -cross[tile * (along_rows ? wide / 2 * high : high / 2 * wide) + at];
    } else {
      if (cross && !along_rows) row -= high / 2;
      g_eff[e] = -direct[tile * direct_stride + (i64)row * direct_ld + col];
    }
  }
}

}  // namespace gpuxbar
