// portable: the few primitives that CUDA and host C++ spell differently.
//
// Every other header here is written once against these names and is legal under NVRTC, nvcc and a C++17
// host compiler. No header of the CUDA toolkit or of the C library is needed under NVRTC.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__) || defined(__CUSHIM__)
#define GPUXBAR_FN __device__ __forceinline__
#define GPUXBAR_METHOD GPUXBAR_FN
#else
#define GPUXBAR_FN static inline __attribute__((always_inline))
#define GPUXBAR_METHOD inline __attribute__((always_inline))
#endif

namespace gpuxbar {

using u8 = unsigned char;
using i8 = signed char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i16 = short;
using i32 = int;
using i64 = long long;

#if defined(__CUDA_ARCH__)

GPUXBAR_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GPUXBAR_FN float round_even(float x) { return rintf(x); }
GPUXBAR_FN float floor(float x) { return floorf(x); }
GPUXBAR_FN float min(float a, float b) { return fminf(a, b); }
GPUXBAR_FN float max(float a, float b) { return fmaxf(a, b); }
GPUXBAR_FN float abs(float x) { return fabsf(x); }
GPUXBAR_FN u32 float_bits(float x) { return __float_as_uint(x); }
GPUXBAR_FN float bits_float(u32 x) { return __uint_as_float(x); }
GPUXBAR_FN u64 double_bits(double x) { return (u64)__double_as_longlong(x); }
GPUXBAR_FN float exp(float x) { return expf(x); }
GPUXBAR_FN u16 half_bits(float x) {  // nearest fp16, half to even
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
GPUXBAR_FN float half_value(u16 h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}
// Whether x is known to be 0. A compiler itself keeps products with 0 and their sums; the host's loops do, too.
GPUXBAR_FN bool absent(float x) { return x == 0.0f; }
// Of a word's halves, without taking them apart.
GPUXBAR_FN void half_values(u32 word, float& low, float& high) {
  u16 a, b;
  asm("mov.b32 {%0, %1}, %2;" : "=h"(a), "=h"(b) : "r"(word));
  low = half_value(a), high = half_value(b);
}
// Special-function unit: absolute error about 2^-22 of log2, relative 2^-22 of the root. Arguments below 1.2e-38 count
// as 0: keeping them would cost four more instructions a call. The root is that of |x|, for logarithms of nearly 1 may have
// the wrong sign; it costs nothing.
GPUXBAR_FN float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fabsf(x)));
  return y;
}
GPUXBAR_FN float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// a + b, at least 0 and at most 1; 0 for NaN.
GPUXBAR_FN float add_saturated(float a, float b) {
  float y;
  asm("add.rn.sat.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
#if __CUDA_ARCH__ >= 900
// The lesser of both, at least 0.
GPUXBAR_FN i32 least_positive(i32 a, i32 b) {
  i32 y;
  asm("min.relu.s32 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
#endif
// a / b to 2^-22, where an exact division is ten instructions and a branch; b from 1.2e-38 to 8e37.
GPUXBAR_FN float divide_fast(float a, float b) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  return a * y;
}

#else

GPUXBAR_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GPUXBAR_FN float round_even(float x) { return __builtin_rintf(x); }
GPUXBAR_FN float floor(float x) { return __builtin_floorf(x); }
GPUXBAR_FN float abs(float x) { return __builtin_fabsf(x); }
GPUXBAR_FN u32 float_bits(float x) {
  u32 u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
GPUXBAR_FN float bits_float(u32 u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}
// Against a constant, floats are in the order of their bits as integers (signed, or unsigned and backwards where it is
// negative), for which there is one instruction: a comparison of floats and a choice are two or more.
GPUXBAR_FN float min(float a, float b) {
  const u32 u = float_bits(a), v = float_bits(b), back = u > v ? u : v;
  const i32 i = (i32)u, j = (i32)v, least = i < j ? i : j;
  if (__builtin_constant_p(b)) return bits_float(b < 0.0f ? back : (u32)least);
  return a < b ? a : b;
}
GPUXBAR_FN float max(float a, float b) {
  const u32 u = float_bits(a), v = float_bits(b), back = u < v ? u : v;
  const i32 i = (i32)u, j = (i32)v, most = i > j ? i : j;
  if (__builtin_constant_p(b)) return bits_float(b < 0.0f ? back : (u32)most);
  return a > b ? a : b;
}
GPUXBAR_FN u64 double_bits(double x) {
  u64 u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
// 2^n 2^f with |f| <= 1/2 by a polynomial; branch-free, so that loops vectorise; relative error below 2e-7 for
// |x| <= 87.
GPUXBAR_FN float exp(float x) {
  const float n = __builtin_rintf(x * 1.442695041f);
  const float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, x));
  float p = __builtin_fmaf(r, 1.9841270e-4f, 1.3888889e-3f);
  p = __builtin_fmaf(p, r, 8.3333333e-3f);
  p = __builtin_fmaf(p, r, 4.1666667e-2f);
  p = __builtin_fmaf(p, r, 0.16666667f);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  return p * bits_float((u32)((i32)n + 127) << 23);
}
GPUXBAR_FN u16 half_bits(float x) {  // in integers: not every C++ compiler knows fp16
  const u32 bits = float_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return (u16)(sign | 0x7E00u);   // NaN
  if (size >= 0x477FF000u) return (u16)(sign | 0x7C00u);  // 65520 and above
  // below 2^-14 in steps of 2^-24, to which adding 1/2 rounds
  if (size < 0x38800000u) return (u16)(sign | (float_bits(bits_float(size) + 0.5f) - 0x3F000000u));
  return (u16)(sign | (size - 0x37FFF001u + (size >> 13 & 1u)) >> 13);
}
// A product by 2^112 moves the exponent; branch-free, so that loops vectorise.
GPUXBAR_FN float half_value(u16 h) {
  const u32 size = (u32)(h & 0x7FFFu) << 13;
  const float finite = bits_float(size) * 5.192296858534828e33f;
  const u32 bits = size >= 0x0F800000u ? size | 0x7F800000u : float_bits(finite);
  return bits_float(bits | (u32)(h & 0x8000u) << 16);
}
GPUXBAR_FN void half_values(u32 word, float& low, float& high) {
  low = half_value((u16)word), high = half_value((u16)(word >> 16));
}
GPUXBAR_FN bool absent(float) { return false; }
GPUXBAR_FN float add_saturated(float a, float b) {
  const float sum = a + b;
  return sum > 0.0f ? sum < 1.0f ? sum : 1.0f : 0.0f;
}
GPUXBAR_FN i32 least_positive(i32 a, i32 b) {
  const i32 least = a < b ? a : b;
  return least > 0 ? least : 0;
}
GPUXBAR_FN float sqrt_fast(float x) { return __builtin_sqrtf(x); }
GPUXBAR_FN float divide_fast(float a, float b) { return a / b; }
// log2 of a positive normal number: exponent from the bits, mantissa in [sqrt(1/2), sqrt(2)) by the
// atanh series 2/ln2 (s + s^3/3 + s^5/5 + s^7/7 + s^9/9), s = (m - 1)/(m + 1). Branch-free, so that a host
// compiler vectorises the loop around it; relative error below 3e-7.
GPUXBAR_FN float log2_fast(float x) {
  const u32 bits = float_bits(x);
  const u32 shifted = bits - 0x3F3504F3u;  // sqrt(1/2)
  const i32 exponent = (i32)shifted >> 23;
  const float m = bits_float(bits - ((u32)exponent << 23));
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  float p = fma(s2, 0.32059890f, 0.41219858f);
  p = fma(p, s2, 0.57707802f);
  p = fma(p, s2, 0.96179669f);
  p = fma(p, s2, 2.88539008f);
  return fma(s, p, (float)exponent);
}

#endif

// The nearest number of 11 significant bits (TF32), ties away from 0; NaN and infinity stay.
GPUXBAR_FN float tf32_value(float x) {
  const u32 bits = float_bits(x);
  return (bits & 0x7F800000u) == 0x7F800000u ? x : bits_float((bits + 0x1000u) & 0xFFFFE000u);
}

}  // namespace gpuxbar
