// fused: what fused_tile_mvm and fused_tile_mvm_sm90 do alike around their products: the part of a read that a block
// computes, noise and conversion of neighbouring columns, integer sums of codes, and the scale of results.
//
// Macros  BLOCK_N, TERMS, INT8, BFLOAT, NOISE, CONVERTERS and GATE, as the kernels say.
#pragma once
#include "gpuxbar/converter.cuh"
#include "gpuxbar/mma.cuh"
#include "gpuxbar/normal.cuh"

#ifndef BLOCK_N
#define BLOCK_N 128
#endif
#ifndef TERMS
#define TERMS 1
#endif
#ifndef INT8
#define INT8 0
#endif
#ifndef BFLOAT
#define BFLOAT 0
#endif
#ifndef NOISE
#define NOISE 1
#endif
#ifndef CONVERTERS
#define CONVERTERS 0
#endif
#ifndef GATE
#define GATE 0
#endif
#define WIDTH (NOISE == 1 ? 4 : 8)  // neighbouring columns that share a counter
#define PAIRED (BLOCK_N == 256)     // two 16-bit sums a register
#if PAIRED && GATE
#error "GATE needs the high half of the sums: BLOCK_N 128"
#endif

namespace gpuxbar {

#if INT8
using Operand = i8;
using Sum = i32;
#elif BFLOAT
using Operand = i16;
using Sum = float;
#else
using Operand = u16;
using Sum = float;
#endif

constexpr int BLOCK_M = 128;
constexpr int ROUNDS = NOISE == 1 ? 10 : 7;  // of Philox

// What turns sums of codes into results; every array may be null.
struct Scales {
  const float *adc_lsb, *col_scale, *bias;  // [1] or [G * N]; [G * N]; [G * N]
  float adc_lsb_value;
  int adc_per_column;

  // Of column c, A.
  GPUXBAR_FN float lsb(int c) const { return adc_lsb ? adc_lsb[adc_per_column ? c : 0] : adc_lsb_value; }
};

// The same for one column, whose sums have a digital weight.
struct ColumnScale {
  float unit, scale, bias;

  ColumnScale() = default;
  GPUXBAR_FN ColumnScale(const Scales& of, float weight, int c)
      : unit(weight * of.lsb(c)), scale(of.col_scale ? of.col_scale[c] : 1.0f), bias(of.bias ? of.bias[c] : 0.0f) {}
  GPUXBAR_FN float result(int code, float by_row) const {
    return fma(unit, (float)code, 0.0f) * (by_row * scale) + bias;
  }
};

// Writes the first `real` of COUNT values, `stride` apart; by fours if they are neighbours and all or none are real.
template <class Four, class T, int COUNT>
GPUXBAR_FN void store(T* to, const T (&v)[COUNT], int real, i64 stride, bool vector) {
#pragma unroll
  for (int q = 0; q < COUNT; q += 4)
    if (vector) {
      if (q < real) *(Four*)(to + q) = Four{v[q], v[q + 1], v[q + 2], v[q + 3]};
    } else {
#pragma unroll
      for (int e = q; e < q + 4; ++e)
        if (e < real) to[e * stride] = v[e];
    }
}

// The part of a read that a block computes. It lies in shared memory and is read where it is used: registers are for
// sums.
struct Part {
  int m0, n0, group, plane, pass, first_tile, last_tile;
  u32 column;  // of the counters: of n0
  // volatile: read at each use, so as not to stay in registers
  volatile u32 slot, now;  // of the counters: of tile 0, and the step
  volatile float spread;   // of the noise, in partial sums squared: normal.cuh
  float amperes;           // of a partial sum of 1
  volatile float per_ampere;
  float factor[CONVERTERS ? BLOCK_N : 1];  // of a column: a partial sum of 1 as its ADC takes it (converter.cuh)

  // By one thread, before a barrier.
  GPUXBAR_FN void locate(int rows, int groups, int sense, int tiles, int planes) {
    group = blockIdx.z % groups;
    plane = blockIdx.z / groups % planes;
    pass = blockIdx.z / groups / planes;
    first_tile = (int)((i64)tiles * blockIdx.y / gridDim.y);
    last_tile = (int)((i64)tiles * (blockIdx.y + 1) / gridDim.y);
    // Blocks walk down the columns eight row blocks at a time, so that what runs together shares operands in L2.
    const int row_blocks = (rows + BLOCK_M - 1) / BLOCK_M, column_blocks = (sense + BLOCK_N - 1) / BLOCK_N;
    const int band = blockIdx.x / (8 * column_blocks), inside = blockIdx.x % (8 * column_blocks);
    const int high = row_blocks - 8 * band < 8 ? row_blocks - 8 * band : 8;
    m0 = (8 * band + inside % high) * BLOCK_M;
    n0 = inside / high * BLOCK_N;
    column = group * sense + n0;
    slot = (pass * planes + plane) * tiles;
  }

  // Also by one thread. `unit`: A of a partial sum of 1; `noise`: its standard deviation, A.
  GPUXBAR_FN void measure(float unit, float noise, i64 step) {
    amperes = unit;
    per_ampere = 1.0f / unit;
    const float sigma = noise * per_ampere;
    spread = SPREAD * (sigma * sigma);
    now = (u32)step;
  }

  // By all threads, after that barrier.
  GPUXBAR_FN void set_factors(const Scales& scales, int sense, int threads) {
#pragma unroll 1
    for (int j = thread_index(); j < (CONVERTERS ? BLOCK_N : 1); j += threads)
      factor[j] = ADC_STEP * steps_of_one(amperes, scales.lsb(column + (n0 + j < sense ? j : 0)));
  }

  // Arrays of words before the block's own.
  GPUXBAR_FN i64 words_before(int planes) const { return ((i64)pass * planes + plane) * gridDim.y + blockIdx.y; }

  // What each sum of codes has beside codes counted from the lowest one, and that one itself, as often.
  GPUXBAR_FN u32 biases(const Adc& adc) const {
    const u32 bias = adc.bias();
    return (u32)(last_tile - first_tile) * (PAIRED ? bias + (bias << 16) : bias);
  }
  GPUXBAR_FN i32 lowest(const Adc& adc) const { return (last_tile - first_tile) * adc.lowest(); }
};

// Code of a current, with its bias; under GATE 2^16 more inside the range.
GPUXBAR_FN u32 counted_code(const Adc& adc, float current) {
  return adc.code(current) + (GATE && adc.in_range(current) ? 1u << 16 : 0u);
}

// Adds the codes of two neighbours to the sums of a part of a fragment, in its row h (0, or 8 lines below).
GPUXBAR_FN void add_codes(u32* sums, int h, const u32 (&code)[2]) {
#if PAIRED
  sums[h] += code[0] + (code[1] << 16);
#else
  sums[2 * h] += code[0];
  sums[2 * h + 1] += code[1];
#endif
}

// A column's sum of codes, under GATE with the count in the high half, of a sum less its biases; of the two columns of a
// PAIRED register the first or the second, neither of them negative there. `lowest`: of the sum.
GPUXBAR_FN int word_of(u32 sum, bool second, i32 lowest) {
  return (int)(!PAIRED ? sum : second ? sum >> 16 : sum & 0xFFFFu) + lowest;
}

// The sum of codes in such a word, and the conversions inside the range. Codes below 0 are possible if code_min is.
GPUXBAR_FN int code_of(int word, float code_min) {
  return !GATE ? word : code_min < 0.0f ? (i16)word : (int)((u32)word & 0xFFFFu);
}
GPUXBAR_FN u32 inside_of(int word, float code_min) { return (u32)(word - code_of(word, code_min)) >> 16; }

}  // namespace gpuxbar
