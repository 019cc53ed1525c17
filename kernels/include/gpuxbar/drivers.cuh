// drivers: what lines are driven with for digits by DACs with errors, and what devices that are not ohmic make of it.
//
// Source: IEEE Std 1241-2010 (integral non-linearity); the current of filaments with a gap, I0 exp(-gap / g0) sinh(v / v_sinh):
// Guan, Yu, Wong, IEEE Electron Device Letters 33, 1405 (2012), doi:10.1109/LED.2012.2210856, as in the Verilog-A model of Jiang,
// Wong (2014), doi:10.4231/D37H1DN48. Oracle: `Drivers` in gpuxbar/reference/tile_mvm.py.
#pragma once
#include "gpuxbar/inl.cuh"

namespace gpuxbar {

// By its series, for |x| < 1, where exponentials would cancel.
GPUXBAR_FN float sinh_near(float x) {
  const float x2 = x * x;
  float p = fma(x2, 2.7557319e-6f, 1.9841270e-4f);
  p = fma(p, x2, 8.3333333e-3f);
  p = fma(p, x2, 0.16666667f);
  return fma(p * x2, x, x);
}

// Branch-free, so that loops vectorise; relative error below 4e-7 for |x| <= 80, beyond which it stays what it is there.
GPUXBAR_FN float sinh(float x) {
  const float e = exp(min(abs(x), 80.0f));
  const u32 far = float_bits(0.5f * (e - 1.0f / e)) | (float_bits(x) & 0x80000000u);
  return abs(x) < 1.0f ? sinh_near(x) : bits_float(far);
}

// The DAC of a line; its offset is in steps.
struct DacError {
  float gain, offset, inl;
};

// Steps that a DAC makes of a digit with this bow.
GPUXBAR_FN float dac_steps(float digit, float bow, const DacError& error) {
  return fma(bowed(digit, error.inl, bow), error.gain, error.offset);
}
// The same where the largest digit is `digit_max`.
GPUXBAR_FN float dac_steps(float digit, const DacError& error, float digit_max) {
  return dac_steps(digit, bow(digit, digit_max), error);
}

// How devices conduct: steps of the DAC over `v_sinh`, and what makes the largest digit itself of its sinh.
struct Conduction {
  float bend, scale;
};

// Steps of which ohmic devices would make the current of these.
GPUXBAR_FN float conducted(float steps, const Conduction& device) { return device.scale * sinh(device.bend * steps); }

}  // namespace gpuxbar
