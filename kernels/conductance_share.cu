// conductance_share: the voltage that column tiles on the same drivers lose in them, before it is inverted.
//
//   m = (sum of the tiles' input admittances) * r_source, column by column, for each of the tiles
//
// Axes    G groups of U tiles of `rows` wordlines, padded at the top to H; q [G, U, S, S]: ports of the tiles solved
//         at ideal drivers, left side first; m [G, U, H, H], the same for all tiles of a group.
// Launch  1-D grid-stride over [G, H, H]; the result does not depend on the launch.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    conductance_share(const float* __restrict__ q,         // S
                      const float* __restrict__ r_source,  // [rows] ohm, or null: source_value
                      float* __restrict__ m, float source_value, int rows, int high, int ports,
                      int shared,  // U
                      i64 size)    // G * H * H
{
  const i64 square = (i64)high * high, stride = (i64)gridDim.x * blockDim.x;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const i64 first = e / square * shared, at = e % square;
    const int j = (int)(at % high), row = j - (high - rows);
    float sum = 0.0f;
    for (int u = 0; u < shared; ++u) sum += q[((first + u) * ports + at / high) * ports + j];
    const float lost = row < 0 ? 0.0f : (r_source ? r_source[row] : source_value) * sum;
    for (int u = 0; u < shared; ++u) m[(first + u) * square + at] = lost;
  }
}

}  // namespace gpuxbar
