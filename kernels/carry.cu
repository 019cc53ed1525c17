// carry: digits of sliced weights that outgrew their base give their excess to the next slice, in place.
//
// Axes    two planes of devices a slice, positive ones first: g [2 slices, R, C]; R wordlines, C bitlines.
// Launch  1-D grid-stride, four bitlines of a wordline a thread, through all slices; the result does not depend on the
//         launch. Nothing is read where no slice is due, which `updates` says in device memory where given.
// Random  write noise of (plane, wordline, bitline, updates), spread and stuck cells of (plane, wordline, bitline).
// Wrapper gpuxbar/ops/carry.py      Oracle gpuxbar/reference/carry.py
#include "gpuxbar/four.cuh"
#include "gpuxbar/programming.cuh"
#include "gpuxbar/slices.cuh"

namespace gpuxbar {

// Four pairs of one slice. Units: the digit, and what both devices of a pair lie above g_min.
struct Pairs {
  float digit[4], common[4];
  bool writable[4];
};

GPUXBAR_FN float stuck_rates(const Programming& p) { return p.stuck_low + (1.0f - p.stuck_high); }

GPUXBAR_FN Pairs load_pairs(const Programming& p, const Slices& s, const float* g, const int* pulse_count,
                            const Four& at, i64 cells, bool whole, i32 k) {
  Pairs pairs;
  float side[2][4];
#pragma unroll
  for (int q = 0; q < 4; ++q) pairs.writable[q] = true;
#pragma unroll
  for (i32 n = 0; n < 2; ++n) {
    const u32 plane = (u32)(n * s.count + k);
    const i64 first = (i64)plane * cells + at.first;
    load(g + first, side[n], at.count, whole, 0.0f);
    const Uniforms4 u = draw_stuck(stuck_rates(p), at.group, at.row, plane, p.seed);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool failed = pulse_count && q < at.count && pulse_count[first + q] < 0;
      pairs.writable[q] = pairs.writable[q] && !stuck(p, u.u[q]) && !failed;
    }
  }
  const float units = s.window / (p.g_max - p.g_min);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    pairs.digit[q] = (side[0][q] - side[1][q]) * units;
    pairs.common[q] = (min(side[0][q], side[1][q]) - p.g_min) * units;
  }
  return pairs;
}

// Write the digits of chosen pairs of slice k, which can be written.
GPUXBAR_FN void write_pairs(const Programming& p, const Slices& s, float* g, float* g_held, const Four& at, i64 cells,
                            i32 k, u32 step, const float digit[4], const bool chosen[4]) {
  if (!(chosen[0] || chosen[1] || chosen[2] || chosen[3])) return;
#pragma unroll
  for (i32 n = 0; n < 2; ++n) {
    const u32 plane = (u32)(n * s.count + k);
    const i64 first = (i64)plane * cells + at.first;
    const Normals4 spread = draw(p.spread, DEVICE_SPREAD, at.group, at.row, plane, 0, p.seed);
    const Normals4 noise = draw(p.noise.any() ? 1.0f : 0.0f, CARRY, at.group, at.row, plane, step, p.seed);
    const Uniforms4 u = draw_stuck(stuck_rates(p), at.group, at.row, plane, p.seed);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (!chosen[q] || q >= at.count) continue;
      const float target = digit_target(p, n ? -digit[q] : digit[q]);
      const float value = written(p, target, spread.z[q], noise.z[q], u.u[q]);
      g[first + q] = value;
      if (g_held) g_held[first + q] = value;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    carry(float* __restrict__ g,                // [2 slices, R, C] S
          float* __restrict__ g_held,           // like g, what devices with write noise hold; else null
          const int* __restrict__ pulse_count,  // like g, below 0: failed devices, which stay; or null
          const i64* __restrict__ updates,      // [1], or null: updates_value
          Programming p,                        // of its fields, those of a write
          Slices slices, i64 updates_value, i64 interval, i64 rows, int cols,
          i64 size)  // R * ceil(C / 4)
{
  const i64 step = updates ? *updates : updates_value;
  const i32 due = slices_due(slices, interval, step);
  if (due == 0) return;
  const i32 last = slices.count - 1;
  const float base = power_of_two(slices.bits);
  const i64 stride = (i64)gridDim.x * blockDim.x, cells = rows * cols;
  const bool whole = (cols & 3) == 0 && ((u64)g & 15) == 0;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const Four at(e, rows, cols);
    Pairs here = load_pairs(p, slices, g, pulse_count, at, cells, whole, 0);
    float in[4] = {}, digit[4];
    bool chosen[4];
    for (i32 k = 0; k <= due; ++k) {  // the last of them only takes
      const bool gives = k < due, looked = gives || due == last;
      Pairs next = here;
      if (gives) next = load_pairs(p, slices, g, pulse_count, at, cells, whole, k + 1);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float total = here.digit[q] + in[q];
        const float out = gives && here.writable[q] && next.writable[q] ? excess(total, slices.bits) : 0.0f;
        const bool crowded = !p.balanced && looked && here.writable[q] && here.common[q] >= 1.0f;
        chosen[q] = in[q] != 0.0f || out != 0.0f || crowded;
        digit[q] = fma(-base, out, total);
        in[q] = out;
      }
      write_pairs(p, slices, g, g_held, at, cells, k, (u32)step, digit, chosen);
      here = next;
    }
    if (due < last) continue;
#pragma unroll
    for (int q = 0; q < 4; ++q) {  // now of the highest slice
      in[q] = here.writable[q] ? excess(digit[q], slices.bits) : 0.0f;
      digit[q] = digit[q] < 0.0f ? 1.0f - base : base - 1.0f;
    }
    if (in[0] == 0.0f && in[1] == 0.0f && in[2] == 0.0f && in[3] == 0.0f) continue;
    for (i32 k = 0; k <= last; ++k) {  // beyond full
      here = load_pairs(p, slices, g, pulse_count, at, cells, whole, k);
#pragma unroll
      for (int q = 0; q < 4; ++q) chosen[q] = in[q] != 0.0f && here.writable[q];
      write_pairs(p, slices, g, g_held, at, cells, k, (u32)step, digit, chosen);
    }
  }
}

}  // namespace gpuxbar
