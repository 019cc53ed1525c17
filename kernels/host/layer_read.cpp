// layer_read on the CPU: what a layer's read takes, in one call: the DAC (dac_quantize or dac_fit), then tile_mvm, with the steps
// and scales that follow from what the layer holds. layer_gradient: what a backward pass through a matrix takes, in one call.
//
// Small layers compute less than it takes to call kernels one by one. The same bits as by single calls.
#include <algorithm>

#include "calls.hpp"
#include "finite.hpp"
#include "draw.hpp"
#include "wide.hpp"

using namespace gpuxbar;

namespace {

// Mirrored field by field in gpuxbar/ops/layer_read.py. Of the base, `v` and what is said here in other words is not given.
struct LayerRead : TileMvm {
  const float* x;      // [rows, channels, each] digital values: inputs, or driven backwards, gradients of outputs
  void* driven;        // like x: what drives the lines: int16 codes, or without a DAC float32; null: nobody asks for it
  float* dac_lsb;      // [lsb_count] value of one code; written where it `fits`, null: nobody asks for it then
  const float* w_max;  // [groups * cols] weight of a full pair, or null: nothing is scaled by it
  const float* adc_range;  // [1] or [groups * sense] A: current of the largest code
  i64* counter;            // [1] reads so far; `count` more, after this one
  i64* number;             // [1] that number of this read, which fixes its noise; written, null: nobody asks for it
  double unit;             // weight of a full pair in digital units is w_max * unit
  i64 rows, channels, each, lsb_count, fits, dac_code_max, dac_signed, count;
};

// Mirrored field by field in gpuxbar/ops/layer_read.py. The base is the transposed read, of `d` in place of `x`, whose result
// is the gradient of the inputs; null: nobody asks for it.
struct LayerGradient : LayerRead {
  const float* d;       // [rows, channels] gradients of outputs
  const float* passed;  // like d: shares of conversions inside the range, by which d is multiplied, or null: 1
  const void* v;        // [rows, groups * inputs] what drove the lines forwards: int16 codes, or without a DAC float32
  const float* v_unit;  // [v_units] value of one code
  float* dw;            // [channels, groups * inputs], or null: not asked for
  float* dbias;         // [channels], or null
  i64 v_is_code, v_units;
};

// x in units of `lsb`, and how many values are not finite.
i64 in_units(const LayerRead& l, float* to) {
  const i64 per_row = l.channels * l.each;
  i64 bad = 0;
#pragma omp parallel for reduction(+ : bad) schedule(static) if (l.rows * per_row >= WORTH_A_THREAD)
  for (i64 row = 0; row < l.rows; ++row) {
    const float lsb = l.dac_lsb[l.lsb_count > 1 ? row : 0];
    for (i64 e = row * per_row; e < (row + 1) * per_row; ++e) {
      bad += not_finite(l.x[e]);
      to[e] = l.x[e] / lsb;
    }
  }
  return bad;
}

// Sums of columns: of sixteen rows, then of sixteen such sums, and so on, so that few roundings lie between a value and a sum.
void sum_rows(const float* x, i64 rows, i64 columns, float* sum) {
  constexpr i64 LEVELS = 4, AT_ONCE = 16, WIDE = 128;
#pragma omp parallel for schedule(static) if (rows * columns >= WORTH_A_THREAD)
  for (i64 j0 = 0; j0 < columns; j0 += WIDE) {
    const i64 count = std::min(WIDE, columns - j0);
    float part[LEVELS][WIDE] = {};
    const auto add = [=](const float* from, float* to) {
#pragma omp simd
      for (i64 j = 0; j < count; ++j) to[j] += from[j];
    };
    for (i64 row = 0; row < rows; ++row) {
      add(x + row * columns + j0, part[0]);
      i64 done = row + 1;
      for (int level = 1; level < LEVELS && done % AT_ONCE == 0; ++level, done /= AT_ONCE) {
        add(part[level - 1], part[level]);
        std::fill_n(part[level - 1], count, 0.0f);
      }
    }
    for (int level = 1; level < LEVELS; ++level) add(part[level], part[0]);
    std::copy_n(part[0], count, sum + j0);
  }
}

}  // namespace

extern "C" void gpuxbar_layer_read(const LayerRead* layer, double smallest, i64* bad) {
  LayerRead l = *layer;
  const i64 values = l.rows * l.channels * l.each, outputs = l.groups * l.cols;
  const i64 sensed = l.groups * (l.transposed ? l.inputs : l.cols), ranges = l.adc_per_column ? sensed : 1;
  const Aligned room(2 * l.lsb_count + outputs + ranges + (l.driven ? 0 : values));
  float *const row_scale = room.get(), *const scale = row_scale + 2 * l.lsb_count, *const adc_lsb = scale + outputs;
  if (!l.dac_lsb) l.dac_lsb = row_scale + l.lsb_count;
  if (!l.driven) l.driven = adc_lsb + ranges;
  if (l.w_max)
    for (i64 j = 0; j < outputs; ++j) scale[j] = l.w_max[j] * (float)l.unit;
  const float* scales = l.w_max ? scale : nullptr;
  if (!l.is_code)
    *bad = in_units(l, (float*)l.driven);
  else if (l.fits)
    gpuxbar_dac_fit(l.x, l.transposed ? scales : nullptr, (i16*)l.driven, l.dac_lsb, l.rows, l.channels, l.each,
                    l.lsb_count, l.dac_code_max, l.dac_signed, smallest, bad);
  else
    gpuxbar_dac_quantize(l.x, l.dac_lsb, (i16*)l.driven, l.rows, l.channels * l.each, l.lsb_count, l.dac_code_max,
                         l.dac_signed, bad);
  if (*bad) return;
  const i64 number = *l.counter + l.count;
  if (l.count) *l.counter = number;
  if (l.number) *l.number = number;
  if (!l.batch) return;
  for (i64 k = 0; k < l.lsb_count; ++k) row_scale[k] = l.dac_lsb[k] / (float)l.v_lsb;
  for (i64 k = 0; l.adc_bits && k < ranges; ++k) adc_lsb[k] = l.adc_range[k] / l.code_max();
  l.v = l.driven;
  l.step = &number;
  l.row_scale = row_scale;
  l.adc_lsb = adc_lsb;
  l.col_scale = l.transposed ? nullptr : scales;
  gpuxbar_tile_mvm(&l);
}

extern "C" void gpuxbar_layer_gradient(const LayerGradient* gradient, double smallest, i64* bad) {
  LayerGradient l = *gradient;
  const i64 values = l.rows * l.channels;
  const bool apart = l.passed && l.y;  // else the product multiplies on the way
  const Aligned room(apart ? values : 0);
  if (apart)
#pragma omp parallel for simd schedule(static) if (values >= WORTH_A_THREAD)
    for (i64 e = 0; e < values; ++e) room.get()[e] = l.d[e] * l.passed[e];
  const float* d = apart ? room.get() : l.d;
  if (l.dbias) sum_rows(l.d, l.rows, l.channels, l.dbias);
  if (l.dw)
    gpuxbar_outer_product(d, apart ? nullptr : l.passed, l.v, l.v_unit, l.dw, l.rows, l.channels, l.groups * l.inputs,
                          l.v_is_code, l.v_units);
  if (!l.y) return;
  l.x = d;
  gpuxbar_layer_read(&l, smallest, bad);
}
