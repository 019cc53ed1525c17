// pack_inputs: driven values of some rows -> the left operand of the tile products.
//
// Axes    P passes (streams x phases), M rows of this call, G groups, T tiles of K lines (the last padded with 0):
//         a [P, M, G, T, K]. The source is a matrix [rows, G, drive], the images of a convolution whose
//         patches are the rows, or the images of its output gradient.
// Launch  a 32 x 32 block of (row, line) each, 256 threads; grid (ceil(G T K / 32), ceil(M / 32)).
// Macros  CODES source int16, else float32; DAC source float32, of which codes are made on the way (CODES; CONV 0 or 2, which
//         look at a value once); HALF operand fp16 (digits exactly), INT8 operand int8 (digits up to 127, beyond
//         which they saturate), else float32;
//         PANELS a in panels of 128 x 64 (M padded to 128, panels.cuh), for fused_tile_mvm_sm90;
//         CONV 0 matrix, 1 patches of [N, G * channels, height, width], 2 images [N, G * drive, out_h, out_w]
// Wrapper gpuxbar/ops/tile_mvm_cuda.py      Oracle gpuxbar/reference/tile_mvm.py (unfold, stream_digits)
#include "gpuxbar/converter.cuh"
#include "gpuxbar/panels.cuh"

#ifndef CODES
#define CODES 1
#endif
#ifndef DAC
#define DAC 0
#endif
#ifndef HALF
#define HALF 0
#endif
#ifndef INT8
#define INT8 0
#endif
#ifndef PANELS
#define PANELS 0
#endif
#ifndef CONV
#define CONV 0
#endif

#if DAC && (!CODES || CONV == 1)
#error "DAC goes with CODES, and without CONV 1"
#endif

namespace gpuxbar {

#if CODES
using Value = i16;
#else
using Value = float;
#endif
#if DAC
using Source = float;
#else
using Source = Value;
#endif
#if HALF
using Operand = u16;
GPUXBAR_FN u16 operand(float x) { return half_bits(x); }
#elif INT8
using Operand = i8;
GPUXBAR_FN i8 operand(float x) { return (i8)(i32)x; }
#else
using Operand = float;
GPUXBAR_FN float operand(float x) { return x; }
#endif

extern "C" __global__ void __launch_bounds__(256)
    pack_inputs(const Source* __restrict__ v,   // the source, C-contiguous
                Operand* __restrict__ a,        // [P, M, G, T, K]  digits (or values without a DAC)
                float* __restrict__ squares,    // like a, or null: digits squared
                int* __restrict__ code_sums,    // [P, M, G, T], zeros, or null: digits summed over a tile (INT8)
                const float* __restrict__ lsb,  // [1], or a value for each row or image: of one code, above 0 (DAC)
                i16* __restrict__ codes,        // like v, or null: what the DAC makes of it (DAC)
                float code_min, float code_max, i64 lsb_count,
                i64 row0,  // first row of this call
                int rows, int groups, int drive, int tiles, int tile, int k, int stream_bits, int streams, int phases,
                int channels, int height, int width, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h,
                int pad_w, int dilation_h, int dilation_w, int out_h, int out_w, int channel_step,
                int position_step) {  // lines of a patch: images.cuh
  __shared__ Value block[32][33];
  const int lines = groups * tiles * k;
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const int line0 = blockIdx.x * 32, first = blockIdx.y * 32;
  // The value at a place of row or image n.
  const auto take = [&](i64 at, i64 n) -> Value {
#if DAC
    const i16 code = (i16)(i32)dac_code(v[at], 1.0f / lsb[lsb_count > 1 ? n : 0], code_min, code_max);
    if (codes) codes[at] = code;
    return code;
#else
    return v[at];
#endif
  };

  // A matrix is read along its lines, images along their pixels: both coalesce.
  for (int i = y; i < 32; i += 8) {
    const int line = line0 + (CONV ? i : x), row = first + (CONV ? x : i);
    const int group = line / (tiles * k), at = line % (tiles * k);
    const int d = at / k * tile + at % k;  // the driven line
    Value value = 0;
    if (line < lines && row < rows && at % k < tile && d < drive) {
#if CONV == 0
      value = take((row0 + row) * groups * drive + (i64)group * drive + d, row0 + row);
#else
      const int pixels = out_h * out_w;
      const i64 image = (row0 + row) / pixels;
      const int pixel = (int)((row0 + row) % pixels);
#if CONV == 1
      const int channel = d / channel_step % channels, position = d / position_step % (kernel_h * kernel_w);
      const int ky = position / kernel_w, kx = position % kernel_w;
      const int iy = pixel / out_w * stride_h + ky * dilation_h - pad_h;
      const int ix = pixel % out_w * stride_w + kx * dilation_w - pad_w;
      if (iy >= 0 && iy < height && ix >= 0 && ix < width)
        value = take((((image * groups + group) * channels + channel) * height + iy) * width + ix, image);
#else
      value = take(((image * groups + group) * drive + d) * pixels + pixel, image);
#endif
#endif
    }
    if (CONV)
      block[x][i] = value;
    else
      block[i][x] = value;
  }
  __syncthreads();

  const int line = line0 + x;
  if (line >= lines) return;
  const int stored = PANELS ? (int)gridDim.y * 32 : rows;
  for (int i = y; i < 32 && first + i < stored; i += 8) {
    const Value value = block[i][x];
    for (int pass = 0; pass < streams * phases; ++pass) {
#if CODES
      const int shift = pass % streams * stream_bits;
      const float driven = stream_bits == 0 ? (float)value
                                            : stream_digit(value, shift, (1u << stream_bits) - 1,
                                                           phases == 1      ? 0
                                                           : pass < streams ? 1
                                                                            : -1);
      const float digit = INT8 ? min(max(driven, -127.0f), 127.0f) : driven;
#else
      const float digit = value;
#endif
#if PANELS
      const i64 to = (i64)pass * stored * lines + panel_place(first + i, line, lines);
#else
      const i64 to = ((i64)pass * rows + first + i) * lines + line;
#endif
      a[to] = operand(digit);
      if (squares) squares[to] = digit * digit;
#if INT8
      if (code_sums) {  // K is a multiple of 128, so the 32 lines of a warp belong to one tile
        i32 sum = (i32)digit;
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        if (x == 0) atomicAdd(code_sums + ((i64)pass * rows + first + i) * groups * tiles + line0 / k, sum);
      }
#endif
    }
  }
}

}  // namespace gpuxbar
