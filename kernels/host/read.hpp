// read: what a read of tiles is told, and what drives its lines.
#pragma once
#include "gpuxbar/converter.cuh"
#include "gpuxbar/inl.cuh"
#include "images.hpp"

namespace gpuxbar {

// Mirrored field by field in gpuxbar/ops/tile_mvm.py.
struct TileMvm {
  const void* v;             // driven values, int16 codes or float32
  const float* g;            // [planes, groups * inputs, cols] S
  const float* noise_var;    // like g, or null: A^2/V^2
  const float* slice_scale;  // [planes]
  const float* adc_lsb;      // [1] or [groups * sense] A
  const float* adc_gain;     // [planes, tiles, groups * sense] or null
  const float* adc_offset;   // [planes, tiles, groups * sense] or null, A
  const float* adc_inl;      // [planes, tiles, groups * sense] or null, steps
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

  // Largest and smallest ADC code; 0 without an ADC.
  float code_max() const { return adc_bits ? (float)((1 << (adc_signed ? adc_bits - 1 : adc_bits)) - 1) : 0.0f; }
  float code_min() const { return adc_signed ? -code_max() : 0.0f; }

  // Lines are driven in units of v_lsb, so a partial sum of 1 is so many amperes.
  float amperes() const { return (float)v_lsb; }
  float per_ampere() const { return 1.0f / amperes(); }
  float sigma() const { return read_noise[0] * per_ampere(); }  // of the noise, in partial sums
};

// Lines a group drives and senses, tiles along the driven ones, passes of the DAC.
struct Shape {
  i64 drive, sense, tiles, passes;
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

// What the driven array drives in a pass, in units of v_lsb.
struct Driver {
  const TileMvm& p;
  Pass pass;
  u32 mask;
  Driver(const TileMvm& p, Pass pass) : p(p), pass(pass), mask(p.stream_bits ? (1u << p.stream_bits) - 1 : 0xFFFFu) {}
  // A hint that values about src are driven soon.
  void ahead(i64 src) const {
    const char* at = (const char*)p.v + src * (p.is_code ? 2 : 4);
    __builtin_prefetch(at);
    __builtin_prefetch(at + 64);
  }
  // `count` values from src on
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

}  // namespace gpuxbar
