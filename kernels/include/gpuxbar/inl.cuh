// inl: the integral non-linearity of a converter.
//
// Source: IEEE Std 1241-2010 (the term, of curves through both ends of the range); an amplifier's third harmonic bends so.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// How all curves bend: u - u^3 with u the share of the range, so that both ends and 0 stay where they are, and all beyond.
GPUXBAR_FN float bow(float steps, float code_max) {
  const float u = min(max(steps / code_max, -1.0f), 1.0f);
  return fma(-u * u, u, u);
}

// Steps as a converter finds them, or makes them, whose curve is `inl` steps off at most: (3 sqrt(3) / 2) inl of their bow more.
GPUXBAR_FN float bowed(float steps, float inl, float bow) { return fma(2.598076211f * inl, bow, steps); }
GPUXBAR_FN float bent(float steps, float inl, float code_max) { return bowed(steps, inl, bow(steps, code_max)); }

}  // namespace gpuxbar
