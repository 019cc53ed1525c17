// halves: 16-bit numbers and their bits.
#pragma once
#include <cstdint>
#include <cstring>

namespace shim {

inline float half_to_float(unsigned bits) {  // by hand: what g++ makes of a cast is slow where a CPU has no halves
  const uint32_t magnitude = (bits & 0x7FFF) << 13;  // of float, but for the bias of the exponent
  float x;
  memcpy(&x, &magnitude, 4);
  if (magnitude < 31u << 23) x *= 0x1p112f;
  else x = magnitude > 31u << 23 ? __builtin_nanf("") : __builtin_inff();
  return bits & 0x8000 ? -x : x;
}
inline unsigned float_to_half(float x) {
  const _Float16 h = _Float16(x);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}
inline float bfloat_to_float(unsigned bits) {
  const uint32_t u = bits << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline unsigned float_to_bfloat(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}

}  // namespace shim
