// ageing: what becomes of the conductance of one device as time passes.
//
// Source: Joshi et al., Nature Communications 2020 (drift and its noise); Rasch et al., aihwkit, AICAS 2021 (retention).
// Oracles: gpuxbar/reference/drift.py and relax.py.
#pragma once
#include "gpuxbar/laws.cuh"

namespace gpuxbar {

// Twin of `Settings` in gpuxbar/ops/drift.py. Both lines in ln r, r = g / g_max, are kept inside their limits.
struct Drift {
  float inverse_g_max;                           // 1/S
  float nu, nu_slope, nu_min, nu_max;            // mean exponent
  float std, std_slope, std_min, std_max;        // its standard deviation between devices
  float log_time;                                // ln(t / t_0)
  float flicker, flicker_exponent, flicker_max;  // relative noise at g_max, its growth towards 0, its limit
  float growth;                                  // root of the accumulated 1/f spectrum
};

GPUXBAR_FN float between(float x, float low, float high) { return min(max(x, low), high); }

// Conductance after a time, S: z_nu and z_flicker are standard normals.
GPUXBAR_FN float drifted(const Drift& d, float g, float z_nu, float z_flicker) {
  const float ln_r = 0.6931471806f * log2_fast(max(g * d.inverse_g_max, 1e-6f));
  const float nu = between(fma(-d.nu_slope, ln_r, d.nu), d.nu_min, d.nu_max);
  const float std = between(fma(-d.std_slope, ln_r, d.std), d.std_min, d.std_max);
  const float later = g * exp(max(-abs(fma(std, z_nu, nu)) * d.log_time, -87.0f));
  const float share = min(d.flicker * exp(-d.flicker_exponent * ln_r), d.flicker_max) * d.growth;
  return max(fma(later * share, z_flicker, later), 0.0f);
}

// Twin of `Table` in gpuxbar/ops/drift.py: changes at an age, at rising shares of g_max.
struct MeasuredDrift {
  i32 count;
  float inverse_g_max;                  // 1/S
  float share[32], shift[32], std[32];  // mean and standard deviation, S
};

// Conductance after that age, S: z is a standard normal.
GPUXBAR_FN float changed(const MeasuredDrift& d, float g, float z) {
  const float r = between(g * d.inverse_g_max, d.share[0], d.share[d.count - 1]);
  int k = 0;
  for (int i = 1; i < d.count - 1; ++i) k += r >= d.share[i];
  const float part = (r - d.share[k]) / (d.share[k + 1] - d.share[k]);
  const float shift = fma(part, d.shift[k + 1] - d.shift[k], d.shift[k]);
  const float deviation = fma(part, d.std[k + 1] - d.std[k], d.std[k]);
  return max(fma(deviation, z, g + shift), 0.0f);
}

// Twin of `Settings` in gpuxbar/ops/relax.py.
struct Retention {
  float g_rest;                 // S
  float rate;                   // time over the median time constant
  float spread;                 // standard deviation of its logarithm between devices
  float stuck_low, stuck_high;  // rates of stuck devices
};

// Conductance after that time, S: z is a standard normal, u uniform in (0, 1).
GPUXBAR_FN float relaxed(const Retention& s, float g, float z, float u) {
  const float x = min(s.rate * exp(-s.spread * z), 80.0f);
  const float to = fma(s.g_rest - g, gone(x), g);
  return u < s.stuck_low || u > 1.0f - s.stuck_high ? g : to;
}

}  // namespace gpuxbar
