// converter: the digital-to-analog and analog-to-digital conversions at the edges of a tile.
//
// Source: Shafiee et al., ISAAC, ISCA 2016 (bit streams, shift-and-add). Rounding is half to even.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// Code of a value in units of one DAC step, clipped to [code_min, code_max].
GPUXBAR_FN float dac_code(float value, float inverse_lsb, float code_min, float code_max) {
  return round_even(min(max(value * inverse_lsb, code_min), code_max));
}

// What a DAC drives in one stream: `stream_bits` magnitude bits of the code, from bit `shift` upwards.
// phase 0 drives signed digits (bipolar), phase +1 the positive codes only, phase -1 the negated negative ones.
GPUXBAR_FN float stream_digit(i32 code, int shift, u32 mask, int phase) {
  const i32 magnitude = code < 0 ? -code : code;
  const i32 digit = (i32)(((u32)magnitude >> shift) & mask);
  if (phase == 0) return (float)(code < 0 ? -digit : digit);
  return (float)(phase > 0 ? (code > 0 ? digit : 0) : (code < 0 ? digit : 0));
}

// ADC steps in a partial sum of 1, which is `amperes`: the one factor of a conversion. It stays finite, so that no current is
// 0 steps however small they are.
GPUXBAR_FN float steps_of_one(float amperes, float adc_lsb) { return min(amperes / adc_lsb, 3.402823466e38f); }

// Code of a current in units of one ADC step (noise, gain and offset already in it).
GPUXBAR_FN float adc_code(float steps, float code_min, float code_max) {
  return round_even(min(max(steps, code_min), code_max));
}

// Whether a current in units of `unit` ADC steps is inside the range, to rounding, without a branch. One-sided currents are never
// below it but by noise or an offset, which shut no gate: else noise alone would shut half of the gates of lines that nothing
// drives.
GPUXBAR_FN bool in_range(float current, float code_min, float code_max, float unit = 1.0f) {
  const float least = code_min < 0.0f ? unit * (code_min - 0.5f) : bits_float(0xFF800000u);
  return (current <= unit * (code_max + 0.5f)) & (current >= least);
}

// The same conversion, to integers that are added up, by the fewest instructions of a GPU, none of them the conversion
// pipe's. It takes currents in units of ADC_STEP steps. Floats from 1/2 to 1 are multiples of 2^-24, so that adding 3/4 to
// a count of those rounds it half to even, and saturating leaves bits without a sign, in order; before sm_90, which clamps
// integers at both ends at once, 1.5 * 2^23 is added to steps that were clamped.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr float ADC_STEP = 1.0f;
#else
constexpr float ADC_STEP = 5.9604644775390625e-8f;  // 2^-24
#endif

struct Adc {
  float code_min, code_max;

  GPUXBAR_METHOD i32 lowest() const { return (i32)code_min; }

  // The code of a current, counted from the lowest one, plus `bias`.
  GPUXBAR_METHOD u32 code(float current) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return float_bits(min(max(current, code_min), code_max) + 12582912.0f);
#else
    const i32 above = (i32)float_bits(add_saturated(current, 0.75f)) - (0x3F400000 + lowest());
    return (u32)least_positive(above, (i32)code_max - lowest());
#endif
  }
  GPUXBAR_METHOD u32 bias() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return 0x4B400000u + (u32)lowest();
#else
    return 0;
#endif
  }
  GPUXBAR_METHOD bool in_range(float current) const { return gpuxbar::in_range(current, code_min, code_max, ADC_STEP); }
};

// Part of a gate that one unit of digital weight inside the range makes, of `weights` on every tile. Without any weight no
// conversion counts, and the gate is 0.
GPUXBAR_FN float gate_part(float weights, i64 tiles) { return weights > 0.0f ? 1.0f / (weights * (float)tiles) : 0.0f; }

}  // namespace gpuxbar
