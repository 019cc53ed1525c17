// wire_currents_gradient: gradients of the currents of wire_currents, by a solution of the adjoint network too.
//
// Axes    g [T, R, C], v, grad_v [T, B, R], grad_i [T, B, C]; an item is an input of a tile, of which those from `first` on are
//         done; products [items, R, C]: what each adds to grad_g. Not converged: grad_v or products are NaN.
// Launch  blocks of 512 threads, as many as there is memory for, each with neighbouring items one after the other. No bit of
//         an item depends on the launch.
// Macros  ON_CHIP, of line_solver.cuh.
// Wrapper gpuxbar/ops/solve_for_inputs_cuda.py      Oracle gpuxbar/reference/wire_currents.py
#include "gpuxbar/line_solver.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(512, 1)
    wire_currents_gradient(const float* __restrict__ v,           // [T, B, R] V
                           const float* __restrict__ g,           // [T, R, C] S
                           const float* __restrict__ grad_i,      // [T, B, C] 1/A
                           const float* __restrict__ r_wordline,  // [R] ohm, or null: wordline_value; the others alike
                           const float* __restrict__ r_bitline, const float* __restrict__ r_source,
                           const float* __restrict__ r_sink,
                           float* __restrict__ grad_v,    // [T, B, R] 1/V
                           float* __restrict__ products,  // [items, R, C] 1/S
                           float* __restrict__ memory,    // scratch
                           float wordline_value, float bitline_value, float source_value, float sink_value,
                           float tolerance, int iterations, int batch, int rows, int cols, i64 first, i64 items) {
  __shared__ Shared shared;
  const Wires wires{r_wordline, r_bitline, r_source, r_sink, wordline_value, bitline_value, source_value, sink_value};
  const Solver solver(shared, wires, rows, cols, memory);
  const i64 last = items * (blockIdx.x + 1) / gridDim.x;
  i64 tile = -1;
#pragma unroll 1
  for (i64 k = items * blockIdx.x / gridDim.x; k < last; ++k) {
    const i64 item = first + k;
    if (item / batch != tile) {
      tile = item / batch;
      solver.read(g + tile * rows * cols);
    }
    float* const product = products + k * rows * cols;
    float unit = 0.0f;
#pragma unroll 1
    for (int adjoint = 0; adjoint < 2; ++adjoint) {
      const float* const in = adjoint ? nullptr : v + item * rows;
      const float* const out = adjoint ? grad_i + item * cols : nullptr;
      const Scale scale = adjoint ? solver.scale(out, cols) : solver.scale(in, rows);
      const bool found = solver.solve(in, out, scale.down, (double)tolerance, iterations);
      unit = found ? scale.up : bits_float(NOT_A_NUMBER);
      solver.bitlines(
          out, scale.down, [](At at) { return times(load(at.far + G), load(at.far + U)); },
          [=](At at, int row, int col, const Cells& volts) {
            Cells across = load(at.far + U);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              across.x[j] = unit * (across.x[j] - volts.x[j]);
              float* const to = product + (i64)row * cols + col + j;
              if (col + j < cols) *to = adjoint ? *to * across.x[j] : across.x[j];
            }
            store(at.near + WORK, volts);
          });
    }
#pragma unroll 1
    for (int row = Solver::warp(); row < rows; row += WARPS) {
      const float into = solver.gather(row, [](At at) { return times(load(at.far + G), load(at.near + WORK)); });
      if (Solver::lane() == 0) grad_v[item * rows + row] = -unit * into;
    }
    __syncthreads();
  }
}

}  // namespace gpuxbar
