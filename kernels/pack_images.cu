// pack_images: the codes of a convolution's images, or the values that a DAC makes codes of on the way -> the left operand
// of fused_tile_mvm that gathers patches (IMPLICIT).
//
// Axes    images [N, G * channels, pixels] -> a [N, pixels, G, C], channels padded with 0 to C, a multiple of 8, so that
//         16 bytes hold eight channels of one pixel.
// Launch  a 32 x 32 block of (pixel, channel) each, 256 threads; grid (ceil(pixels / 32), ceil(G C / 32), N).
// Macros  DAC source float32, of which codes are made, else int16 codes
// Wrapper gpuxbar/ops/fused_tile_mvm.py      Oracle gpuxbar/reference/tile_mvm.py (unfold), dac_quantize.py
#include "gpuxbar/converter.cuh"

#ifndef DAC
#define DAC 0
#endif

namespace gpuxbar {

using Operand = u16;
#if DAC
using Source = float;
#else
using Source = i16;
#endif

extern "C" __global__ void __launch_bounds__(256)
    pack_images(const Source* __restrict__ v,   // [N, G * channels, pixels]
                Operand* __restrict__ a,        // [N, pixels, G, C]  codes, fp16
                const float* __restrict__ lsb,  // [1] or [N]: value of one code, above 0 (DAC)
                i16* __restrict__ codes,        // like v, or null: what the DAC makes of it (DAC)
                float code_min, float code_max, i64 lsb_count,
                int code_bits,  // of a magnitude, from the lowest, that drive the lines
                int groups, int channels, int padded, i64 pixels) {
  __shared__ i16 block[32][34];  // an odd number of words
  __shared__ i64 plane[32];      // where the first pixel of a line lies, below 0 where that is padding
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const i64 pixel0 = (i64)blockIdx.x * 32;
  const int line0 = blockIdx.y * 32, line = line0 + x, lines = groups * padded;
#if DAC
  const float inverse = 1.0f / lsb[lsb_count > 1 ? blockIdx.z : 0];
#endif
  if (y == 0) {
    const int group = line / padded, channel = line - group * padded;
    plane[x] =
        group < groups && channel < channels ? (((i64)blockIdx.z * groups + group) * channels + channel) * pixels : -1;
  }
  __syncthreads();
#pragma unroll
  for (int i = y; i < y + 32; i += 8) {
    const bool real = plane[i] >= 0 && pixel0 + x < pixels;
    const i64 at = plane[i] + pixel0 + x;
    i16 code = 0;
#if DAC
    if (real) code = (i16)(i32)dac_code(v[at], inverse, code_min, code_max);
    if (real && codes) codes[at] = code;
#else
    if (real) code = v[at];
#endif
    block[x][i] = code;
  }
  __syncthreads();
  if (line >= lines) return;
  const i64 to = ((i64)blockIdx.z * pixels + pixel0) * lines + line;
#pragma unroll
  for (int i = y; i < y + 32; i += 8)
    if (pixel0 + i < pixels) a[to + (i64)i * lines] = half_bits(stream_digit(block[i][x], 0, (1u << code_bits) - 1, 0));
}

}  // namespace gpuxbar
