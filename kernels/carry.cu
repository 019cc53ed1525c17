// carry: digits of sliced weights that outgrew their base give their excess to the next slice, in place.
//
// Axes    two planes of devices a slice, positive ones first: g [2 slices, R, C]; R wordlines, C bitlines.
// Launch  1-D grid-stride, four bitlines of a wordline a thread, through all slices; the result does not depend on the
//         launch. Nothing is read where no slice is due, which `updates` says in device memory where given.
// Random  write noise of (plane, wordline, bitline, updates), spread and stuck cells of (plane, wordline, bitline).
// Wrapper gpuxbar/ops/carry.py      Oracle gpuxbar/reference/carry.py
#include "gpuxbar/programming.cuh"
#include "gpuxbar/slices.cuh"

namespace gpuxbar {

// Where four neighbouring weights are.
struct Spot {
  i64 first, plane;  // cell of plane 0, cells of a plane
  u32 group, row;
  int count;
  bool aligned;
};

// Four pairs of one slice. Units: the digit, and what both devices of a pair lie above g_min.
struct Pairs {
  float digit[4], common[4];
  bool writable[4];
};

GPUXBAR_FN void load(const float* from, const Spot& at, float to[4]) {
  to[0] = to[1] = to[2] = to[3] = 0.0f;
  if (at.aligned) {
    const float4 v = *(const float4*)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    for (int q = 0; q < at.count; ++q) to[q] = from[q];
  }
}

GPUXBAR_FN Counter draw_stuck(const Programming& p, const Spot& at, u32 plane) {
  if (!(p.stuck_low > 0.0f || p.stuck_high < 1.0f)) return Counter{0x80000000u, 0x80000000u, 0x80000000u, 0x80000000u};
  return philox<10>(counter(at.group, at.row, STUCK, plane, 0), (u32)p.seed, (u32)(p.seed >> 32));
}

GPUXBAR_FN Pairs load_pairs(const Programming& p, const Slices& s, const float* g, const int* pulse_count,
                            const Spot& at, i32 k) {
  Pairs pairs;
  float side[2][4];
#pragma unroll
  for (int q = 0; q < 4; ++q) pairs.writable[q] = true;
#pragma unroll
  for (i32 n = 0; n < 2; ++n) {
    const i64 first = (i64)(n * s.count + k) * at.plane + at.first;
    load(g + first, at, side[n]);
    const Counter words = draw_stuck(p, at, (u32)(n * s.count + k));
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool failed = pulse_count && q < at.count && pulse_count[first + q] < 0;
      pairs.writable[q] = pairs.writable[q] && !stuck(p, uniform(word[q])) && !failed;
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

// Write the digits of chosen pairs of slice k.
GPUXBAR_FN void write_pairs(const Programming& p, const Slices& s, float* g, float* hidden, const int* pulse_count,
                            const Spot& at, i32 k, u32 step, const float digit[4], const bool chosen[4]) {
  if (!(chosen[0] || chosen[1] || chosen[2] || chosen[3])) return;
  const u32 key_lo = (u32)p.seed, key_hi = (u32)(p.seed >> 32);
#pragma unroll
  for (i32 n = 0; n < 2; ++n) {
    const u32 plane = (u32)(n * s.count + k);
    const i64 first = (i64)plane * at.plane + at.first;
    Normals4 spread{}, noise{};
    if (p.spread > 0.0f) spread = normals4(counter(at.group, at.row, DEVICE_SPREAD, plane, 0), key_lo, key_hi);
    if (noisy_writes(p)) noise = normals4(counter(at.group, at.row, CARRY, plane, step), key_lo, key_hi);
    const Counter words = draw_stuck(p, at, plane);
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (!chosen[q] || q >= at.count || (pulse_count && pulse_count[first + q] < 0)) continue;
      if (stuck(p, uniform(word[q]))) continue;
      const float target = digit_target(p, n ? -digit[q] : digit[q]);
      const float value = written(p, target, spread.z[q], noise.z[q], uniform(word[q]));
      g[first + q] = value;
      if (hidden) hidden[first + q] = value;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    carry(float* __restrict__ g,                // [2 slices, R, C] S
          float* __restrict__ hidden,           // like g, what devices with write noise hold; else null
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
  const i64 stride = (i64)gridDim.x * blockDim.x, groups = (cols + 3) / 4;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const u32 group = (u32)(e % groups), row = (u32)(e / groups);
    const int count = cols - 4 * (int)group < 4 ? cols - 4 * (int)group : 4;
    const Spot at{(i64)row * cols + 4 * (i64)group,     rows * cols, group, row, count,
                  (cols & 3) == 0 && ((u64)g & 15) == 0};
    Pairs here = load_pairs(p, slices, g, pulse_count, at, 0);
    float in[4] = {}, digit[4];
    bool chosen[4];
    for (i32 k = 0; k <= due; ++k) {  // the last of them only takes
      const bool gives = k < due, looked = gives || due == last;
      Pairs next = here;
      if (gives) next = load_pairs(p, slices, g, pulse_count, at, k + 1);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float total = here.digit[q] + in[q];
        const float out = gives && here.writable[q] && next.writable[q] ? excess(total, slices.bits) : 0.0f;
        chosen[q] = in[q] != 0.0f || out != 0.0f || (!p.balanced && looked && here.common[q] >= 1.0f);
        digit[q] = fma(-base, out, total);
        in[q] = out;
      }
      write_pairs(p, slices, g, hidden, pulse_count, at, k, (u32)step, digit, chosen);
      here = next;
    }
    if (due < last) continue;
#pragma unroll
    for (int q = 0; q < 4; ++q) {  // now of the highest slice
      chosen[q] = excess(digit[q], slices.bits) != 0.0f;
      digit[q] = digit[q] < 0.0f ? 1.0f - base : base - 1.0f;
    }
    for (i32 k = 0; k <= last; ++k) write_pairs(p, slices, g, hidden, pulse_count, at, k, (u32)step, digit, chosen);
  }
}

}  // namespace gpuxbar
