// slices: a weight on several pairs of devices, as digits of a number of base 2^bits, least significant first.
//
// A digit is the difference of a pair, in units of which `window` span the window of a device: more than the base has,
// so that digits can outgrow it until they are carried. A full weight is `full` units of the lowest digit.
// Oracles: gpuxbar/reference/device_update.py, carry.py.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// Twin of `Slices` in gpuxbar/ops/pairs.py. An unsliced weight is one slice of one unit.
struct Slices {
  i32 count, bits;
  i32 lowest;          // a change goes to the lowest digit alone; else every digit of it to its own slice
  float full, window;  // units
};

// 2^n for -127 < n < 128.
GPUXBAR_FN float power_of_two(i32 n) { return bits_float((u32)(n + 127) << 23); }

// Share of a full weight of the whole window of slice k.
GPUXBAR_FN float slice_weight(const Slices& s, i32 k) { return power_of_two(k * s.bits) * (s.window / s.full); }

// What slice k takes of a change of `units` of the weight, at most a full one, in units of the slice.
// Powers of two scale exactly and numbers of 24 bits have exact floors, so the digits add up to the change.
GPUXBAR_FN float slice_units(const Slices& s, float units, i32 k) {
  const float size = min(abs(units), s.full), unit = power_of_two(-k * s.bits);
  const float from = k == 0 ? size : floor(size * unit);
  const float above = power_of_two(s.bits) * floor(size * (unit * power_of_two(-s.bits)));
  const float digit = k + 1 < s.count ? from - above : from;
  const float asked = s.lowest ? (k == 0 ? abs(units) : 0.0f) : digit;
  return units < 0.0f ? -asked : asked;
}

// What the pair of slice k is asked for, in shares of its window, when the weight is to change by `change` of a full one.
GPUXBAR_FN float slice_change(const Slices& s, float change, i32 k) {
  return slice_units(s, change * s.full, k) / s.window;
}

// Slices that give up their excess after so many updates: none, or the lowest ones.
GPUXBAR_FN i32 slices_due(const Slices& s, i64 interval, i64 updates) {
  if (updates <= 0) return 0;
  if (!s.lowest) return updates % interval == 0 ? s.count - 1 : 0;
  i32 due = 0;
  while (due + 1 < s.count && updates % (interval << (due * s.bits)) == 0) ++due;
  return due;
}

constexpr float UNRESOLVED = 0.0009765625f;  // of a unit: float32 conductances hold no less

// Units that a digit gives to the next one of 2^bits times its weight; 0 while it is smaller than the base.
GPUXBAR_FN float excess(float digit, i32 bits) {
  const float units = (float)(i32)((abs(digit) + UNRESOLVED) * power_of_two(-bits));
  return digit < 0.0f ? -units : units;
}

}  // namespace gpuxbar
