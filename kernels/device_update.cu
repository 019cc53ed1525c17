// device_update: wanted weight changes through the device law, in place, and the weights read out afterwards.
//
// Axes    G groups of I wordlines and O bitlines; two planes of devices a slice, positive ones first:
//         g [2 slices, G * I, O], weights [G, O, I].
// Launch  256 threads: a block of 32 wordlines x 32 bitlines of all planes, four bitlines of a wordline a thread;
//         grid (ceil(O / 32), ceil(I / 32), G). Weights are transposed through shared memory, so that every access
//         runs along its array. The result does not depend on the launch.
// Random  normals and uniforms of (plane, wordline, bitline): see philox.cuh; `step` is read from memory where given.
// Macros  those of quad.cuh    COUNTED  pulses are counted, and devices fail    SLICED  several pairs a weight
//         DIGITS  of which changes are asked for, not of weights
// Wrapper gpuxbar/ops/device_update.py      Oracle gpuxbar/reference/device_update.py
#include "gpuxbar/endurance.cuh"
#include "gpuxbar/quad.cuh"
#include "gpuxbar/slices.cuh"

namespace gpuxbar {

#ifndef COUNTED
#define COUNTED 0
#endif
#ifndef SLICED
#define SLICED 0
#endif
#ifndef DIGITS
#define DIGITS 0
#endif

constexpr bool SHOWN = (TRAITS & WRITE_NOISE) != 0;  // with write noise, which what is held has not

// Four cells of one wordline: shares of the window in, moved in place, and what they show with write noise. False if
// none is to move. `taken` are their counts of pulses.
GPUXBAR_FN bool update_quad(const UpdateLaw& s, float x[4], float shown[4], float wanted[4], i32 taken[4],
                            const Endurance& endurance, DeviceMap map, i64 first, int count, u32 group, u32 row,
                            u32 plane, u32 step, const RoundKeys& keys, float stuck_low, float stuck_high,
                            const float (*scatter)[NODES * SCORES]) {
  if (COUNTED)
#pragma unroll
    for (int q = 0; q < 4; ++q) wanted[q] = taken[q] < 0 ? 0.0f : wanted[q];
  if (stuck_low + stuck_high > 0.0f) {
    const u32 stuck = stuck_ones(stuck_low, stuck_high, group, row, plane, keys);
#pragma unroll
    for (int q = 0; q < 4; ++q) wanted[q] = stuck >> q & 1u ? 0.0f : wanted[q];
  }
  if (wanted[0] == 0.0f && wanted[1] == 0.0f && wanted[2] == 0.0f && wanted[3] == 0.0f) return false;
  Quad quad;
  quad.make(map, first, count, group, row, plane, keys);
  const bool noisy = MEASURED<LawOf<LAW>> || (TRAITS & CYCLE_NOISE);
  const Normals4 z = draw(noisy ? 1.0f : 0.0f, CYCLE, group, row, plane, step, keys);
  const Normals4 write = draw(SHOWN ? 1.0f : 0.0f, UPDATE_WRITE, group, row, plane, step, keys);
  Normals4 bears{};
  Counter parts{};
  if (COUNTED) {
    bears = draw(endurance.spread, ENDURANCE, group, row, plane, 0, keys);
    parts = philox<10>(counter(group, row, WEAR, plane, step), keys);
  }
  const u32 part[4] = {parts.x, parts.y, parts.z, parts.w};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float d = pulsed(s, wanted[q]);
    const bool rising = wanted[q] > 0.0f;
    x[q] = moved<LawOf<LAW>>(s, device_under<LawOf<LAW>>(s, quad.device[q], rising), x[q], d, rising, z.z[q], scatter);
    if (SHOWN && d > 0.0f) shown[q] = max(fma(s.write_noise, write.z[q], x[q]), s.floor);
    if (COUNTED && d > 0.0f) {
      taken[q] = after_wear(endurance, taken[q], whole_pulses(d * s.pulses, uniform(part[q])), bears.z[q]);
      if (taken[q] < 0) {
        x[q] = failed_share(endurance, x[q]);
        shown[q] = failed_share(endurance, shown[q]);
      }
    }
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(256, 2) device_update(
    float* __restrict__ g,               // [2 slices, G * I, O] S
    float* __restrict__ g_held,          // like g, what devices with write noise hold; null without
    int* __restrict__ pulse_count,       // like g, below 0: failed after so many; null unless COUNTED
    const u16* __restrict__ device_map,  // [K, 2 slices, G * I, O] normals of the devices; null unless MAPPED
    const float* __restrict__ dw,        // [G, O, I]     wanted weight change, over `factor`; null if DIGITS
    const float* __restrict__ digits,    // [slices, G, I, O] wanted units; null unless DIGITS
    float* __restrict__ w,               // [G, O, I]     weight read out
    const float* __restrict__ w_max,     // [G * O]       weight of a full pair
    const i64* __restrict__ step,        // [1], or null: step_value
    UpdateLaw law, Endurance endurance, Slices slices, float factor, i64 step_value,
    RoundKeys keys,  // of the seed
    float g_min,
    float range,  // g_max - g_min, S
    float stuck_low, float stuck_high, int groups, int inputs, int outputs) {
  __shared__ float block[32][33];  // [wordline][bitline]: wanted changes, then weights
  const float (*scatter)[NODES * SCORES] = nullptr;
  if constexpr (MEASURED<LawOf<LAW>>) {  // neighbouring cells look up different entries
    __shared__ float table[2][NODES * SCORES];
    for (int k = threadIdx.x; k < 2 * NODES * SCORES; k += 256)
      table[k / (NODES * SCORES)][k % (NODES * SCORES)] = law.scatter[k / (NODES * SCORES)][k % (NODES * SCORES)];
    scatter = table;
  }
  const int group = blockIdx.z, i0 = blockIdx.y * 32, o0 = blockIdx.x * 32;
  // of weights, four a thread: a wordline of every eighth bitline
  const int across = threadIdx.x & 31, along = threadIdx.x >> 5;
  const i64 first_weight = ((i64)group * outputs + o0 + along) * inputs + i0 + across, eight = 8 * (i64)inputs;
  const int lines = i0 + across < inputs ? outputs - o0 - along : 0;
  if (!DIGITS) {
    const float* from = dw + first_weight;
#pragma unroll
    for (int k = 0; k < 32; k += 8, from += eight)
      if (k < lines) block[across][along + k] = *from;
  }
  __syncthreads();

  const int line = threadIdx.x >> 3, quad = 4 * (threadIdx.x & 7);
  const int count = outputs - o0 - quad < 4 ? outputs - o0 - quad : 4;
  if (i0 + line < inputs && count > 0) {
    const u32 when = (u32)(step ? *step : step_value);
    const i64 row = (i64)group * inputs + i0 + line;
    decltype(auto) s = compiled(law);
    const float inverse_range = divide_fast(1.0f, range);
    const bool whole =
        count == 4 && (outputs & 3) == 0 && (((u64)g | (u64)g_held | (u64)digits | (u64)w_max) & 15) == 0;
    float top[4], change[4], weight[4] = {};
    load(w_max + (i64)group * outputs + o0 + quad, top, count, whole, 1.0f);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      change[q] = !DIGITS && q < count ? block[line][quad + q] * divide_fast(factor, top[q]) : 0.0f;
    const i32 pairs = SLICED ? slices.count : 1;
    const DeviceMap map{device_map, 2 * (i64)pairs * groups * inputs * outputs};
    for (i32 k = 0; k < pairs; ++k) {
      const float share = SLICED ? inverse_range * slice_weight(slices, k) : inverse_range;
      float asked[4];  // units
      if (DIGITS) load(digits + ((i64)k * groups * inputs + row) * outputs + o0 + quad, asked, count, whole, 0.0f);
#pragma unroll COUNTED ? 1 : 2  // both would spill
      for (i32 side = 0; side < 2; ++side) {
        const u32 plane = (u32)(side * pairs + k);
        const i64 first = ((i64)plane * groups * inputs + row) * outputs + o0 + quad;
        float cell[4], held[4], x[4], was[4], shown[4], wanted[4];
        load(g + first, cell, count, whole, g_min);
        if (SHOWN) load(g_held + first, held, count, whole, g_min);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (!SHOWN) held[q] = cell[q];
          was[q] = x[q] = (held[q] - g_min) * inverse_range;
          shown[q] = (cell[q] - g_min) * inverse_range;
          wanted[q] = device_share(s.sides, side == 0,
                                   DIGITS   ? asked[q] / slices.window
                                   : SLICED ? slice_change(slices, change[q], k)
                                            : change[q]);
        }
        i32 taken[4] = {};
        if (COUNTED)
          for (int q = 0; q < count; ++q) taken[q] = pulse_count[first + q];
        const bool touched =
            update_quad(s, x, shown, wanted, taken, endurance, map, first, count, (u32)(o0 + quad) >> 2, (u32)row,
                        plane, when, keys, stuck_low, stuck_high, scatter);
        if (COUNTED && touched)
          for (int q = 0; q < count; ++q) pulse_count[first + q] = taken[q];
        if (touched) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const float before = (cell[q] - g_min) * inverse_range;
            if (x[q] != was[q]) held[q] = fma(x[q], range, g_min);  // a cell that did not move keeps its bits
            if (!SHOWN)
              cell[q] = held[q];
            else if (shown[q] != before)
              cell[q] = fma(shown[q], range, g_min);
          }
          store(g + first, cell, count, whole);
          if (SHOWN) store(g_held + first, held, count, whole);
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) weight[q] = fma(cell[q], side ? -share : share, weight[q]);
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) block[line][quad + q] = weight[q] * top[q];
  }
  __syncthreads();

  float* to = w + first_weight;
#pragma unroll
  for (int k = 0; k < 32; k += 8, to += eight)
    if (k < lines) *to = block[across][along + k];
}

}  // namespace gpuxbar
