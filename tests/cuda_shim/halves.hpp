// halves: 16-bit numbers and their bits.
#pragma once
#include <cstdint>
#include <cstring>

namespace shim {

inline float half_to_float(unsigned bits) {
  const uint16_t h = uint16_t(bits);
  _Float16 x;
  memcpy(&x, &h, 2);
  return float(x);
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
