// programming: the conductance of one device after a weight was written to it.
//
// A weight w in [-1, 1] becomes shares of the conductance window: of |w| on its side of a pair, a digit of |w| on
// each slice, or (1 + w) / 2 of a single device around the middle of the window. Levels round the share; the device's
// spread, the noise of the write and stuck cells make it a conductance, whose read noise follows from it.
// Oracle: gpuxbar/reference/program.py.
#pragma once
#include "gpuxbar/normal.cuh"

namespace gpuxbar {

// How planes of pairs are joined; OFFSET is one device a weight.
enum Merge : i64 { MERGE_NONE = 0, MERGE_SUBTRACT = 1, MERGE_ALL = 2, MERGE_OFFSET = 3 };

// What gives the weight of a full pair: a setting, the largest weight of all, or the largest of each output.
enum Measure : i32 { MEASURE_NOTHING = 0, MEASURE_ALL = 1, MEASURE_ROWS = 2 };

// Standard deviation of what a write leaves, S: a polynomial in r = target / g_max. Mirrored in gpuxbar/ops/program_cuda.py.
struct Deviation {
  float terms[5];  // S, of r^0 to r^4

  GPUXBAR_METHOD bool any() const {
    return terms[0] != 0.0f || terms[1] != 0.0f || terms[2] != 0.0f || terms[3] != 0.0f || terms[4] != 0.0f;
  }
  GPUXBAR_METHOD float at(float r) const {
    return fma(fma(fma(fma(terms[4], r, terms[3]), r, terms[2]), r, terms[1]), r, terms[0]);
  }
};

// Mirrored field by field in gpuxbar/ops/program.py.
struct Programming {
  i64 groups, inputs, outputs;
  i64 slices, slice_bits;  // slice_bits 0: one continuous slice
  i64 merge;
  i64 scale_count;  // values of w_max: 1 or groups * outputs
  i64 step;
  i64 balanced;  // pairs lie around the middle of the window, else one device of each at g_min
  u64 seed;
  float digit_max;     // of a slice, at g_max
  float steps;         // steps between levels over |w| (offset: over 1 + w), 0: continuous
  float g_min, g_max;  // S
  float spread;        // relative standard deviation between devices
  Deviation noise;     // of a write
  float stuck_low;     // a uniform below: stuck at g_min
  float stuck_high;    // a uniform above: stuck at g_max
  float read_var;      // S^2, variance of a read of a device at g_max, per squared volt
  float read_power;    // that variance grows with (g / g_max)^read_power
};

GPUXBAR_FN float clip_weight(float w) { return min(max(w, -1.0f), 1.0f); }

// Nearest level of a share, of `steps` steps.
GPUXBAR_FN float level_share(float share, float steps) { return round_even(share * steps) / steps; }

// |w| / w_max as an integer of `top` = base^slices - 1, up to 2^32 - 1; adding 2^52 rounds half to even and leaves
// the integer in the low word.
GPUXBAR_FN u32 weight_code(float w, double inverse_w_max, double top) {
  const double share = (double)abs(w) * inverse_w_max;
  return (u32)double_bits((share < 1.0 ? share : 1.0) * top + 4503599627370496.0);
}

// Target of a device on one side of a pair, S: `side` is 1 for positive weights, -1 for negative ones.
GPUXBAR_FN float pair_target(const Programming& p, float w, float side) {
  const float share = p.balanced ? fma(0.5f * side, w, 0.5f) : max(side * w, 0.0f);
  return fma(p.steps > 0.0f ? level_share(share, p.steps) : share, p.g_max - p.g_min, p.g_min);
}

// Target of a device whose pair holds a digit, as its side sees it, S; kept inside the window.
GPUXBAR_FN float digit_target(const Programming& p, float digit) {
  const float unit = (p.g_max - p.g_min) / p.digit_max, own = min(digit, p.digit_max);
  return p.balanced ? fma(0.5f * unit, max(own, -p.digit_max), 0.5f * (p.g_min + p.g_max))
                    : fma(max(own, 0.0f), unit, p.g_min);
}

// The same for slice k of a weight of that code.
GPUXBAR_FN float slice_target(const Programming& p, float w, u32 code, i64 k, float side) {
  const u32 mask = (1u << p.slice_bits) - 1;
  const float digit = (float)(i32)(code >> (u32)(k * p.slice_bits) & mask);
  return digit_target(p, side * w > 0.0f ? digit : -digit);
}

// Target of a single device, S. The middle level is w = 0; an even number of levels leaves the last one unused.
GPUXBAR_FN float offset_target(const Programming& p, float w) {
  const float middle = (float)(i32)(0.5f * p.steps);
  const float share = p.steps > 0.0f ? (middle + round_even(w * middle)) / p.steps : fma(0.5f, w, 0.5f);
  return fma(share, p.g_max - p.g_min, p.g_min);
}

// Whether a device of that uniform is stuck.
GPUXBAR_FN bool stuck(const Programming& p, float u) { return u < p.stuck_low || u > p.stuck_high; }

// Conductance left by a write, S: z_spread and z_write are standard normals, u uniform in (0, 1).
GPUXBAR_FN float written(const Programming& p, float target, float z_spread, float z_write, float u) {
  const float device = fma(target * p.spread, z_spread, target);
  const float noisy = max(fma(p.noise.at(target / p.g_max), z_write, device), 0.0f);
  const float low = u < p.stuck_low ? p.g_min : noisy;
  return u > p.stuck_high ? p.g_max : low;
}

// x^y for 0 <= x, with 0^0 = 1.
GPUXBAR_FN float power(float x, float y) {
  const float positive = exp(max(0.6931471806f * y * log2_fast(max(x, 1e-30f)), -87.0f));
  return x > 0.0f || y == 0.0f ? positive : 0.0f;
}

// Variance of a device's read per squared volt, S^2.
GPUXBAR_FN float read_variance(const Programming& p, float g) {
  const float share = g / p.g_max;
  return p.read_var * (p.read_power == 1.0f   ? share
                       : p.read_power == 2.0f ? share * share
                                              : power(share, p.read_power));
}

// A weight's term of its array's fingerprint: bits times an odd number of its place, mod 2^64. Terms add up in any
// order, and a single changed weight always changes the sum.
GPUXBAR_FN u64 fingerprint_term(u32 bits, u32 place) {
  const u32 a = (place ^ place >> 16) * 0x7FEB352Du, low = (a ^ a >> 15) * 0x846CA68Bu;
  const u32 high = (low ^ low >> 16) * 0x9E3779B9u;
  return (u64)bits * (low | 1u) + ((u64)bits * high << 32);
}

}  // namespace gpuxbar
