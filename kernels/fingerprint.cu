// fingerprint: the version of weights, the decision whether they are programmed, and their scale; three launches around
// `program`, none of which waits for the host.
//
// Axes    weight [rows, inputs], rows = G * O; state [version programmed, version now].
// Launch  any 1-D grid of 256 threads; integer sums and maxima, so the result does not depend on the launch.
// Order   begin_fingerprint, fingerprint, program, commit_fingerprint, on one stream.
// Wrapper gpuxbar/ops/program_cuda.py      Oracle gpuxbar/reference/program.py (fingerprint, reprogram)
#include "gpuxbar/programming.cuh"

namespace gpuxbar {

// version now = write step, to which the fingerprint is added; w_max = its least (or fixed) value.
extern "C" __global__ void __launch_bounds__(256) begin_fingerprint(float* __restrict__ w_max,           // [count]
                                                                    i64* __restrict__ state,             // [2]
                                                                    const i64* __restrict__ write_step,  // [1]
                                                                    float least, i64 count) {
  const i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (first == 0) state[1] = *write_step;
  for (i64 e = first; e < count; e += (i64)gridDim.x * blockDim.x) w_max[e] = least;
}

// A warp takes 1024 weights of a row at a time.
extern "C" __global__ void __launch_bounds__(256)
    fingerprint(const float* __restrict__ weight,  // [rows, inputs]
                float* __restrict__ w_max,         // [rows], raised to the largest weight: of its row, or of all in [0]
                i64* __restrict__ state,           // [2]
                int measure,                       // enum Measure
                i64 rows, i64 inputs) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 parts = (inputs + 1023) / 1024;
  u32* const top_bits = (u32*)w_max;  // magnitudes order as their bits do
  u64 sum = 0;
  u32 largest = 0;
  for (i64 part = (i64)blockIdx.x * 8 + warp; part < rows * parts; part += (i64)gridDim.x * 8) {
    const i64 row = part / parts, first = part % parts * 1024, end = first + 1024 < inputs ? first + 1024 : inputs;
#pragma unroll 4
    for (i64 i = first + lane; i < end; i += 32) {
      const i64 place = row * inputs + i;
      const u32 bits = float_bits(weight[place]), magnitude = bits & 0x7FFFFFFFu;
      sum += fingerprint_term(bits, (u32)place);
      largest = magnitude > largest ? magnitude : largest;
    }
    if (measure == MEASURE_ROWS) {
      for (int step = 16; step; step >>= 1) {
        const u32 other = __shfl_xor_sync(0xFFFFFFFFu, largest, step);
        largest = other > largest ? other : largest;
      }
      if (lane == 0) atomicMax(top_bits + row, largest);
      largest = 0;
    }
  }
  for (int step = 16; step; step >>= 1) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    const u32 other = __shfl_xor_sync(0xFFFFFFFFu, largest, step);
    largest = other > largest ? other : largest;
  }
  __shared__ u64 sums[8];
  __shared__ u32 tops[8];
  if (lane == 0) sums[warp] = sum, tops[warp] = largest;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < 8; ++i) {
    sum += sums[i];
    largest = tops[i] > largest ? tops[i] : largest;
  }
  atomicAdd((u64*)(state + 1), sum);
  if (measure == MEASURE_ALL) atomicMax(top_bits, largest);
}

// What is programmed now; one scale for all goes to every output.
extern "C" __global__ void __launch_bounds__(256) commit_fingerprint(float* __restrict__ w_max,  // [count]
                                                                     i64* __restrict__ state,    // [2]
                                                                     int measure,                // enum Measure
                                                                     i64 count) {
  const i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (first == 0) state[0] = state[1];
  if (measure != MEASURE_ALL) return;
  for (i64 e = first + 1; e < count; e += (i64)gridDim.x * blockDim.x) w_max[e] = w_max[0];
}

}  // namespace gpuxbar
