// wire_currents: bitline currents of tiles with resistive wires for given inputs.
//
// Axes    g [T, R, C], v [T, B, R], i [T, B, C]; an item is an input of a tile. Not converged: its currents are NaN.
// Launch  blocks of 512 threads, as many as there is memory for, each with neighbouring items one after the other. No bit of
//         an item depends on the launch.
// Macros  ON_CHIP, of line_solver.cuh.
// Wrapper gpuxbar/ops/solve_for_inputs_cuda.py      Oracle gpuxbar/reference/wire_currents.py
#include "gpuxbar/line_solver.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(512, 1)
    wire_currents(const float* __restrict__ v,           // [T, B, R] V
                  const float* __restrict__ g,           // [T, R, C] S
                  const float* __restrict__ r_wordline,  // [R] ohm, or null: wordline_value; the others alike
                  const float* __restrict__ r_bitline, const float* __restrict__ r_source,
                  const float* __restrict__ r_sink,
                  float* __restrict__ i,       // [T, B, C] A
                  float* __restrict__ memory,  // scratch
                  float wordline_value, float bitline_value, float source_value, float sink_value, float tolerance,
                  int iterations, int batch, int rows, int cols,
                  i64 items)  // T * B
{
  __shared__ Shared shared;
  const Wires wires{r_wordline, r_bitline, r_source, r_sink, wordline_value, bitline_value, source_value, sink_value};
  const Solver solver(shared, wires, rows, cols, memory);
  const i64 last = items * (blockIdx.x + 1) / gridDim.x;
  i64 tile = -1;
#pragma unroll 1
  for (i64 item = items * blockIdx.x / gridDim.x; item < last; ++item) {
    if (item / batch != tile) {
      tile = item / batch;
      solver.read(g + tile * rows * cols);
    }
    const Scale scale = solver.scale(v + item * rows, rows);
    const bool found = solver.solve(v + item * rows, nullptr, scale.down, (double)tolerance, iterations);
#pragma unroll 1
    for (int col = 4 * Solver::lane(); col < solver.blocks * WIDE; col += WIDE) {
      solver.collect(col, [](At at) { return times(load(at.far + G), load(at.far + U)); });
      if (Solver::warp() == 0) {  // what the last strip passes on flows into the sensed ends
        Cells current{};
#pragma unroll 1
        for (int w = 0; w < WARPS; ++w) solver.pass(shared.sum, w, current);
        for (int j = 0; j < 4; ++j)
          if (col + j < cols) i[item * cols + col + j] = found ? scale.up * current.x[j] : bits_float(NOT_A_NUMBER);
      }
      __syncthreads();
    }
  }
}

}  // namespace gpuxbar
