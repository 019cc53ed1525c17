// endurance: the pulses that one device has taken, and when it fails.
//
// A count is an integer of the device's pulses; below 0, the device failed after so many.
// Oracle: gpuxbar/reference/endurance.py.
#pragma once
#include "gpuxbar/normal.cuh"

namespace gpuxbar {

enum Failed : i32 { HELD = 0, AT_G_MIN = 1, AT_G_MAX = 2 };

// Twin of `Wear` in gpuxbar/ops/pairs.py.
struct Endurance {
  float pulses, spread;  // median of what devices bear, standard deviation of its logarithm
  i32 failed;
};

constexpr i32 MOST_PULSES = 0x7FFFFFFF;

// A number of pulses that is `n` in the mean; u is uniform in (0, 1).
GPUXBAR_FN i32 whole_pulses(float n, float u) { return (i32)(n + u); }

// The count of a device that lived, after more pulses; z is the device's standard normal.
GPUXBAR_FN i32 after_wear(const Endurance& e, i32 taken, i32 pulses, float z) {
  const i32 total = pulses > MOST_PULSES - taken ? MOST_PULSES : taken + pulses;
  return pulses > 0 && (float)total > e.pulses * exp(e.spread * z) ? -total : total;
}

// Share of the window of a device that has just failed at x.
GPUXBAR_FN float failed_share(const Endurance& e, float x) {
  return e.failed == HELD ? x : e.failed == AT_G_MAX ? 1.0f : 0.0f;
}

}  // namespace gpuxbar
