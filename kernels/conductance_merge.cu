// conductance_merge: what batched products leave of two blocks, put in order as one block.
//
// Axes    N pairs of blocks of P x Q cells, S = 2 P + 2 Q ports, the joined side of K ports last, E = S - K others;
//         q [2 N, S, S] updated by the joint, cross [N, E, E]: from block 1 (columns) to block 2 (rows);
//         merged [N, S', S'] with the side joined next last.
// Launch  8 warps a block, which take every gridDim-th eight of pieces of 16 x 32 elements; S' is a multiple of 32, sides of
//         16. The result does not depend on the launch.
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
  const int lane = threadIdx.x & 31, across = wide / 32, each = across * (wide / 16);
  const int pieces = (int)(size / (16 * 32)), step = gridDim.x * 8;
  for (int at = blockIdx.x * 8 + (threadIdx.x >> 5); at < pieces; at += step) {
    const int pair = at / each, strip = (at - pair * each) / across;
    const int row = strip * 16 + lane / 8 * 4, col = (at - pair * each - strip * across) * 32 + lane % 8 * 4;
    const bool second = (pair & alternate) != 0;
    const Place i = source_of(row, rows, cols, next_along_rows, second, along_rows);  // of four neighbours, and below
    const Place j = source_of(col, rows, cols, next_along_rows, second, along_rows);
    const bool same = i.block == j.block, turned = !same && j.block;
    const float* const from = same
                                  ? q + ((2 * (i64)pair + i.block) * ports + i.at) * ports + j.at
                                  : cross + ((i64)pair * rest + (turned ? j.at : i.at)) * rest + (turned ? i.at : j.at);
    const int ld = same ? ports : rest;
    float part[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float4 four = *(const float4*)(from + (i64)r * ld);
      part[r][0] = four.x, part[r][1] = four.y, part[r][2] = four.z, part[r][3] = four.w;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float4* const to = (float4*)(merged + ((i64)pair * wide + row + r) * wide + col);
      *to = turned ? make_float4(part[0][r], part[1][r], part[2][r], part[3][r])
                   : make_float4(part[r][0], part[r][1], part[r][2], part[r][3]);
    }
  }
}

}  // namespace gpuxbar
