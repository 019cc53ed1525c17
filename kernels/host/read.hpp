// read: what a read of tiles is told, and what drives its lines.
#pragma once
#include <cmath>

#include "gpuxbar/converter.cuh"
#include "gpuxbar/drivers.cuh"
#include "images.hpp"

namespace gpuxbar {

// Mirrored field by field in gpuxbar/ops/tile_read.py.
struct TileMvm {
  const void* v;             // driven values, int16 codes or float32
  const float* g;            // [planes, groups * inputs, cols] S
  const float* noise_var;    // like g, or null: A^2/V^2
  const float* slice_scale;  // [planes]
  const float* adc_lsb;      // [1] or [groups * sense] A
  const float* adc_gain;     // [planes, tiles, groups * sense] or null
  const float* adc_offset;   // [planes, tiles, groups * sense] or null, A
  const float* adc_inl;      // [planes, tiles, groups * sense] or null, steps
  const float* dac_error;    // [3, groups * drive] or null: gain, offset in V, non-linearity in steps
  const float* read_noise;   // [1] A
  const i64* step;           // [1]
  const float* row_scale;    // [batch / rows_per_scale] or null
  const float* col_scale;    // [groups * sense] or null
  const float* bias;         // [groups * sense] or null
  float* y;
  float* gate;       // like y, or null
  const Conv* conv;  // or null
  i64 batch, groups, inputs, cols, planes, tile, rows_per_scale, row_offset;
  i64 is_code, transposed, stream_bits, streams, phases, adc_bits, adc_signed, adc_per_column, fast;
  u64 seed;
  double v_lsb;
  double v_read, v_sinh;  // V, of the largest digit, and over which devices bend; v_sinh 0: they are ohmic

  // Largest and smallest ADC code; 0 without an ADC.
  float code_max() const { return adc_bits ? (float)((1 << (adc_signed ? adc_bits - 1 : adc_bits)) - 1) : 0.0f; }
  float code_min() const { return adc_signed ? -code_max() : 0.0f; }

  // Lines are driven in units of v_lsb, so a partial sum of 1 is so many amperes.
  float amperes() const { return (float)v_lsb; }
  float per_ampere() const { return 1.0f / amperes(); }
  float sigma() const { return read_noise[0] * per_ampere(); }  // of the noise, in partial sums

  // Whether what drives the lines is not the digits themselves.
  bool bends() const { return dac_error || v_sinh > 0.0; }
};

// Lines a group drives and senses, tiles along the driven ones, and products of a plane, each of what some passes of the DAC drive
// together.
struct Shape {
  i64 drive, sense, tiles, products, together;
  explicit Shape(const TileMvm& p)
      : drive(p.transposed ? p.cols : p.inputs),
        sense(p.transposed ? p.inputs : p.cols),
        tiles((drive + p.tile - 1) / p.tile) {
    // without an ADC, currents are linear in what is driven, so that sums over all passes drive the array once, unless noise
    // depends on what each drives
    const i64 passes = p.streams * p.phases;
    together = p.adc_bits || p.noise_var ? 1 : passes;
    products = passes / together;
  }
};

// Converters of COUNT columns, of which those from `begin` to `end` - 1 are real.
template <int COUNT>
struct Converters {
  alignas(64) float lsb[COUNT], factor[COUNT];
  Converters(const TileMvm& p, i64 column, i64 begin, i64 end) {
    const float one = p.adc_bits ? p.adc_lsb[0] : 1.0f;
    std::fill_n(lsb, COUNT, one);
    std::fill_n(factor, COUNT, steps_of_one(p.amperes(), one));
    if (!p.adc_bits || !p.adc_per_column) return;
    for (i64 j = begin; j < end; ++j) {
      lsb[j] = p.adc_lsb[column + j];
      factor[j] = steps_of_one(p.amperes(), lsb[j]);
    }
  }
};

// One pass of the DAC: which bits of a code are driven, and their digital weight.
struct Pass {
  int shift, phase;
  float weight;
};

inline Pass pass_of(const TileMvm& p, i64 index) {
  const int stream = (int)(index % p.streams), shift = (int)(stream * p.stream_bits);
  const float weight = (float)(1ull << shift);
  if (p.phases == 1) return Pass{shift, 0, weight};
  return index < p.streams ? Pass{shift, 1, weight} : Pass{shift, -1, -weight};
}

// Digital weight of a pass within its product, and of that within a plane.
inline float weight_within(const TileMvm& p, const Shape& s, i64 pass) {
  return s.together > 1 ? pass_of(p, pass).weight : 1.0f;
}
inline float weight_of(const TileMvm& p, const Shape& s, i64 product) {
  return s.together > 1 ? 1.0f : pass_of(p, product).weight;
}

// The digits of a pass, in units of v_lsb: of codes, or the values themselves.
struct Digits {
  const TileMvm& p;
  Pass pass;
  u32 mask;
  Digits(const TileMvm& p, Pass pass) : p(p), pass(pass), mask(p.stream_bits ? (1u << p.stream_bits) - 1 : 0xFFFFu) {}
  // A hint that those of values about src are fetched soon.
  void ahead(i64 src) const {
    const char* at = (const char*)p.v + src * (p.is_code ? 2 : 4);
    __builtin_prefetch(at);
    __builtin_prefetch(at + 64);
  }
  // those of `count` values from src on
  void operator()(float* dst, i64 src, i64 count) const {
    if (!p.is_code) {
      const float* x = (const float*)p.v + src;
      for (i64 i = 0; i < count; ++i) dst[i] = x[i];
    } else if (p.stream_bits == 0) {
      const i16* x = (const i16*)p.v + src;
      for (i64 i = 0; i < count; ++i) dst[i] = (float)x[i];
    } else {
      const i16* x = (const i16*)p.v + src;
      for (i64 i = 0; i < count; ++i) dst[i] = stream_digit(x[i], pass.shift, mask, pass.phase);
    }
  }
};

// What devices see of digits that drive their lines, in units of v_lsb.
struct Drivers {
  const float* error;  // [3][lines] or null
  const i64 lines;
  const float digit_max, per_volt;
  const bool ohmic;
  const Conduction device;
  Drivers(const TileMvm& p, i64 lines)
      : error(p.dac_error),
        lines(lines),
        digit_max((float)(p.v_read / p.v_lsb)),
        per_volt((float)(1.0 / p.v_lsb)),
        ohmic(!(p.v_sinh > 0.0)),
        device(ohmic ? Conduction{0.0f, 0.0f}
                     : Conduction{(float)(p.v_lsb / p.v_sinh),
                                  (float)(p.v_read / p.v_lsb / std::sinh(p.v_read / p.v_sinh))}) {}
  DacError of(i64 line) const { return DacError{error[line], error[lines + line] * per_volt, error[2 * lines + line]}; }
  // `count` digits of one line
  void of_line(float* digits, i64 count, i64 line) const {
    if (error) {
      const DacError own = of(line);
      const float most = digit_max;
#pragma omp simd
      for (i64 i = 0; i < count; ++i) digits[i] = dac_steps(digits[i], own, most);
    }
    conduct(digits, count);
  }
  // one digit each of `count` lines from `line` on
  void of_lines(float* digits, i64 count, i64 line) const {
    if (error) {  // not by `of`: g++ makes no vectors of what it returns
      const float *gain = error + line, *offset = gain + lines, *inl = offset + lines;
      const float most = digit_max, volt = per_volt;
#pragma omp simd
      for (i64 i = 0; i < count; ++i)
        digits[i] = dac_steps(digits[i], DacError{gain[i], offset[i] * volt, inl[i]}, most);
    }
    conduct(digits, count);
  }
  void conduct(float* steps, i64 count) const {
    if (ohmic) return;
    const Conduction own = device;
    for (i64 done = 0, part; done < count; done += part, steps += part) {
      part = std::min<i64>(64, count - done);
      float most = 0.0f;
#pragma omp simd reduction(max : most)
      for (i64 i = 0; i < part; ++i) most = std::max(most, gpuxbar::abs(steps[i]));
      if (own.bend * most < 1.0f) {  // as of low voltages and devices that are nearly ohmic: the series is enough
#pragma omp simd
        for (i64 i = 0; i < part; ++i) steps[i] = own.scale * sinh_near(own.bend * steps[i]);
      } else {
#pragma omp simd
        for (i64 i = 0; i < part; ++i) steps[i] = conducted(steps[i], own);
      }
    }
  }
};

// What lines of patches see of digits where no DAC errs: they are alike, so that devices bend what patches share.
struct AlikeLines : AsTheyAre {
  const Drivers& drivers;
  explicit AlikeLines(const Drivers& drivers) : drivers(drivers) {}
  void touch(float* digits, i64 count) const { drivers.conduct(digits, count); }
};

// What the DACs of the lines of patches, from `first` on, make of digits, each with its errors. The bow of a digit is worked out
// once for all lines that share it, and lies `apart` behind it.
struct ErringLines {
  const Drivers& drivers;
  const i64 first, apart;
  void touch(float* digits, i64 count) const {
    float* bows = digits + apart;
    const float most = drivers.digit_max;
#pragma omp simd
    for (i64 i = 0; i < count; ++i) bows[i] = bow(digits[i], most);
  }
  struct Line {
    const DacError own;
    const i64 apart;
    template <int STRIDE, int N>
    void put(const float* digits, float* to) const {
      const float* bows = digits + apart;
      float digit[N], bow[N];
      if constexpr (STRIDE > 1) {  // next to each other, as vectors are made of
        using V = typename Floats<N>::Vec;
        *(V*)digit = every<STRIDE, N>(digits), *(V*)bow = every<STRIDE, N>(bows);
        digits = digit, bows = bow;
      }
#pragma omp simd
      for (int i = 0; i < N; ++i) to[i] = dac_steps(digits[i], bows[i], own);
    }
  };
  Line line(i64 k) const { return {drivers.of(first + k), apart}; }
};

}  // namespace gpuxbar
