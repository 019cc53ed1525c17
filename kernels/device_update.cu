// device_update: wanted weight changes through the device law, in place, and the weights read out afterwards.
//
// Axes    G groups of I wordlines and O bitlines; two planes of devices: g [2, G * I, O], weights [G, O, I].
// Launch  256 threads: a block of 32 wordlines x 32 bitlines of both planes, four bitlines of a wordline a thread;
//         grid (ceil(O / 32), ceil(I / 32), G). Weights are transposed through shared memory, so that every access
//         runs along its array. The result does not depend on the launch.
// Random  normals and uniforms of (plane, wordline, bitline): see philox.cuh; `step` is read from memory where given.
// Wrapper gpuxbar/ops/device_update.py      Oracle gpuxbar/reference/device_update.py
#include "gpuxbar/update.cuh"

namespace gpuxbar {

// Four cells of one wordline: shares of the window in, moved in place.
GPUXBAR_FN void update_quad(const UpdateLaw& law, float x[4], const float wanted[4], u32 group, u32 row, u32 plane,
                            u32 step, u32 key_lo, u32 key_hi, float stuck_low, float stuck_high) {
  Normals4 up = {}, down = {}, noise = {};
  if (law.spread > 0.0f) {
    up = normals4(counter(group, row, UPDATE_SPREAD_UP, plane, 0), key_lo, key_hi);
    down = normals4(counter(group, row, UPDATE_SPREAD_DOWN, plane, 0), key_lo, key_hi);
  }
  if (law.gamma2 + law.cycle2 + law.pulse_cycle2 + law.range_cycle2 > 0.0f)
    noise = normals4(counter(group, row, CYCLE, plane, step), key_lo, key_hi);
  Counter words = {0x80000000u, 0x80000000u, 0x80000000u, 0x80000000u};
  if (stuck_low + stuck_high > 0.0f) words = philox<10>(counter(group, row, STUCK, plane, 0), key_lo, key_hi);
  const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    float rate_up = law.rate_up, rate_down = law.rate_down;
    if (law.spread > 0.0f) {
      rate_up = device_rate(law, law.rate_up, law.label_up, up.z[q]);
      rate_down = device_rate(law, law.rate_down, law.label_down, down.z[q]);
    }
    const float u = uniform(word[q]);
    const bool stuck = u < stuck_low || u > 1.0f - stuck_high;
    if (!stuck) x[q] = updated(law, x[q], wanted[q], rate_up, rate_down, noise.z[q]);
  }
}

extern "C" __global__ void __launch_bounds__(256)
    device_update(float* __restrict__ g,            // [2, G * I, O] S
                  const float* __restrict__ dw,     // [G, O, I]     wanted weight change
                  float* __restrict__ w,            // [G, O, I]     weight read out
                  const float* __restrict__ w_max,  // [G * O]       weight of a full pair
                  const i64* __restrict__ step,     // [1], or null: step_value
                  UpdateLaw law, i64 step_value, u64 seed, float g_min,
                  float range,  // g_max - g_min, S
                  float stuck_low, float stuck_high, int groups, int inputs, int outputs) {
  __shared__ float block[32][33];  // [wordline][bitline]: wanted changes, then weights
  const int group = blockIdx.z, i0 = blockIdx.y * 32, o0 = blockIdx.x * 32;
  for (int o = threadIdx.x >> 5; o < 32 && o0 + o < outputs; o += 8) {
    const int i = threadIdx.x & 31;
    if (i0 + i < inputs) block[i][o] = dw[((i64)group * outputs + o0 + o) * inputs + i0 + i];
  }
  __syncthreads();

  const int line = threadIdx.x >> 3, quad = 4 * (threadIdx.x & 7);
  const int count = outputs - o0 - quad < 4 ? outputs - o0 - quad : 4;
  if (i0 + line < inputs && count > 0) {
    const u32 when = (u32)(step ? *step : step_value), key_lo = (u32)seed, key_hi = (u32)(seed >> 32);
    const i64 row = (i64)group * inputs + i0 + line;
    const float inverse_range = 1.0f / range;
    float top[4], change[4], weight[4] = {};
    for (int q = 0; q < 4; ++q) {
      top[q] = q < count ? w_max[(i64)group * outputs + o0 + quad + q] : 1.0f;
      change[q] = q < count ? block[line][quad + q] * (0.5f / top[q]) : 0.0f;
    }
    const bool whole = count == 4 && (outputs & 3) == 0 && ((u64)g & 15) == 0;
#pragma unroll
    for (u32 plane = 0; plane < 2; ++plane) {
      float* cells = g + ((i64)plane * groups * inputs + row) * outputs + o0 + quad;
      float before[4] = {g_min, g_min, g_min, g_min}, x[4], was[4], wanted[4];
      if (whole) {
        const float4 v = *(const float4*)cells;
        before[0] = v.x, before[1] = v.y, before[2] = v.z, before[3] = v.w;
      } else {
        for (int q = 0; q < count; ++q) before[q] = cells[q];
      }
      const float sign = plane ? -1.0f : 1.0f;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        was[q] = x[q] = (before[q] - g_min) * inverse_range;
        wanted[q] = sign * change[q];
      }
      update_quad(law, x, wanted, (u32)(o0 + quad) >> 2, (u32)row, plane, when, key_lo, key_hi, stuck_low, stuck_high);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (x[q] != was[q]) before[q] = fma(x[q], range, g_min);  // a cell that did not move keeps its bits
        weight[q] = fma(sign, before[q] * inverse_range, weight[q]);
      }
      if (whole)
        *(float4*)cells = make_float4(before[0], before[1], before[2], before[3]);
      else
        for (int q = 0; q < count; ++q) cells[q] = before[q];
    }
    for (int q = 0; q < count; ++q) block[line][quad + q] = weight[q] * top[q];
  }
  __syncthreads();

  for (int o = threadIdx.x >> 5; o < 32 && o0 + o < outputs; o += 8) {
    const int i = threadIdx.x & 31;
    if (i0 + i < inputs) w[((i64)group * outputs + o0 + o) * inputs + i0 + i] = block[i][o];
  }
}

}  // namespace gpuxbar
