// program: weights -> conductance planes, and the variance of their read noise.
//
// Axes    weight [G, O, I]; planes [P, G * I, O] of the mapping `merge`; 32 wordlines by 32 bitlines a block, turned
//         through shared memory.
// Launch  256 threads, 1-D grid of ceil(O / 32) * ceil(I / 32) * G blocks. A thread owns 4 bitlines of a wordline, one
//         counter of each draw, through all planes: the same bits on any launch.
// Random  write noise of (wordline, bitline, plane, step), spread and stuck cells of (wordline, bitline, plane).
// State   null: always. Else [version programmed, version now]: nothing is written where both are one version, not 0;
//         the step of the write noise is the version.
// Wrapper gpuxbar/ops/program_cuda.py      Oracle gpuxbar/reference/program.py
#include "gpuxbar/four.cuh"
#include "gpuxbar/programming.cuh"

namespace gpuxbar {

// What a write leaves of four targets of a plane; (group, row): their column group and wordline.
GPUXBAR_FN void write(const Programming& p, u32 group, u32 row, u32 slot, float g[4]) {
  const Normals4 spread = draw(p.spread, DEVICE_SPREAD, group, row, slot, 0, p.seed);
  const Normals4 noise = draw(p.noise.any() ? 1.0f : 0.0f, WRITE, group, row, slot, (u32)p.step, p.seed);
  const Uniforms4 u = draw_stuck(p.stuck_low + (1.0f - p.stuck_high), group, row, slot, p.seed);
#pragma unroll
  for (int j = 0; j < 4; ++j) g[j] = written(p, g[j], spread.z[j], noise.z[j], u.u[j]);
}

// Store four values and what must poison them.
GPUXBAR_FN void store_poisoned(float* to, const float value[4], const float poison[4], int count, bool whole) {
  float x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = value[j] + poison[j];
  store(to, x, count, whole);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    program(const float* __restrict__ weight,  // [G, O, I]
            const float* __restrict__ w_max,   // [1] or [G * O]  weight of a full pair
            float* __restrict__ g,             // [P, G * I, O]   S
            float* __restrict__ noise_var,     // like g, or null: variance of a read, A^2/V^2
            const i64* __restrict__ state,     // [2] or null
            const i64* __restrict__ step,      // [1] or null: step_value; not read with a state
            i64 step_value, u64 seed, int groups, int inputs, int outputs, int slices,
            int slice_bits,   // 0: one continuous slice
            int merge,        // enum Merge
            int scale_count,  // values of w_max
            int balanced, float digit_max,
            float steps,  // steps between levels, 0: continuous
            float g_min, float g_max, float spread, Deviation noise, float stuck_low, float stuck_high, float read_var,
            float read_power) {
  if (state && state[0] == state[1] && state[1] != 0) return;
  const i64 now = state ? state[1] : step ? *step : step_value;
  const Programming p{groups, inputs,   outputs,   slices,     slice_bits, merge,     scale_count,
                      now,    balanced, seed,      digit_max,  steps,      g_min,     g_max,
                      spread, noise,    stuck_low, stuck_high, read_var,   read_power};
  __shared__ float block[32][33];
  __shared__ double inverse[32];
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const int col_blocks = (outputs + 31) / 32, row_blocks = (inputs + 31) / 32;
  const int o0 = (int)(blockIdx.x % col_blocks) * 32, i0 = (int)(blockIdx.x / col_blocks % row_blocks) * 32;
  const i64 array = blockIdx.x / col_blocks / row_blocks;

  for (int o = y; o < 32; o += 8)
    if (o0 + o < outputs && i0 + x < inputs) block[o][x] = weight[(array * outputs + o0 + o) * inputs + i0 + x];
  if (y == 0 && o0 + x < outputs) inverse[x] = 1.0 / (double)w_max[scale_count > 1 ? array * outputs + o0 + x : 0];
  __syncthreads();

  const int line = threadIdx.x >> 3, first = (threadIdx.x & 7) * 4;
  if (i0 + line >= inputs || o0 + first >= outputs) return;
  const int count = outputs - o0 - first < 4 ? outputs - o0 - first : 4;
  const bool aligned = (outputs % 4 | (int)(((u64)g | (u64)noise_var) & 15)) == 0;
  const bool pairs = merge != MERGE_OFFSET;
  const i64 row = array * inputs + i0 + line, plane = (i64)groups * inputs * outputs;
  const u32 group = (u32)(o0 + first) / 4;
  const i64 to = row * outputs + o0 + first;
  const double top = (double)((1ull << (slices * slice_bits)) - 1);

  float w[4] = {}, poison[4] = {}, sum[4] = {}, var_sum[4] = {};
  u32 code[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= count) continue;
    const float value = block[first + j][line];
    poison[j] = value - value;  // NaN where the weight is NaN or infinite, else 0
    w[j] = clip_weight(value * (float)inverse[first + j]);
    if (slice_bits) code[j] = weight_code(value, inverse[first + j], top);
  }

  for (int k = 0; k < slices; ++k) {
    float side[2][4] = {}, variance[2][4] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s && !pairs) continue;
      const float sign = s ? -1.0f : 1.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        side[s][j] = slice_bits ? slice_target(p, w[j], code[j], k, sign)
                     : pairs    ? pair_target(p, w[j], sign)
                                : offset_target(p, w[j]);
      write(p, group, (u32)row, (u32)(s * slices + k), side[s]);
      if (noise_var)
#pragma unroll
        for (int j = 0; j < 4; ++j) variance[s][j] = read_variance(p, side[s][j]);
    }
    if (merge == MERGE_NONE || merge == MERGE_OFFSET) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (s && !pairs) continue;
        const i64 at = (i64)(s * slices + k) * plane + to;
        store_poisoned(g + at, side[s], poison, count, aligned);
        if (noise_var) store_poisoned(noise_var + at, variance[s], poison, count, aligned);
      }
      continue;
    }
    const float by = merge == MERGE_ALL ? (float)(1ull << (k * slice_bits)) : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[j] = fma(by, side[0][j] - side[1][j], sum[j]);
      var_sum[j] = fma(by * by, variance[0][j] + variance[1][j], var_sum[j]);
    }
    if (merge == MERGE_ALL && k + 1 < slices) continue;
    const i64 at = (merge == MERGE_ALL ? 0 : k) * plane + to;
    store_poisoned(g + at, sum, poison, count, aligned);
    if (noise_var) store_poisoned(noise_var + at, var_sum, poison, count, aligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] = var_sum[j] = 0.0f;
  }
}

}  // namespace gpuxbar
