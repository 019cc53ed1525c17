// update: how one cell answers a wanted change of its conductance.
//
// In shares of the window (x = (g - g_min) / range, d = |dG| / range) the three laws are one exponential approach,
//
//   up:    x' = x + (T - x) (1 - exp(-rate d))          down: the mirror image, 1 - x for x
//
// with T = 1 / (1 - exp(-rate)) for Agarwal and NeuroSim, so that d = 1 from the far end just spans the window and
// rate -> 0 is linear, and T = 1 for soft bounds. NeuroSim's rate is 1 / A_norm of its non-linearity label.
// The noise of an update adds variances: of the change itself, of its size, of its pulses.
//
// Source: Agarwal et al., IJCNN 2016; Peng et al., DNN+NeuroSim V2.0, IEEE TCAD 2021; Fusi and Abbott, Nature
// Neuroscience 2007. Oracle: gpuxbar/reference/device_update.py.
#pragma once
#include "gpuxbar/normal.cuh"

namespace gpuxbar {

enum Law : i32 { AGARWAL = 0, NEUROSIM = 1, SOFT_BOUNDS = 2 };

// Mirrored field by field in gpuxbar/ops/device_update.py.
struct UpdateLaw {
  float rate_up, rate_down;    // of the exponential approach, for the whole window
  float label_up, label_down;  // NeuroSim's non-linearity labels
  float spread;                // device to device: relative for rates, absolute for labels
  float pulses;                // pulses over the window
  float gamma2;                // variance of the noise, in shares of the window squared: per change,
  float cycle2;                //   per change squared,
  float pulse_cycle2;          //   per change squared and pulse of it,
  float range_cycle2;          //   and per pulse
  i32 law;
  i32 integer_pulses;
};

// 1 - exp(-y), to float precision for small y too.
GPUXBAR_FN float one_minus_exp(float y) {
  float p = fma(y, 1.9841270e-4f, -1.3888889e-3f);
  p = fma(p, y, 8.3333333e-3f);
  p = fma(p, y, -4.1666667e-2f);
  p = fma(p, y, 0.16666667f);
  p = fma(p, y, -0.5f);
  p = fma(p, y, 1.0f);
  const float small = y * p;
  const float large = 1.0f - exp(min(max(-y, -80.0f), 80.0f));
  return abs(y) < 0.35f ? small : large;
}

// Rate of a NeuroSim label, -9.5 .. 9.5: inverts label = 10.10153 max_x[(1 - e^(-rate x)) / (1 - e^-rate) - x].
// A fit in -ln(1 - y^2); relative error below 1e-4.
GPUXBAR_FN float rate_of_label(float label) {
  const float y = 0.098994905f * min(max(label, -9.5f), 9.5f);
  const float t = -0.6931471806f * log2_fast(1.0f - y * y);
  float q = fma(t, -5.67243968e-3f, 6.23919601e-2f);
  q = fma(q, t, -2.81977694e-1f);
  q = fma(q, t, 6.64242172e-1f);
  q = fma(q, t, -8.26882139e-1f);
  q = fma(q, t, 3.99391496e-1f);
  q = fma(q, t, 2.07849876e-1f);
  q = fma(q, t, 8.92310241e-1f);
  return 8.0f * y * exp(q * t);
}

// Rate of one device, given its standard normal spread.
GPUXBAR_FN float device_rate(const UpdateLaw& law, float rate, float label, float z) {
  if (law.law == NEUROSIM) return rate_of_label(fma(law.spread, z, label));
  return max(rate * fma(law.spread, z, 1.0f), 0.0f);
}

// x after a wanted change `wanted` (signed, shares of the window, at most the window); z is the update's normal.
GPUXBAR_FN float updated(const UpdateLaw& law, float x, float wanted, float rate_up, float rate_down, float z) {
  const bool up = wanted > 0.0f;
  float d = min(abs(wanted), 1.0f);
  if (law.integer_pulses) d = round_even(d * law.pulses) / law.pulses;
  const float rate = up ? rate_up : rate_down;
  const float share = one_minus_exp(rate * d);
  const float reach = law.law == SOFT_BOUNDS ? share : abs(rate) > 1e-6f ? share / one_minus_exp(rate) : d;
  const float change = up ? fma(-x, share, reach) : fma(1.0f - x, share, -reach);
  const float size = abs(change), n = d * law.pulses;
  const float per_size = fma(size, law.cycle2 + law.pulse_cycle2 / max(n, 1e-30f), law.gamma2);
  const float deviation = sqrt_fast(fma(size, per_size, n * law.range_cycle2));
  const float moved = min(max(x + fma(deviation, z, change), 0.0f), 1.0f);
  return d > 0.0f ? moved : x;
}

}  // namespace gpuxbar
