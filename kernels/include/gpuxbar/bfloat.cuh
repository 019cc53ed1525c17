// bfloat: bf16, the upper half of a float32: 8 significant bits.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// Nearest bf16 of a finite number, half to even.
GPUXBAR_FN i16 bfloat_bits(float x) {
  const u32 bits = float_bits(x);
  return (i16)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

GPUXBAR_FN float bfloat_value(i16 b) { return bits_float((u32)(u16)b << 16); }

}  // namespace gpuxbar
