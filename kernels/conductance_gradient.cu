// conductance_gradient: from the gradient of tiles' effective conductances to those of their blocks, between batched products.
//
// Axes    N pairs of blocks of P x Q cells, S = 2 P + 2 Q ports each, the joined side of K ports last, E = S - K others.
//         Gradients are symmetric; of those of parts, only rows of the others are written in the columns of the joined
//         side, not the rows of the joined side in theirs.
// Launch  1-D grid-stride over the output (turn: over f); results do not depend on the launch.
// Wrapper gpuxbar/ops/effective_conductance_gradient_cuda.py      Oracle gpuxbar/reference/wire_currents.py
#include "gpuxbar/parasitics.cuh"

namespace gpuxbar {

// The gradient of a whole tile's ports: G_eff = -q[left, bottom], which stands twice in q.
extern "C" __global__ void __launch_bounds__(256)
    conductance_gradient_tile(const float* __restrict__ grad,  // [T, rows, cols] of the effective conductance
                              float* __restrict__ whole,       // [T, S, S], ports left, right, bottom, top
                              int rows, int cols, int high, int wide,
                              i64 size)  // elements of whole
{
  const int ports = 2 * (high + wide);
  const i64 stride = (i64)gridDim.x * blockDim.x;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const int i = (int)(e / ports % ports), j = (int)(e % ports);
    const int row = (i < j ? i : j) - (high - rows), col = (i < j ? j : i) - 2 * high;
    const bool inside = row >= 0 && row < rows && col >= 0 && col < cols;
    whole[e] = inside ? -0.5f * grad[(e / ((i64)ports * ports) * rows + row) * cols + col] : 0.0f;
  }
}

// Gradients of merged blocks, sorted by the parts that their ports come from.
extern "C" __global__ void __launch_bounds__(256) conductance_gradient_parts(
    const float* __restrict__ whole,  // [N, S', S'], the side joined next last
    float* __restrict__ parts,        // [2 N, S, S]: those of one part, its others
    float* __restrict__ cross,        // [N, 2, E, E]: rows of block 0 or 1, columns of the other
    int block_rows, int block_cols,   // P, Q
    int along_rows,                   // left to right, else lower to upper
    int next_along_rows,
    int alternate,  // odd blocks are the second of a pair at the next merge; 0: there is none
    i64 size)       // elements of whole
{
  const int ports = 2 * (block_rows + block_cols), rest = ports - (along_rows ? block_rows : block_cols);
  const int rows = along_rows ? block_rows : 2 * block_rows, cols = along_rows ? 2 * block_cols : block_cols;
  const int wide = 2 * (rows + cols), others = wide - (next_along_rows ? rows : cols);
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
      const int row = row0 + step;
      const bool unwritten = row >= others && col < others;
      const float value = whole[((i64)pair * wide + (unwritten ? col : row)) * wide + (unwritten ? row : col)];
      if (i.block == j.block)
        parts[((2 * (i64)pair + i.block) * ports + i.at) * ports + j.at] = value;
      else
        cross[((2 * (i64)pair + i.block) * rest + i.at) * rest + j.at] = value;
    }
    __syncthreads();
  }
}

// The outer quarters of t = [[A F, -F'], [-F, -F Z]].
extern "C" __global__ void __launch_bounds__(256) conductance_gradient_turn(const float* __restrict__ f,  // [N, K, K]
                                                                            float* __restrict__ t,  // [N, 2 K, 2 K]
                                                                            int k,
                                                                            i64 size)  // elements of f
{
  const i64 square = (i64)k * k, stride = (i64)gridDim.x * blockDim.x;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    float* const own = t + e / square * 4 * square;
    const i64 i = e / k % k, j = e % k;
    own[(k + i) * 2 * k + j] = -f[e];
    own[j * 2 * k + k + i] = -f[e];
  }
}

}  // namespace gpuxbar
