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
#include "gpuxbar/programming.cuh"

namespace gpuxbar {

struct Four {
  float x[4];
};

// What a write leaves of four targets of a plane; (group, row): their column group and wordline.
GPUXBAR_FN void write(const Programming& p, u32 group, u32 row, u32 slot, Four* g) {
  const u32 key_lo = (u32)p.seed, key_hi = (u32)(p.seed >> 32);
  Normals4 spread{}, noise{};
  Four u{{0.5f, 0.5f, 0.5f, 0.5f}};
  if (p.spread > 0.0f) spread = normals4(counter(group, row, DEVICE_SPREAD, slot, 0), key_lo, key_hi);
  if (noisy_writes(p)) noise = normals4(counter(group, row, WRITE, slot, (u32)p.step), key_lo, key_hi);
  if (p.stuck_low > 0.0f || p.stuck_high < 1.0f) {
    const Counter w = philox<10>(counter(group, row, STUCK, slot, 0), key_lo, key_hi);
    u = Four{{uniform(w.x), uniform(w.y), uniform(w.z), uniform(w.w)}};
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) g->x[j] = written(p, g->x[j], spread.z[j], noise.z[j], u.x[j]);
}

// Store four values and what must poison them: 16 bytes where all four exist and are aligned.
GPUXBAR_FN void store(float* __restrict__ to, const Four& value, const Four& poison, int count, bool aligned) {
  float x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = value.x[j] + poison.x[j];
  if (aligned) {
    *(float4*)to = make_float4(x[0], x[1], x[2], x[3]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < count) to[j] = x[j];
  }
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
            float g_min, float g_max, float spread, float write_noise, float write_slope, float write_curve,
            float stuck_low, float stuck_high, float read_var, float read_power) {
  if (state && state[0] == state[1] && state[1] != 0) return;
  const i64 now = state ? state[1] : step ? *step : step_value;
  const Programming p{groups,      inputs,      outputs,   slices,     slice_bits, merge,     scale_count, now,
                      balanced,    seed,        digit_max, steps,      g_min,      g_max,     spread,      write_noise,
                      write_slope, write_curve, stuck_low, stuck_high, read_var,   read_power};
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

  Four w{}, poison{}, sum{}, var_sum{};
  u32 code[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= count) continue;
    const float value = block[first + j][line];
    poison.x[j] = value - value;  // NaN where the weight is NaN or infinite, else 0
    w.x[j] = clip_weight(value * (float)inverse[first + j]);
    if (slice_bits) code[j] = weight_code(value, inverse[first + j], top);
  }

  for (int k = 0; k < slices; ++k) {
    Four side[2] = {}, variance[2] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s && !pairs) continue;
      const float sign = s ? -1.0f : 1.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        side[s].x[j] = slice_bits ? slice_target(p, w.x[j], code[j], k, sign)
                       : pairs    ? pair_target(p, w.x[j], sign)
                                  : offset_target(p, w.x[j]);
      write(p, group, (u32)row, (u32)(s * slices + k), &side[s]);
      if (noise_var)
#pragma unroll
        for (int j = 0; j < 4; ++j) variance[s].x[j] = read_variance(p, side[s].x[j]);
    }
    if (merge == MERGE_NONE || merge == MERGE_OFFSET) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (s && !pairs) continue;
        const i64 at = (i64)(s * slices + k) * plane + to;
        store(g + at, side[s], poison, count, aligned);
        if (noise_var) store(noise_var + at, variance[s], poison, count, aligned);
      }
      continue;
    }
    const float by = merge == MERGE_ALL ? (float)(1ull << (k * slice_bits)) : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum.x[j] = fma(by, side[0].x[j] - side[1].x[j], sum.x[j]);
      var_sum.x[j] = fma(by * by, variance[0].x[j] + variance[1].x[j], var_sum.x[j]);
    }
    if (merge == MERGE_ALL && k + 1 < slices) continue;
    const i64 at = (merge == MERGE_ALL ? 0 : k) * plane + to;
    store(g + at, sum, poison, count, aligned);
    if (noise_var) store(noise_var + at, var_sum, poison, count, aligned);
    sum = var_sum = Four{};
  }
}

}  // namespace gpuxbar
