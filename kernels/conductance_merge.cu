// conductance_merge: what batched products leave of two blocks, put in order as one block.
//
// Axes    N pairs of blocks of P x Q cells, S = 2 P + 2 Q ports, the joined side of K ports last, E = S - K others;
//         q [2 N, S, S] updated by the joint, cross [N, E, E]: from block 1 (columns) to block 2 (rows);
//         merged [N, S', S'] with the side joined next last.
// Launch  1-D grid-stride over merged; the result does not depend on the launch.
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
  const i64 stride = (i64)gridDim.x * blockDim.x;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const i64 pair = e / ((i64)wide * wide);
    const Place i = source_of((int)(e / wide % wide), rows, cols, next_along_rows, pair & alternate, along_rows);
    const Place j = source_of((int)(e % wide), rows, cols, next_along_rows, pair & alternate, along_rows);
    if (i.block == j.block)
      merged[e] = q[((2 * pair + i.block) * ports + i.at) * ports + j.at];
    else
      merged[e] = cross[(pair * rest + (i.block ? i.at : j.at)) * rest + (i.block ? j.at : i.at)];
  }
}

}  // namespace gpuxbar
