// wide: vectors of the host kernels, philox.cuh's rounds on a whole vector of counters, transposed tiles.
#pragma once
#include <algorithm>
#include <memory>
#include <utility>

#include "gpuxbar/philox.cuh"

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
#error g++ 11 or later is needed: reads that g++ 9 builds crash
#endif

namespace gpuxbar {

#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats of a vector
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Neighbouring floats at any address; a template argument would lose the alignment.
template <int COUNT>
struct Floats;
template <>
struct Floats<16> {
  typedef float Vec __attribute__((vector_size(64), aligned(4)));
};
template <>
struct Floats<8> {
  typedef float Vec __attribute__((vector_size(32), aligned(4)));
};
template <>
struct Floats<4> {
  typedef float Vec __attribute__((vector_size(16), aligned(4)));
};
template <>
struct Floats<1> {
  typedef float Vec;
};

// `count` floats that begin with a line of a cache, so that no vector of whole ones straddles two.
class Aligned {
 public:
  explicit Aligned(i64 count) : lines(new Line[(count + 15) / 16]) {}
  float* get() const { return (float*)lines.get(); }

 private:
  struct alignas(64) Line {
    float at[16];
  };
  std::unique_ptr<Line[]> lines;
};

typedef u64 Wide __attribute__((vector_size(4 * LANES), may_alias));

// Product of the low halves of 64-bit lanes.
inline Wide multiply_low(Wide a, Wide b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The high halves of 64-bit lanes, in the low ones; the high ones hold anything. Of wide vectors a copy is cheaper than a shift.
inline Wide high_halves(Wide a) {
#if defined(__AVX512F__)
  return (Wide)_mm512_movehdup_ps((__m512)a);
#else
  return a >> 32;
#endif
}

struct WideCounter {
  Wide x, y, z, w;  // words in the low halves; the high halves hold anything
};

// The keys of all rounds in every lane, made once: operands that need neither instructions nor registers.
struct WideKeys {
  Wide low[10], high[10];

  explicit WideKeys(u64 seed) {
    u32 lo = (u32)seed, hi = (u32)(seed >> 32);
    for (int round = 0; round < 10; ++round, lo += 0x9E3779B9u, hi += 0xBB67AE85u)
      low[round] = lo + Wide{}, high[round] = hi + Wide{};
  }
};

constexpr u64 PHILOX_X = 0xD2511F53u, PHILOX_Z = 0xCD9E8D57u;  // factors of philox.cuh's rounds

// philox.cuh's rounds on N times LANES / 2 counters, in turns, since a round waits for the one before. FROM: rounds already gone.
template <int ROUNDS, int FROM = 0, int N>
inline void philox_wide(WideCounter (&c)[N], const WideKeys& keys) {
  const Wide m0 = PHILOX_X + Wide{}, m1 = PHILOX_Z + Wide{};
#pragma GCC unroll 10
  for (int round = FROM; round < ROUNDS; ++round)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Wide p0 = multiply_low(c[n].x, m0), p1 = multiply_low(c[n].z, m1);
      c[n] = WideCounter{high_halves(p1) ^ (c[n].y ^ keys.low[round]), p1,
                         high_halves(p0) ^ (c[n].w ^ keys.high[round]), p0};
    }
}

// The low halves of `even` and of `odd` in turns.
inline Wide join(Wide even, Wide odd) { return (even & 0xFFFFFFFFu) | odd << 32; }

// The words of vectors of counters, of each the even ones and then the odd ones, behind each other at a pointer a word.
template <int ROUNDS, int FROM = 0, int N>
inline void philox_lanes(WideCounter (&c)[N], const WideKeys& keys, u32* x, u32* y, u32* z, u32* w) {
  philox_wide<ROUNDS, FROM>(c, keys);
#pragma GCC unroll 2
  for (int n = 0; n < N; n += 2, x += LANES, y += LANES, z += LANES, w += LANES) {
    *(Wide*)x = join(c[n].x, c[n + 1].x);
    *(Wide*)y = join(c[n].y, c[n + 1].y);
    *(Wide*)z = join(c[n].z, c[n + 1].z);
    *(Wide*)w = join(c[n].w, c[n + 1].w);
  }
}

// The same of one vector.
template <int ROUNDS>
inline void philox_lanes(const WideCounter& even, const WideCounter& odd, const WideKeys& keys, u32* x, u32* y, u32* z,
                         u32* w) {
  WideCounter c[2] = {even, odd};
  philox_lanes<ROUNDS>(c, keys, x, y, z, w);
}

// Keeps what was loaded in its register: g++ loads it anew for every product with it.
template <class V>
inline void keep(V& loaded) {
#if defined(__AVX512F__)
  asm("" : "+v"(loaded));
#elif defined(__AVX2__)
  asm("" : "+x"(loaded));
#endif
}

// c[i][j] = c0[i][j] + sign * sum_k at[k][i] right(k, j) for ROWS x COLS vectors in registers; c0 may be null or c.
template <int STEP, int ROWS, int COLS, class Right>
inline void register_tile(i64 depth, const float* at, i64 lda, const Right& right, const float* c0, i64 ldc0,
                          float sign, float* c, i64 ldc) {
  using V = typename Floats<STEP>::Vec;
  V sum[ROWS][COLS] = {};
  for (i64 k = 0; k < depth; ++k, at += lda) {
    V along[COLS];
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) {
      along[j] = *(const V*)right(k, j);
      if (ROWS > 1 && LANES == 8) keep(along[j]);  // wider products load their other factor on the way
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const V left = at[i] - V{};
#pragma GCC unroll 8
      for (int j = 0; j < COLS; ++j) sum[i][j] += left * along[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) {
      const V start = c0 ? *(const V*)(c0 + i * ldc0 + j * STEP) : V{};
      *(V*)(c + i * ldc + j * STEP) = start + sign * sum[i][j];
    }
}

// The same of right(k, j) = b[k][j].
template <int STEP, int ROWS, int COLS>
inline void register_tile(i64 depth, const float* at, i64 lda, const float* b, i64 ldb, const float* c0, i64 ldc0,
                          float sign, float* c, i64 ldc) {
  const auto right = [=](i64 k, int j) { return b + k * ldb + j * STEP; };
  register_tile<STEP, ROWS, COLS>(depth, at, lda, right, c0, ldc0, sign, c, ldc);
}

// Lane k of the result is lane `from(k)` of `a` and `b` side by side; `from` captures nothing, so that its values are constants.
template <class V, class From, int... K>
inline V pick(V a, V b, From from, std::integer_sequence<int, K...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from(K)...);
#else  // the same from g++ 12 on
  return __builtin_shuffle(a, b, decltype(a < b){from(K)...});
#endif
}
template <class V, class From>
inline V pick(V a, V b, From from) {
  return pick(a, b, from, std::make_integer_sequence<int, sizeof(V) / sizeof a[0]>{});
}

// The steps of a transposition from STRIDE on: each swaps the lanes of rows that lie so far apart. N rows of N floats.
template <int STRIDE, class V, int N>
inline void swap_lanes(V (&rows)[N]) {
  static_assert(sizeof(V) == 4 * N);
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r) {
    if (r & STRIDE) continue;
    const V a = rows[r], b = rows[r + STRIDE];
    rows[r] = pick(a, b, [](int k) { return k & STRIDE ? N + k - STRIDE : k; });
    rows[r + STRIDE] = pick(a, b, [](int k) { return k & STRIDE ? N + k : k + STRIDE; });
  }
  if constexpr (2 * STRIDE < N) swap_lanes<2 * STRIDE>(rows);
}

// to[j][i] = row(i)[j] of a tile of SIDE x SIDE.
template <int SIDE, class Row, class Value>
inline void transpose_tile(const Row& row, Value* to, i64 to_stride) {
  static_assert(sizeof(Value) == sizeof(float));
  typedef float Line __attribute__((vector_size(4 * SIDE)));
  typedef float Anywhere __attribute__((vector_size(4 * SIDE), aligned(4), may_alias));
  Line lines[SIDE];
#pragma GCC unroll 16
  for (int r = 0; r < SIDE; ++r) lines[r] = *(const Anywhere*)row(r);
  swap_lanes<1>(lines);
#pragma GCC unroll 16
  for (int r = 0; r < SIDE; ++r) *(Anywhere*)(to + r * to_stride) = lines[r];
}

// to[j][i] = from[i][j] for rows x columns of floats or words; in tiles of SIDE, and what is left in smaller ones.
template <int SIDE = LANES, class Value>
inline void transpose(const Value* from, i64 from_stride, i64 rows, i64 columns, Value* to, i64 to_stride) {
  for (i64 i = 0; i < rows; i += SIDE)
    for (i64 j = 0; j < columns; j += SIDE) {
      const i64 high = std::min<i64>(SIDE, rows - i), wide = std::min<i64>(SIDE, columns - j);
      const Value* part = from + i * from_stride + j;
      Value* part_to = to + j * to_stride + i;
      if (high == SIDE && wide == SIDE)
        transpose_tile<SIDE>([=](int r) { return part + r * from_stride; }, part_to, to_stride);
      else if constexpr (SIDE > 8)
        transpose<SIDE / 2>(part, from_stride, high, wide, part_to, to_stride);
      else
        for (i64 r = 0; r < high; ++r)
          for (i64 c = 0; c < wide; ++c) part_to[c * to_stride + r] = part[r * from_stride + c];
    }
}

// to = a[0], b[0], a[1], b[1] ..
inline void zip(Vec a, Vec b, Vec (&to)[2]) {
  to[0] = pick(a, b, [](int k) { return k / 2 + (k & 1 ? LANES : 0); });
  to[1] = pick(a, b, [](int k) { return k / 2 + (k & 1 ? LANES : 0) + LANES / 2; });
}

// to[4 j + q] = from[q][j] for COUNT values of each of four rows.
template <int COUNT, class Value>
inline void interleave(const Value (*from)[COUNT], Value* to) {
  static_assert(sizeof(Value) == sizeof(float) && COUNT % LANES == 0);
  for (int j = 0; j < COUNT; j += LANES) {
    const auto row = [&](int q) { return *(const Vec*)(from[q] + j); };
    Vec even[2], odd[2], both[2];
    zip(row(0), row(2), even);
    zip(row(1), row(3), odd);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      zip(even[half], odd[half], both);
      *(Vec*)(to + 4 * j + 2 * half * LANES) = both[0];
      *(Vec*)(to + 4 * j + (2 * half + 1) * LANES) = both[1];
    }
  }
}

// 0, 2, 4 ..
inline Wide even_lanes() {
  Wide steps;
  for (int k = 0; k < LANES / 2; ++k) steps[k] = 2 * k;
  return steps;
}

// The order of a vector's counters for what follows, which picks within four lanes at a time: 0, LANES / 4, 1 ..
inline Wide column_lanes() {
  Wide steps;
  for (int k = 0; k < LANES / 2; ++k) steps[k] = k / 2 + k % 2 * (LANES / 4);
  return steps;
}

// to[4 j ..] = the words of counter j.
inline void store_words(const WideCounter& c, u32* to) {
  const auto evens = [](Vec a, Vec b) {
    return pick(a, b, [](int k) { return k / 4 * 4 + k % 2 * 2 + (k & 2 ? LANES : 0); });
  };
  const auto odds = [](Vec a, Vec b) {
    return pick(a, b, [](int k) { return k / 4 * 4 + k % 2 * 2 + 1 + (k & 2 ? LANES : 0); });
  };
  const Vec xy = evens((Vec)c.x, (Vec)c.y), zw = evens((Vec)c.z, (Vec)c.w);
  *(Vec*)to = evens(xy, zw);
  *(Vec*)(to + LANES) = odds(xy, zw);
}

// to[4 j ..] = a and b that words x and y of counter j make, and then those of z and w; made of `join` x, z and `join` y, w.
inline void store_pairs(Vec a, Vec b, float* to) {
  *(Vec*)to = pick(a, b, [](int k) { return k / 4 * 4 + k % 4 / 2 + (k & 1 ? LANES : 0); });
  *(Vec*)(to + LANES) = pick(a, b, [](int k) { return k / 4 * 4 + k % 4 / 2 + 2 + (k & 1 ? LANES : 0); });
}

}  // namespace gpuxbar
