// pulse_update: coincidences of pulse trains through the device law, in place, and the weights read out afterwards.
//
// Axes    B samples; G groups of I wordlines and O bitlines; two planes of devices a slice, positive ones first:
//         g [2 slices, G * I, O]. Pulses go to the lowest slice.
// Launch  256 threads: a block of 32 wordlines x 32 bitlines of all planes, four bitlines of a wordline a thread; grid
//         (ceil(O / 32), ceil(I / 32), G). Trains of 32 samples at a time lie in shared memory; a cell takes the samples
//         in order, in registers. The result does not depend on the launch.
// Random  normals and uniforms of (plane or side, wordline, bitline, sample): see philox.cuh; `step` is read from memory where
//         given.
// Macros  those of quad.cuh    AGGREGATED  coincidences are counted over the batch, and cells move once
//         IMPLIED  coincidences are the product of numbers of slots    COUNTED  pulses are counted, and devices fail
//         SLICED  several pairs a weight
// Wrapper gpuxbar/ops/pulse_update.py      Oracle gpuxbar/reference/pulse_update.py
#include "gpuxbar/endurance.cuh"
#include "gpuxbar/pulses.cuh"
#include "gpuxbar/quad.cuh"
#include "gpuxbar/slices.cuh"

namespace gpuxbar {

#ifndef AGGREGATED
#define AGGREGATED 0
#endif
#ifndef IMPLIED
#define IMPLIED 0
#endif
#ifndef COUNTED
#define COUNTED 0
#endif

#ifndef SLICED
#define SLICED 0
#endif

constexpr int CHUNK = 32;                            // samples
constexpr bool SHOWN = (TRAITS & WRITE_NOISE) != 0;  // with write noise, which what is held has not

// Trains of a chunk of samples on the lines of a block.
struct Trains {
  u32 input[CHUNK][32], error[CHUNK][32];
  float length[CHUNK];
};

// Load the samples from b0 on; how many there are.
GPUXBAR_FN int stage(Trains& trains, const u32* input_words, const u32* error_words, const float* length, int b0,
                     int batch, int group, int groups, int i0, int inputs, int o0, int outputs) {
  const int samples = batch - b0 < CHUNK ? batch - b0 : CHUNK;
  __syncthreads();
  for (int e = threadIdx.x; e < samples * 32; e += 256) {
    const int b = e >> 5, l = e & 31;
    const i64 at = (i64)(b0 + b) * groups + group;
    trains.input[b][l] = i0 + l < inputs ? input_words[at * inputs + i0 + l] : 0u;
    trains.error[b][l] = o0 + l < outputs ? error_words[at * outputs + o0 + l] : 0u;
    if (l == 0) trains.length[b] = length[at];
  }
  __syncthreads();
  return samples;
}

// Add one sample's coincidences on four cells to those that raise the weight and to all.
GPUXBAR_FN void coincide(const Trains& trains, int b, int line, int quad, int raise[4], int all[4]) {
  const u32 input = trains.input[b][line];
  if ((input & SLOTS) == 0) return;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const u32 error = trains.error[b][quad + q];
    const int n = coincidences<IMPLIED != 0>(input, error, trains.length[b]);
    all[q] += n;
    raise[q] += n & raising(input, error);
  }
}

// Four cells of one side after coincidences, of which `raise` raise the weight; `sample` chooses the noise. Their pulses are
// added to `more`.
GPUXBAR_FN void pulse(const Quad& quad, u32 still, float x[4], const UpdateLaw& s, const int raise[4], const int all[4],
                      i32 more[4], u32 group, u32 row, u32 side, u32 sample, u32 step, const RoundKeys& keys,
                      const float (*scatter)[NODES * SCORES]) {
  const bool noisy = MEASURED<LawOf<LAW>> || (TRAITS & CYCLE_NOISE);
  const Normals8 z = draw_pairs(noisy, PULSE_CYCLE, group, row, sample, step, keys);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float own = side == 0 ? z.z[2 * q] : z.z[2 * q + 1];
    const bool moves = (still >> q & 1u) == 0;
    const float raising = moves ? (float)raise[q] : 0.0f, lowering = moves ? (float)(all[q] - raise[q]) : 0.0f;
    const float ups = pulses_up(s.sides, side == 0, raising, lowering);
    const float downs = pulses_down(s.sides, side == 0, raising, lowering);
    if (COUNTED || SHOWN) more[q] += (i32)(ups + downs);
#if AGGREGATED
    x[q] = after_pulses<LawOf<LAW>>(s, quad.device[q], x[q], ups, downs, own);
#else
    const float d = (ups + downs) * (1.0f / s.pulses);
    const bool rising = ups > 0.0f;
    x[q] = moved<LawOf<LAW>>(s, device_under<LawOf<LAW>>(s, quad.device[q], rising), x[q], d, rising, own, scatter);
#endif
  }
}

extern "C" __global__ void __launch_bounds__(256, 2) pulse_update(
    float* __restrict__ g,                // [2 slices, G * I, O] S
    float* __restrict__ g_held,           // like g, what devices with write noise hold; null without
    int* __restrict__ pulse_count,        // like g, below 0: failed after so many; null unless COUNTED
    const u16* __restrict__ device_map,   // [K, 2 slices, G * I, O] normals of the devices; null unless MAPPED
    const u32* __restrict__ input_words,  // [B, G * I]    trains
    const u32* __restrict__ error_words,  // [B, G * O]
    const float* __restrict__ length,     // [B, G]        slots of a train
    float* __restrict__ w,                // [G, O, I]     weight read out
    const float* __restrict__ w_max,      // [G * O]       weight of a full pair
    const i64* __restrict__ step,         // [1], or null: step_value
    UpdateLaw law, Endurance endurance, Slices slices, i64 step_value,
    RoundKeys keys,  // of the seed
    float g_min,
    float range,  // g_max - g_min, S
    float stuck_low, float stuck_high, int batch, int groups, int inputs, int outputs) {
  __shared__ Trains trains;
  __shared__ float weight[32][33];  // [wordline][bitline]
  const float (*scatter)[NODES * SCORES] = nullptr;
  if constexpr (MEASURED<LawOf<LAW>>) {  // seen after the first samples are staged
    __shared__ float table[2][NODES * SCORES];
    for (int k = threadIdx.x; k < 2 * NODES * SCORES; k += 256)
      table[k / (NODES * SCORES)][k % (NODES * SCORES)] = law.scatter[k / (NODES * SCORES)][k % (NODES * SCORES)];
    scatter = table;
  }
  const int group = blockIdx.z, i0 = blockIdx.y * 32, o0 = blockIdx.x * 32;
  const int line = threadIdx.x >> 3, quad = 4 * (threadIdx.x & 7);
  const bool inside = i0 + line < inputs && o0 + quad < outputs;
  const int count = !inside ? 0 : outputs - o0 - quad < 4 ? outputs - o0 - quad : 4;
  const u32 when = (u32)(step ? *step : step_value), columns = (u32)(o0 + quad) >> 2;
  const i64 row = (i64)group * inputs + i0 + line;
#if AGGREGATED && COUNTED
  const UpdateLaw& s = law;  // what is known of it would spill
#else
  decltype(auto) s = compiled(law);
#endif
  const float inverse_range = divide_fast(1.0f, range);
  const bool one_side = s.sides == REFERENCE;  // the second side
  const i32 pairs = SLICED ? slices.count : 1;
  const bool whole = count == 4 && (outputs & 3) == 0 && (((u64)g | (u64)g_held) & 15) == 0;
  float* const held = SHOWN ? g_held : g;
  float pair[4] = {};
#if AGGREGATED
  int raise[4] = {}, all[4] = {};
  for (int b0 = 0; b0 < batch; b0 += CHUNK) {
    const int samples =
        stage(trains, input_words, error_words, length, b0, batch, group, groups, i0, inputs, o0, outputs);
    if (inside)
      for (int b = 0; b < samples; ++b) coincide(trains, b, line, quad, raise, all);
  }
#endif
#pragma unroll 1
  for (u32 side = 0; side < 2; ++side) {
    const u32 plane = side * (u32)pairs;
    const i64 first = ((i64)plane * groups * inputs + row) * outputs + o0 + quad;
    Quad cells;
    const DeviceMap map{device_map, 2 * (i64)pairs * groups * inputs * outputs};
    u32 still = 0;  // devices that do not move, a bit each
    if (inside) {
      still = stuck_ones(stuck_low, stuck_high, columns, (u32)row, plane, keys);
      cells.make(map, first, count, columns, (u32)row, plane, keys);
    }
    float x[4], cell[4];
    load(held + first, cell, count, whole, g_min);
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = (cell[q] - g_min) * inverse_range;
    i32 more[4] = {};
    if (COUNTED)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (q < count && pulse_count[first + q] < 0) still |= 1u << q;
#if AGGREGATED
    if (inside && !(side && one_side))
      pulse(cells, still, x, s, raise, all, more, columns, (u32)row, side, 0, when, keys, scatter);
#else
    for (int b0 = 0; b0 < (side && one_side ? 0 : batch); b0 += CHUNK) {
      const int samples =
          stage(trains, input_words, error_words, length, b0, batch, group, groups, i0, inputs, o0, outputs);
      if (!inside) continue;
      for (int b = 0; b < samples; ++b) {
        int raise[4] = {}, all[4] = {};
        coincide(trains, b, line, quad, raise, all);
        if (all[0] | all[1] | all[2] | all[3])
          pulse(cells, still, x, s, raise, all, more, columns, (u32)row, side, (u32)(b0 + b), when, keys, scatter);
      }
    }
#endif
    float shown[4];
    if (SHOWN) {
      const Normals4 write = draw(1.0f, UPDATE_WRITE, columns, (u32)row, plane, when, keys);
#pragma unroll
      for (int q = 0; q < 4; ++q) shown[q] = max(fma(s.write_noise, write.z[q], x[q]), s.floor);
    }
    if (COUNTED) {
      const Normals4 bears = draw(endurance.spread, ENDURANCE, columns, (u32)row, plane, 0, keys);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (q >= count || more[q] == 0) continue;
        const i32 taken = after_wear(endurance, pulse_count[first + q], more[q], bears.z[q]);
        pulse_count[first + q] = taken;
        if (taken >= 0) continue;
        x[q] = failed_share(endurance, x[q]);
        if (SHOWN) shown[q] = failed_share(endurance, shown[q]);
      }
    }
    const float share = SLICED ? inverse_range * slice_weight(slices, 0) : inverse_range;
    load(held + first, cell, count, whole, g_min);  // anew: registers are scarce
    bool moved = false;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q < count && x[q] != (cell[q] - g_min) * inverse_range) {  // a cell that did not move keeps its bits
        moved = true;
        cell[q] = fma(x[q], range, g_min);
      }
    }
    if (moved) store(held + first, cell, count, whole);
    if (SHOWN) {
      load(g + first, cell, count, whole, g_min);
      bool pulsed = false;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (more[q] > 0) {
          pulsed = true;
          cell[q] = fma(shown[q], range, g_min);
        }
      if (pulsed) store(g + first, cell, count, whole);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) pair[q] = fma(cell[q], side ? -share : share, pair[q]);
  }
#pragma unroll 1
  for (i32 k = 1; k < pairs; ++k)
#pragma unroll 1
    for (u32 side = 0; side < 2; ++side) {
      const i64 first = (((i64)side * pairs + k) * groups * inputs + row) * outputs + o0 + quad;
      const float share = inverse_range * slice_weight(slices, k);
      float cell[4];
      load(g + first, cell, count, whole, 0.0f);
#pragma unroll
      for (int q = 0; q < 4; ++q) pair[q] = fma(cell[q], side ? -share : share, pair[q]);
    }
#pragma unroll
  for (int q = 0; q < 4; ++q)
    if (q < count) weight[line][quad + q] = pair[q] * w_max[(i64)group * outputs + o0 + quad + q];
  __syncthreads();
  for (int o = threadIdx.x >> 5; o < 32 && o0 + o < outputs; o += 8) {
    const int i = threadIdx.x & 31;
    if (i0 + i < inputs) w[((i64)group * outputs + o0 + o) * inputs + i0 + i] = weight[i][o];
  }
}

}  // namespace gpuxbar
