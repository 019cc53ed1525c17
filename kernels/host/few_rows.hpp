// few_rows: a read of few driven vectors, whose time is that of looking at every conductance once. Vectors run along the
// bitlines, so that a read forwards finds conductances where they lie, or a copy of them where more vectors than DIRECT look
// at it; the same sums in the same order as by blocks.
#pragma once
#include <cstring>
#include <memory>

#include "draw.hpp"
#include "read.hpp"
#include "threads.hpp"
#include "wide.hpp"

namespace gpuxbar {

constexpr i64 FEW = 48;           // the most driven vectors that are read like this
constexpr int STRIP = 8 * LANES;  // bitlines of a strip: a vector of the widest counters
#if defined(__AVX512F__)
constexpr int ACROSS = 4;  // vectors of the register tile
#else
constexpr int ACROSS = 2;
#endif
constexpr int DOWN = 6;                           // rows of it
constexpr int PAIRED = 4;                         // vectors of one of two rows: fewer sums would wait for each other
constexpr int PITCH = STRIP + 16;                 // of packed lines, which so meet everywhere in the first cache
constexpr i64 DIRECT = LANES == 16 ? FEW : DOWN;  // the most rows that meet conductances where they lie
static_assert(STRIP % (ACROSS * LANES) == 0 && STRIP % (PAIRED * LANES) == 0 && STRIP % 8 == 0);

// Bitlines of a group, from a multiple of STRIP in the numbering of all outputs; `begin` .. `end` - 1 are real.
struct Strip {
  i64 group, column, begin, end, local;  // `local`: index within the group of the first column, may be negative
  Strip(const Shape& s, i64 group, i64 index)
      : group(group),
        column((group * s.sense / STRIP + index) * STRIP),
        begin(std::max<i64>(0, group * s.sense - column)),
        end(std::min<i64>(STRIP, (group + 1) * s.sense - column)),
        local(column - group * s.sense) {}
};

// What one thread holds of a strip, [batch][STRIP] each, and packed conductances of a tile, [length][PITCH].
struct StripWork {
  Aligned memory;
  float *psum, *variance, *sum, *gate, *packed;
  std::unique_ptr<i32[]> codes;
  WideKeys keys;
  StripWork(i64 batch, i64 length, u64 seed)
      : memory(4 * batch * STRIP + length * PITCH),
        psum(memory.get()),
        variance(psum + batch * STRIP),
        sum(variance + batch * STRIP),
        gate(sum + batch * STRIP),
        packed(gate + batch * STRIP),
        codes(new i32[batch * STRIP]),
        keys(seed) {}
};

// Rows from i on, ROWS at a time, in register tiles of WIDTH vectors; the first row that is left.
template <int ROWS, int WIDTH>
inline i64 multiply_rows(const TileMvm& p, const Strip& strip, i64 length, const float* a, const float* b, i64 line,
                         i64 i, float* c) {
  constexpr i64 COLUMNS = WIDTH * LANES;
  const i64 end = p.batch - (p.batch - i) % ROWS;
  for (i64 j = strip.begin / COLUMNS * COLUMNS; j < strip.end; j += COLUMNS)
    for (i64 r = i; r < end; r += ROWS)
      register_tile<LANES, ROWS, WIDTH>(length, a + r, p.batch, b + j, line, nullptr, 0, 1.0f, c + r * STRIP + j,
                                        STRIP);
  return end;
}

// c[i][j] = sum_k a[k][i] m[k][j] of a strip over `length` lines from k0 of a plane of `m`.
inline void multiply_strip(const TileMvm& p, const Strip& strip, const float* m, i64 plane, i64 k0, i64 length,
                           const float* a, float* packed, float* c) {
  const float* base = m + (plane * p.groups + strip.group) * p.inputs * p.cols;
  const i64 n = strip.end - strip.begin, from = strip.local + strip.begin;
  const bool direct = !p.transposed && n == STRIP && p.batch <= DIRECT;
  const float* b = direct ? base + k0 * p.cols + from : packed;
  const i64 line = direct ? p.cols : PITCH;
  if (n < STRIP) std::fill_n(packed, length * PITCH, 0.0f);
  if (p.transposed)
    transpose(base + from * p.cols + k0, p.cols, n, length, packed + strip.begin, PITCH);
  else if (!direct)
    for (i64 k = 0; k < length; ++k) copy(packed + k * PITCH + strip.begin, base + (k0 + k) * p.cols + from, n);
  i64 i = multiply_rows<DOWN, ACROSS>(p, strip, length, a, b, line, 0, c);
  i = multiply_rows<2, PAIRED>(p, strip, length, a, b, line, i, c);
  multiply_rows<1, STRIP / LANES>(p, strip, length, a, b, line, i, c);
}

// to[4 j + q] = z[q][j] or to[8 j + q] = z[q][j].
inline void by_column(const float (&z)[4][LANES], float* to) { interleave(z, to); }
inline void by_column(const float (&z)[8][LANES], float* to) {
  alignas(64) float halves[2][4][LANES], half[2][4 * LANES];
  for (int q = 0; q < 8; ++q) std::copy(z[q], z[q] + LANES, halves[q % 2][q / 2]);
  for (int odd = 0; odd < 2; ++odd) interleave(halves[odd], half[odd]);
  for (int j = 0; j < 4 * LANES; j += LANES) {
    Vec both[2];
    zip(*(const Vec*)(half[0] + j), *(const Vec*)(half[1] + j), both);
    *(Vec*)(to + 2 * j) = both[0];
    *(Vec*)(to + 2 * j + LANES) = both[1];
  }
}

// c[j] += deviation[j] z[j], or sigma z where `deviation` is null, of one row's strip from `column` on.
template <bool FAST>
inline void add_strip_noise(u32 third, const TileMvm& p, const WideKeys& keys, u32 column, u32 row, i64 begin, i64 end,
                            float sigma, const float* deviation, float* c) {
  constexpr int EACH = FAST ? 8 : 4, PAIRS = EACH / 2,
                WORTH = EACH * LANES;  // columns of a counter, pairs, of a vector
  const Wide row_ = row + Wide{}, third_ = third + Wide{}, step = (u64)(u32)*p.step + Wide{};
  alignas(64) u32 words[4][LANES];
  alignas(64) float z[EACH][LANES];
  for (i64 j = begin / WORTH * WORTH; j < end; j += WORTH) {
    const Wide counter = even_lanes() + (u64)((column + (u32)j) / EACH);
    philox_lanes<FAST ? 7 : 10>(WideCounter{counter, row_, third_, step}, WideCounter{counter + 1, row_, third_, step},
                                keys, words[0], words[1], words[2], words[3]);
    for (int q = 0; q < PAIRS; ++q) {
#pragma omp simd
      for (int i = 0; i < LANES; ++i) {
        const Pair pair = pair_of<FAST>(words, q, i);
        z[2 * q][i] = pair.a;
        z[2 * q + 1][i] = pair.b;
      }
    }
    alignas(64) float along[WORTH];
    by_column(z, along);
#pragma omp simd
    for (int i = 0; i < WORTH; ++i) c[j + i] = fma(deviation ? deviation[j + i] : sigma, along[i], c[j + i]);
  }
}

// Adds read noise, times `weight`, to the partial sums over `length` lines from k0, whose squared drives are a2.
inline void strip_noise(const TileMvm& p, const Strip& strip, u32 slot, float weight, i64 plane, i64 k0, i64 length,
                        const float* a2, StripWork& w) {
  const float sigma = p.sigma();
  if (!(sigma > 0.0f) && !p.noise_var) return;
  if (p.noise_var) {
    multiply_strip(p, strip, p.noise_var, plane, k0, length, a2, w.packed, w.variance);
    for (i64 r = 0; r < p.batch; ++r) {
      float* variance = w.variance + r * STRIP;
      for (i64 j = strip.begin; j < strip.end; ++j) variance[j] = sqrt_fast(fma(sigma, sigma, max(variance[j], 0.0f)));
    }
  }
  const u32 third = (p.transposed ? READ_TRANSPOSED : READ) << 24 | slot;
  for (i64 r = 0; r < p.batch; ++r) {
    const float* deviation = p.noise_var ? w.variance + r * STRIP : nullptr;
    (p.fast ? add_strip_noise<true> : add_strip_noise<false>)(third, p, w.keys, (u32)strip.column,
                                                              (u32)(p.row_offset + r), strip.begin, strip.end,
                                                              weight * sigma, deviation, w.psum + r * STRIP);
  }
}

// Adds all tiles of one product and plane to the strip's sums; `a`, `a2`: what drives the product, and its squares, [drive][batch].
inline void convert_strip(const TileMvm& p, const Shape& s, const Strip& strip, const float* a, const float* a2,
                          i64 plane, i64 product, float weight, StripWork& w) {
  const float code_max = p.code_max(), code_min = p.code_min(), share = gpuxbar::abs(weight);
  const float per_ampere = p.per_ampere();
  const Converters<STRIP> adc(p, strip.column, strip.begin, strip.end);
  const float *lsb = adc.lsb, *factor = adc.factor;
  alignas(64) float gain[STRIP], offset[STRIP];
  if (p.adc_bits) std::memset(w.codes.get(), 0, sizeof(i32) * p.batch * STRIP);
  for (i64 t = 0; t < s.tiles; ++t) {
    const i64 k0 = t * p.tile, length = std::min(p.tile, s.drive - k0);
    multiply_strip(p, strip, p.g, plane, k0, length, a + k0 * p.batch, w.packed, w.psum);
    for (i64 pass = product * s.together; pass < (product + 1) * s.together; ++pass)
      strip_noise(p, strip, (u32)((pass * p.planes + plane) * s.tiles + t), weight_within(p, s, pass), plane, k0,
                  length, a2 + k0 * p.batch, w);
    const i64 converters = (plane * s.tiles + t) * p.groups * s.sense + strip.column;
    for (i64 j = strip.begin; j < strip.end; ++j) {
      gain[j] = factor[j] * (p.adc_gain ? p.adc_gain[converters + j] : 1.0f);
      offset[j] = p.adc_offset ? p.adc_offset[converters + j] * per_ampere * factor[j] : 0.0f;
    }
    if (p.adc_bits && p.adc_inl) {  // beforehand, so that what follows is every converter's
      for (float* psum = w.psum; psum < w.psum + p.batch * STRIP; psum += STRIP)
        for (i64 j = strip.begin; j < strip.end; ++j)
          psum[j] = bent(fma(psum[j], gain[j], offset[j]), p.adc_inl[converters + j], code_max);
      std::fill_n(gain, STRIP, 1.0f), std::fill_n(offset, STRIP, 0.0f);
    }
    for (i64 r = 0; r < p.batch; ++r) {
      const float* psum = w.psum + r * STRIP;
      float *sum = w.sum + r * STRIP, *gate = w.gate + r * STRIP;
      i32* codes = w.codes.get() + r * STRIP;
      if (p.adc_bits)
        for (i64 j = strip.begin; j < strip.end; ++j) {
          const float steps = fma(psum[j], gain[j], offset[j]);
          codes[j] += (i32)adc_code(steps, code_min, code_max);
          if (p.gate) gate[j] += in_range(steps, code_min, code_max) ? share : 0.0f;
        }
      else
        for (i64 j = strip.begin; j < strip.end; ++j) {
          sum[j] = fma(weight * factor[j], psum[j], sum[j]);
          if (p.gate) gate[j] += share;
        }
    }
  }
  if (!p.adc_bits) return;
  for (i64 r = 0; r < p.batch; ++r)
    for (i64 j = r * STRIP + strip.begin; j < r * STRIP + strip.end; ++j)
      w.sum[j] = fma(weight * lsb[j - r * STRIP], (float)w.codes[j], w.sum[j]);
}

// Adds a strip's sums of a plane to y.
inline void store_strip(const TileMvm& p, const Shape& s, const Strip& strip, bool first, float share, StripWork& w) {
  for (i64 r = 0; r < p.batch; ++r) {
    const float row_scale = p.row_scale ? p.row_scale[r / p.rows_per_scale] : 1.0f;
    float *sum = w.sum + r * STRIP, *gate = w.gate + r * STRIP;
    const i64 at = r * p.groups * s.sense + strip.column;
    for (i64 j = strip.begin; j < strip.end; ++j)
      sum[j] *= row_scale * (p.col_scale ? p.col_scale[strip.column + j] : 1.0f);
    if (first && p.bias)
      for (i64 j = strip.begin; j < strip.end; ++j) sum[j] += p.bias[strip.column + j];
    for (i64 j = strip.begin; j < strip.end; ++j) p.y[at + j] = (first ? 0.0f : p.y[at + j]) + sum[j];
    if (!p.gate) continue;
    for (i64 j = strip.begin; j < strip.end; ++j) gate[j] *= share;
    for (i64 j = strip.begin; j < strip.end; ++j) p.gate[at + j] = (first ? 0.0f : p.gate[at + j]) + gate[j];
  }
}

// All of a read of at most FEW vectors, no convolution; `share` of a gate see gate_part.
inline void read_few(const TileMvm& p, const Shape& s, float share) {
  const i64 lines = s.drive * p.batch, group_lines = s.products * lines;  // values: [groups][products][drive][batch]
  std::unique_ptr<float[]> values(new float[p.groups * group_lines * (p.noise_var ? 2 : 1) + s.drive]);
  float *const a = values.get(), *const a2 = p.noise_var ? a + p.groups * group_lines : a;
  float* const line = a + p.groups * group_lines * (p.noise_var ? 2 : 1);
  const Drivers drivers(p, p.groups * s.drive);
  for (i64 group = 0; group < p.groups; ++group)
    for (i64 pass = 0; pass < s.products * s.together; ++pass) {
      const Digits digits(p, pass_of(p, pass));
      const float weight = weight_within(p, s, pass);
      const bool first = pass % s.together == 0;
      float* to = a + group * group_lines + pass / s.together * lines;
      for (i64 r = 0; r < p.batch; ++r) {
        digits(line, (r * p.groups + group) * s.drive, s.drive);
        if (p.bends()) drivers.of_lines(line, s.drive, group * s.drive);
        for (i64 k = 0; k < s.drive; ++k)
          to[k * p.batch + r] = fma(weight, line[k], first ? 0.0f : to[k * p.batch + r]);
      }
    }
  if (p.noise_var)
    for (i64 e = 0; e < p.groups * group_lines; ++e) a2[e] = a[e] * a[e];
  const i64 most = (s.sense + STRIP - 1) / STRIP + 1;
  const i64 products = p.batch * p.groups * s.drive * s.sense * p.planes * s.products;
#pragma omp parallel if (products >= PRODUCTS_WORTH_A_THREAD)
  {
    StripWork work(p.batch, std::min(p.tile, s.drive), p.seed);
#pragma omp for schedule(dynamic, 1)
    for (i64 task = 0; task < p.groups * most; ++task) {
      const Strip strip(s, task / most, task % most);
      if (strip.begin >= strip.end) continue;
      for (i64 plane = 0; plane < p.planes; ++plane) {
        std::memset(work.sum, 0, sizeof(float) * p.batch * STRIP);
        if (p.gate) std::memset(work.gate, 0, sizeof(float) * p.batch * STRIP);
        for (i64 product = 0; product < s.products; ++product) {
          const float weight = weight_of(p, s, product) * p.slice_scale[plane];
          const i64 at = strip.group * group_lines + product * lines;
          convert_strip(p, s, strip, a + at, a2 + at, plane, product, weight, work);
        }
        store_strip(p, s, strip, plane == 0, share, work);
      }
    }
  }
}

}  // namespace gpuxbar
