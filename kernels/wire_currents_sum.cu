// wire_currents_sum: what items add to the gradient of their tile's conductances, in their order.
//
// Axes    products [items, R, C] of items from `first` on, B a tile; grad_g [T, R, C].
// Launch  1-D grid-stride over the cells of their tiles.
// Wrapper gpuxbar/ops/solve_for_inputs_cuda.py      Oracle gpuxbar/reference/wire_currents.py
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    wire_currents_sum(const float* __restrict__ products,  // [items, R, C] 1/S
                      float* __restrict__ grad_g,          // [T, R, C] 1/S
                      int batch, int rows, int cols, i64 first, i64 items,
                      i64 size)  // cells of all tiles from the first item's to the last one's
{
  const i64 cells = (i64)rows * cols, tile0 = first / batch, stride = (i64)gridDim.x * blockDim.x;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const i64 from = (tile0 + e / cells) * batch - first, to = from + batch < items ? from + batch : items;
    float sum = grad_g[tile0 * cells + e];
    for (i64 k = from > 0 ? from : 0; k < to; ++k) sum += products[k * cells + e % cells];
    grad_g[tile0 * cells + e] = sum;
  }
}

}  // namespace gpuxbar
