// normal: standard normal numbers from Philox words by Box-Muller.
//
//   exact  one counter -> 4 normals, for columns 4 group .. 4 group + 3; Philox-10, 32-bit radius and phase
//   fast   one counter -> 8 normals, for columns 8 group .. 8 group + 7; Philox-7, 16-bit radius and phase
//
// Source: Box and Muller, Ann. Math. Stat. 29 (1958); Philox: philox.cuh. |z| <= 6.76 (exact), 4.86 (fast).
#pragma once
#include "gpuxbar/philox.cuh"

namespace gpuxbar {

struct Pair {
  float a, b;
};

#if defined(__CUDA_ARCH__)
// Special-function unit: absolute errors 2^-20.5 for less than a turn (PTX ISA).
GPUXBAR_FN Pair cos_sin_fast(float angle) {
  Pair p;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(p.a) : "f"(angle));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(p.b) : "f"(angle));
  return p;
}
#endif

// cos and sin of 2 pi phase / 2^32. The host goes by half the angle, where no quadrants need be told apart: with
// S = sqrt(2) sin and C = sqrt(2) cos of it, 1 - S^2 and S C; branch-free, vectorises, absolute error below 3e-7.
GPUXBAR_FN Pair turn(u32 phase) {
#if defined(__CUDA_ARCH__)
  return cos_sin_fast((float)(i32)phase * 1.4629180792671596e-9f);  // in [-pi, pi)
#else
  const float t = (float)(i32)phase * 4.6566128730773926e-10f;  // half turns, in [-1, 1]
  const float t2 = t * t;
  float s = fma(t2, 2.14505837e-4f, -6.61025693e-3f);
  s = fma(s, t2, 0.112698575f);
  s = fma(s, t2, -0.913530712f);
  s = fma(s, t2, 2.22144146f) * t;
  float c = fma(t2, 1.21366481e-3f, -2.94306717e-2f);
  c = fma(c, t2, 0.358716323f);
  c = fma(c, t2, -1.74471275f);
  c = fma(c, t2, 1.41421350f);
  return Pair{fma(-s, s, 1.0f), s * c};
#endif
}

// The same of the high half of a word. On a GPU the half becomes 128 + phase / 2^16 without a conversion, and its angle, in
// [0, 2 pi), has the one rounding of a product.
GPUXBAR_FN Pair turn_fast(u32 word) {
#if defined(__CUDA_ARCH__)
  return cos_sin_fast(fma(bits_float(0x43000000u | word >> 16), 6.2831855f, -128.0f * 6.2831855f));
#else
  return turn(word & 0xFFFF0000u);
#endif
}

// Two normals by Box-Muller, but for their deviation: log2 of the radius' uniform, and the direction.
struct Polar {
  float log;
  Pair turn;
};

// The uniform is (radius_word + 1/2) / 2^32: never 0, and at most 1: the largest words are 2^32 as floats, and 1 + 2^-33
// rounds to 1.
GPUXBAR_FN Polar polar(u32 radius_word, u32 phase_word) {
  const float u = fma((float)radius_word, 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  return Polar{log2_fast(u), turn(phase_word)};
}

// From one word: the low half makes the radius, the high half the phase.
GPUXBAR_FN Polar polar_fast(u32 word) {
  const float k = bits_float(0x43000000u | (word & 0xFFFFu));  // 128 + radius / 2^16, without a conversion
  const float u = k - 127.99999237060546875f;                  // (radius + 1/2) / 2^16, exactly
  return Polar{log2_fast(u), turn_fast(word)};
}

// A pair of neighbours of those that share a counter, of which these are the words.
template <bool FAST>
GPUXBAR_FN Polar polar_of(const Counter& words, int pair) {
  const u32 word[4] = {words.x, words.y, words.z, words.w};
  if (FAST) return polar_fast(word[pair]);
  return polar(word[2 * pair & 2], word[2 * pair & 2 | 1]);
}

// Makes normals of a variance: sqrt(-2 variance ln u), the factor of both directions. The product with -2 ln 2, `spread`, is
// for the caller to make once.
constexpr float SPREAD = -1.3862943611198906f;
GPUXBAR_FN float radius(float spread, const Polar& of) { return sqrt_fast(spread * of.log); }

GPUXBAR_FN Pair normals_of(const Polar& of) {
  const float r = radius(SPREAD, of);
  return Pair{r * of.turn.a, r * of.turn.b};
}
GPUXBAR_FN Pair normal_pair(u32 radius_word, u32 phase_word) { return normals_of(polar(radius_word, phase_word)); }
GPUXBAR_FN Pair normal_pair_fast(u32 word) { return normals_of(polar_fast(word)); }

// Uniform in (0, 1) from one word.
GPUXBAR_FN float uniform(u32 word) { return fma((float)(word >> 8), 5.9604644775390625e-8f, 2.98023223876953125e-8f); }

struct Normals4 {
  float z[4];
};
template <class... Key>
GPUXBAR_FN Normals4 normals4(Counter c, const Key&... key) {
  const Counter w = philox<10>(c, key...);
  const Pair p = normal_pair(w.x, w.y), q = normal_pair(w.z, w.w);
  return Normals4{{p.a, p.b, q.a, q.b}};
}

struct Normals8 {
  float z[8];
};
template <class... Key>
GPUXBAR_FN Normals8 normals8_fast(Counter c, const Key&... key) {
  const Counter w = philox<7>(c, key...);
  const Pair p = normal_pair_fast(w.x), q = normal_pair_fast(w.y);
  const Pair r = normal_pair_fast(w.z), s = normal_pair_fast(w.w);
  return Normals8{{p.a, p.b, q.a, q.b, r.a, r.b, s.a, s.b}};
}

}  // namespace gpuxbar
