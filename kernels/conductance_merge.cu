// conductance_merge: what batched products leave of two blocks, put in order as one block.
//
// Axes    N pairs of blocks of P x Q cells, S = 2 P + 2 Q ports, the joined side of K ports last, E = S - K others;
//         q [2 N, S, S] updated by the joint, cross [N, E, E]: from block 1 (columns) to block 2 (rows);
//         merged [N, S', S'] with the side joined next last.
// Launch  256 threads a block, which takes every gridDim-th square of 32 x 32 elements, of which S' is a multiple; the result
//         does not depend on the launch.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/parasitics.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    conductance_merge(const float* __restrict__ q, const float* __restrict__ cross, float* __restrict__ merged,
                      int block_rows, int block_cols,  // P, Q
                      int along_rows,                  // left to right, else lower to upper
                      int next_along_rows,
                      int alternate,  // odd blocks are the second of a pair at the next merge; 0: there is none
                      i64 size)       // elements of merged
{
  const int ports = 2 * (block_rows + block_cols), rest = ports - (along_rows ? block_rows : block_cols);
  const int rows = along_rows ? block_rows : 2 * block_rows, cols = along_rows ? 2 * block_cols : block_cols;
  const int wide = 2 * (rows + cols);
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5, across = wide / 32;
  const int squares = (int)(size / ((i64)wide * wide)) * across * across;
  __shared__ Place of_rows[32];
  for (int at = blockIdx.x; at < squares; at += gridDim.x) {
    const int strip = at / across, pair = strip / across;
    const int row0 = (strip - pair * across) * 32, col = (at - strip * across) * 32 + x;
    const bool second = (pair & alternate) != 0;
    if (y == 0) of_rows[x] = source_of(row0 + x, rows, cols, next_along_rows, second, along_rows);
    const Place j = source_of(col, rows, cols, next_along_rows, second, along_rows);
    __syncthreads();
#pragma unroll
    for (int step = y; step < y + 32; step += 8) {
      const Place i = of_rows[step];
      const i64 e = ((i64)pair * wide + row0 + step) * wide + col;
      if (i.block == j.block)
        merged[e] = q[((2 * (i64)pair + i.block) * ports + i.at) * ports + j.at];
      else
        merged[e] = cross[((i64)pair * rest + (i.block ? i.at : j.at)) * rest + (i.block ? j.at : i.at)];
    }
    __syncthreads();
  }
}

}  // namespace gpuxbar
