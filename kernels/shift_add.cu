// shift_add: sums of codes of every pass and plane -> shift-and-add, scales, bias; the end of fused_tile_mvm where a
// block could not finish its outputs alone.
//
// Axes    P passes, S planes, X splits of the tiles, M rows of this call; words [P, S, X, M, outputs]; y is [rows, outputs],
//         or images [N, outputs, pixels].
// Launch  32 rows by 32 columns a block, 256 threads; grid (ceil(outputs / 32), ceil(M / 32)). One thread owns an output:
//         a fixed order of planes and passes, that of adc_accumulate.cu.
// Macros  GATE words hold the number of conversions inside the range in their high halves
// Wrapper gpuxbar/ops/fused_tile_mvm.py      Oracle gpuxbar/reference/tile_mvm.py
#include "gpuxbar/converter.cuh"

#ifndef GATE
#define GATE 0
#endif

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256, 4)
    shift_add(const int* __restrict__ words,          // [P, S, X, M, outputs]
              const float* __restrict__ slice_scale,  // [S] or null: 1
              const float* __restrict__ adc_lsb,      // [1] or [outputs], or null: adc_lsb_value   A
              const float* __restrict__ row_scale,    // [all rows / rows_per_scale] or null
              const float* __restrict__ col_scale,    // [outputs] or null
              const float* __restrict__ bias,         // [outputs] or null
              float* __restrict__ y,
              float* __restrict__ gate,  // like y, or null: share of the conversions inside the range (GATE)
              float adc_lsb_value,
              i64 row0,    // first row of this call, in the whole product
              i64 y_row0,  // and in y
              int rows, int outputs, int tiles, int planes, int splits, int streams, int phases, int stream_bits,
              int adc_per_column, float code_min, int rows_per_scale,
              int pixels)  // of an image, for y and gate in image layout; or 0
{
  __shared__ float turned[GATE ? 2 : 1][32][33];
  const int x = threadIdx.x & 31, y0 = threadIdx.x >> 5;
  const int first = blockIdx.y * 32, c = blockIdx.x * 32 + x, passes = streams * phases;
  const bool real = c < outputs;
  const float lsb = adc_lsb ? adc_lsb[adc_per_column && real ? c : 0] : adc_lsb_value;
  const float by_column = col_scale && real ? col_scale[c] : 1.0f, added = bias && real ? bias[c] : 0.0f;

  for (int i = y0; i < 32; i += 8) {
    if (!real || first + i >= rows) continue;
    float total = 0.0f, inside = 0.0f, weights = 0.0f;
    for (int plane = 0; plane < planes; ++plane)
      for (int pass = 0; pass < passes; ++pass) {
        const float slice = slice_scale ? slice_scale[plane] : 1.0f;
        const float stream = (float)(1ull << (pass % streams * stream_bits));
        const float weight = (pass < streams ? stream : -stream) * slice, share = abs(weight);
        const i64 before = ((i64)pass * planes + plane) * splits;
        int word = 0;
        for (int split = 0; split < splits; ++split) word += words[((before + split) * rows + first + i) * outputs + c];
        const int low = code_min < 0.0f ? (int)(i16)word : word & 0xFFFF;
        total = fma(weight * lsb, (float)(GATE ? low : word), total);
        inside += share * (float)((u32)(word - low) >> 16);
        weights += share;
      }
    const float by_row = row_scale ? row_scale[(row0 + first + i) / rows_per_scale] : 1.0f;
    total = total * (by_row * by_column) + added;
    inside *= gate_part(weights, tiles);
    if (pixels) {
      turned[0][x][i] = total;
      if (GATE) turned[GATE][x][i] = inside;
    } else {
      const i64 to = (y_row0 + first + i) * outputs + c;
      y[to] = total;
      if (GATE) gate[to] = inside;
    }
  }
  if (!pixels) return;

  __syncthreads();  // so that a warp writes consecutive pixels of one channel
  const int r = first + x;
  if (r >= rows) return;
  const i64 at = y_row0 + r, image = at / pixels;
  const i64 start = (image * outputs + blockIdx.x * 32) * pixels + (at - image * pixels);
  for (int i = y0; i < 32 && blockIdx.x * 32 + i < outputs; i += 8) {
    const i64 to = start + (i64)i * pixels;
    y[to] = turned[0][i][x];
    if (GATE) gate[to] = turned[GATE][i][x];
  }
}

}  // namespace gpuxbar
