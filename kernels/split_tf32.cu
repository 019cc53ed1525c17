// split_tf32: an operand of a product in three parts of 11 bits, so that one product in TF32 keeps about 22.
//
//   x = high + low, a b = high_a high_b + low_a high_b + high_a low_b, the three side by side along the sum
//
// Axes    x: N matrices of rows x cols, `stride` apart, `ld` a row; split [N, rows, 3 cols] (high, low, high) of a left
//         operand, [N, 3 rows, cols] (high, high, low) of a right one.
// Launch  1-D grid-stride over the elements of x; the result does not depend on the launch.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle numpy.matmul in float64
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    split_tf32(const float* __restrict__ x, float* __restrict__ split, i64 stride, int ld, int rows, int cols,
               int right,  // a right operand
               i64 size)   // N * rows * cols
{
  const i64 step = (i64)gridDim.x * blockDim.x, square = (i64)rows * cols;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += step) {
    const i64 which = e / square;
    const int i = (int)(e % square / cols), j = (int)(e % cols);
    const float value = x[which * stride + (i64)i * ld + j];
    const float high = tf32_value(value), low = tf32_value(value - high);
    float* const first = split + which * 3 * square + (right ? (i64)i * cols : (i64)i * 3 * cols) + j;
    const i64 part = right ? square : cols;
    first[0] = high;
    first[part] = right ? high : low;
    first[2 * part] = right ? low : high;
  }
}

}  // namespace gpuxbar
