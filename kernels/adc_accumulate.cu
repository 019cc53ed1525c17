// adc_accumulate: partial sums of every tile -> noise, ADC, integer sum over tiles, shift-and-add over planes and
// passes.
//
// Axes    G groups, T tiles, P passes, M rows of this call, S planes; psum [G, T, P, M, ld], a plane's sensed lines side
//         by side; outputs are the G * sense lines. y is [rows, G * sense], or images [N, G * sense, pixels].
// Launch  32 rows by 8 column groups a block, 256 threads; grid (ceil(G sense / (8 WIDTH)), ceil(M / 32)).
//         One thread owns its outputs: integer sums over tiles, a fixed order of passes and planes, the same bits on
//         any launch and split of the rows.
// Random  read noise of (row, column, conversion): normal.cuh; one counter a thread and conversion.
// Macros  NOISE 0 none, 1 exact (4 columns a thread), 2 fast (8 columns); VARIANCE state-dependent part; ADC; GATE;
//         ERRORS converters have a gain or offset; INL they bend; IMAGES y and gate in image layout; VECTOR sense is a
//         multiple of WIDTH (16-byte loads)
// Wrapper gpuxbar/ops/tile_mvm_cuda.py      Oracle gpuxbar/reference/tile_mvm.py
#include "gpuxbar/converter.cuh"
#include "gpuxbar/inl.cuh"
#include "gpuxbar/normal.cuh"

#ifndef NOISE
#define NOISE 1
#endif
#ifndef VARIANCE
#define VARIANCE 0
#endif
#ifndef ADC
#define ADC 1
#endif
#ifndef GATE
#define GATE 0
#endif
#ifndef ERRORS
#define ERRORS 0
#endif
#ifndef INL
#define INL 0
#endif
#ifndef IMAGES
#define IMAGES 0
#endif
#ifndef VECTOR
#define VECTOR 1
#endif
#define WIDTH (NOISE == 2 ? 8 : 4)
// Blocks a multiprocessor must hold: what the registers of each variant allow without a spill.
#if VECTOR && !VARIANCE && !GATE
#define RESIDENT (NOISE == 2 ? 2 : 4)
#else
#define RESIDENT (VECTOR ? 2 : 1)
#endif

namespace gpuxbar {

constexpr float STEP = ADC && !INL ? ADC_STEP : 1.0f;  // in which the steps of a conversion are counted

// Where the outputs of a thread lie in the partial sums of plane 0, pass 0 and tile 0; a call has fewer than
// 2^31.
struct Places {
  int at[VECTOR ? 1 : WIDTH];
};

GPUXBAR_FN void load(const float* __restrict__ from, const Places& places, float* out) {
#if VECTOR
#pragma unroll
  for (int j = 0; j < WIDTH; j += 4) {
    const float4 q = *(const float4*)(from + places.at[0] + j);
    out[j] = q.x, out[j + 1] = q.y, out[j + 2] = q.z, out[j + 3] = q.w;
  }
#else
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) out[j] = from[places.at[j]];
#endif
}

extern "C" __global__ void __launch_bounds__(256, RESIDENT)
    adc_accumulate(const float* __restrict__ psum,         // [G, T, P, M, ld]      `amperes`
                   const float* __restrict__ variance,     // like psum, or null    `amperes`^2
                   const float* __restrict__ slice_scale,  // [S] or null: 1
                   const float* __restrict__ adc_lsb,      // [1] or [G * sense], or null: adc_lsb_value   A
                   const float* __restrict__ adc_gain,     // [S, T, G * sense] or null
                   const float* __restrict__ adc_offset,   // [S, T, G * sense] or null                    A
                   const float* __restrict__ adc_inl,      // [S, T, G * sense] or null (INL)              steps
                   const float* __restrict__ read_noise,   // [1] or null: read_noise_value                A
                   const i64* __restrict__ step,           // [1] or null: step_value
                   const float* __restrict__ row_scale,    // [all rows / rows_per_scale] or null
                   const float* __restrict__ col_scale,    // [G * sense] or null
                   const float* __restrict__ bias,         // [G * sense] or null
                   float* __restrict__ y,
                   float* __restrict__ gate,  // like y, or null: share of the conversions inside the range
                   float amperes,             // of a partial sum of 1
                   float adc_lsb_value, float read_noise_value, i64 step_value,
                   RoundKeys keys,  // of the seed
                   i64 row0,        // first row of this call, in the whole product
                   i64 y_row0,      // and in y
                   i64 noise_row0,  // and in the counters
                   int rows, int groups, int sense, int tiles, int planes, int ld, int streams, int phases,
                   int stream_bits, int adc_per_column, float code_min, float code_max, int rows_per_scale, int pixels,
                   u32 purpose) {
  const int outputs = groups * sense;
  const int column = (blockIdx.x * 8 + (threadIdx.x & 7)) * WIDTH;
  const int row = blockIdx.y * 32 + (threadIdx.x >> 3);
  const bool active = row < rows && column < outputs;
  [[maybe_unused]] const int count = outputs - column < WIDTH ? outputs - column : WIDTH;
  float total[WIDTH], inside[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) total[j] = inside[j] = 0.0f;

  if (active) {
    [[maybe_unused]] const Adc adc{code_min, code_max};
    const int passes = streams * phases;
    const i64 pass_size = (i64)rows * ld, tile_size = passes * pass_size;
    Places places;
    float lsb[WIDTH], factor[WIDTH];  // of a column: A of a step; a partial sum of 1 in `STEP` steps
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const int c = column + j < outputs ? column + j : column;
      if (!VECTOR || j == 0) places.at[j] = (int)((c / sense) * tiles * tile_size + (i64)row * ld + c % sense);
      if (j > 0 && !adc_per_column) {
        lsb[j] = lsb[0], factor[j] = factor[0];
        continue;
      }
      lsb[j] = adc_lsb ? adc_lsb[adc_per_column ? c : 0] : adc_lsb_value;
      factor[j] = STEP * steps_of_one(amperes, lsb[j]);
    }
    [[maybe_unused]] const float per_ampere = 1.0f / amperes;
#if NOISE
    const float sigma = (read_noise ? *read_noise : read_noise_value) * per_ampere;  // in partial sums
    const float spread = SPREAD * (sigma * sigma);
    const u32 now = (u32)(step ? *step : step_value);
    const u32 noise_row = (u32)(noise_row0 + row);
#endif
    float weights = 0.0f;

    for (int plane = 0; plane < planes; ++plane)
      for (int pass = 0; pass < passes; ++pass) {
        const float slice = slice_scale ? slice_scale[plane] : 1.0f;
        const float stream = (float)(1ull << (pass % streams * stream_bits));
        const float weight = (pass < streams ? stream : -stream) * slice, share = abs(weight);
        weights += share;
        u32 codes[WIDTH];  // with the bias of each
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) codes[j] = 0;
#pragma unroll 2
        for (int t = 0; t < tiles; ++t) {
          const i64 from = t * tile_size + pass * pass_size + (i64)plane * sense;
          float current[WIDTH];
          load(psum + from, places, current);
#if NOISE
          const u32 slot = (u32)((pass * planes + plane) * tiles + t);
          const Counter counts = counter((u32)column / WIDTH, noise_row, purpose, slot, now);
          const Counter words = philox<NOISE == 1 ? 10 : 7>(counts, keys);
#if VARIANCE
          float var[WIDTH];
          load(variance + from, places, var);
#endif
#pragma unroll
          for (int j = 0; j < WIDTH; j += 2) {
            const Polar noise = polar_of<NOISE == 2>(words, j / 2);
#pragma unroll
            for (int f = 0; f < 2; ++f) {
#if VARIANCE
              const float deviation = radius(fma(SPREAD, max(var[j + f], 0.0f), spread), noise);
#else
              const float deviation = radius(spread, noise);
#endif
              current[j + f] = fma(deviation, f ? noise.turn.b : noise.turn.a, current[j + f]);
            }
          }
#endif
#if ADC
#if ERRORS || INL
          const i64 converter = ((i64)plane * tiles + t) * outputs + column;
#endif
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) {
            float gain = factor[j], offset = 0.0f;
#if ERRORS || INL
            const bool real = VECTOR || j < count;
#endif
#if ERRORS
            if (adc_gain && real) gain *= adc_gain[converter + j];
            if (adc_offset && real) offset = adc_offset[converter + j] * per_ampere * factor[j];
#endif
            float steps = fma(current[j], gain, offset);
#if INL
            steps = ADC_STEP * bent(steps, real ? adc_inl[converter + j] : 0.0f, code_max);
#endif
            codes[j] += adc.code(steps);
#if GATE
            inside[j] += adc.in_range(steps) ? share : 0.0f;
#endif
          }
#else
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) {
            total[j] = fma(weight * factor[j], current[j], total[j]);
#if GATE
            inside[j] += share;
#endif
          }
#endif
        }
#if ADC
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          const i32 sum = (i32)(codes[j] + (u32)tiles * ((u32)adc.lowest() - adc.bias()));
          total[j] = fma(weight * lsb[j], (float)sum, total[j]);
        }
#endif
      }

    const float by_row = row_scale ? row_scale[(row0 + row) / rows_per_scale] : 1.0f;
    const float part = gate_part(weights, tiles);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const int c = column + j < outputs ? column + j : column;
      total[j] = total[j] * (by_row * (col_scale ? col_scale[c] : 1.0f)) + (bias ? bias[c] : 0.0f);
      inside[j] *= part;
    }
  }

#if IMAGES
  // through shared memory, so that a warp writes consecutive pixels of one channel
  __shared__ float turned[8 * WIDTH][33];
  const int r = blockIdx.y * 32 + (threadIdx.x & 31);
  const i64 at = y_row0 + r, image = at / pixels;
  const i64 to = (image * outputs + blockIdx.x * 8 * WIDTH) * pixels + (at - image * pixels);
  for (int which = 0; which < (GATE ? 2 : 1); ++which) {
    float* const images = which ? gate : y;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < WIDTH; ++j)
      turned[(threadIdx.x & 7) * WIDTH + j][threadIdx.x >> 3] = which ? inside[j] : total[j];
    __syncthreads();
    if (r >= rows) continue;
    for (int i = threadIdx.x >> 5; i < 8 * WIDTH; i += 8)
      if (blockIdx.x * 8 * WIDTH + i < outputs) images[to + (i64)i * pixels] = turned[i][threadIdx.x & 31];
  }
#else
  if (active) {
    const i64 to = (y_row0 + row) * outputs + column;
#if VECTOR
#pragma unroll
    for (int j = 0; j < WIDTH; j += 4) {
      *(float4*)(y + to + j) = make_float4(total[j], total[j + 1], total[j + 2], total[j + 3]);
      if (GATE) *(float4*)(gate + to + j) = make_float4(inside[j], inside[j + 1], inside[j + 2], inside[j + 3]);
    }
#else
    for (int j = 0; j < count; ++j) {
      y[to + j] = total[j];
      if (GATE) gate[to + j] = inside[j];
    }
#endif
  }
#endif
}

}  // namespace gpuxbar
