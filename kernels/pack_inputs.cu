// pack_inputs: driven values of some rows -> the left operand of the tile products.
//
// Axes    P passes (streams x phases), M rows of this call, G groups, T tiles of K lines (the last padded with 0):
//         a [P, M, G, T, K]. The source is a matrix [rows, G, drive], the images of a convolution whose
//         patches are the rows, or the images of its output gradient.
// Launch  32 rows by 128 lines a block, 256 threads; grid (ceil(G T K / 128), ceil(M / 32)).
// Macros  CODES source int16, else float32; DAC source float32, of which codes are made on the way (CODES; CONV 0 or 2, which
//         look at a value once); HALF operand fp16 (digits exactly), BFLOAT bf16 (digits up to 256 exactly), INT8 int8
//         (digits up to 127, beyond which they saturate), else float32;
//         PANELS a in panels of 128 x 64 (M padded to 128, panels.cuh), for fused_tile_mvm_sm90;
//         CONV 0 matrix, 1 patches of [N, G * channels, height, width], 2 images [N, G * drive, out_h, out_w]
//         DRIVERS 1: a DAC with errors on every line, 2: devices that are not ohmic, 3: both; what devices see of digits is
//         rounded to the operand (not with INT8 and PANELS, whose products are of digits)
// Wrapper gpuxbar/ops/tile_mvm_cuda.py      Oracle gpuxbar/reference/tile_mvm.py (unfold, stream_digits, Drivers)
#include "gpuxbar/bfloat.cuh"
#include "gpuxbar/converter.cuh"
#include "gpuxbar/drivers.cuh"
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
#ifndef BFLOAT
#define BFLOAT 0
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

#ifndef DRIVERS
#define DRIVERS 0
#endif

#if DRIVERS && (INT8 || PANELS)
#error "DRIVERS goes without INT8 and PANELS"
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
#elif BFLOAT
using Operand = i16;
GPUXBAR_FN i16 operand(float x) { return bfloat_bits(x); }
#elif INT8
using Operand = i8;
GPUXBAR_FN i8 operand(float x) { return (i8)(i32)x; }
#else
using Operand = float;
GPUXBAR_FN float operand(float x) { return x; }
#endif

constexpr int LINES = 128;  // of a block

extern "C" __global__ void __launch_bounds__(256)
    pack_inputs(const Source* __restrict__ v,   // the source, C-contiguous
                Operand* __restrict__ a,        // [P, M, G, T, K]  digits (or values without a DAC)
                float* __restrict__ squares,    // like a, or null: digits squared
                int* __restrict__ code_sums,    // [P, M, G, T], zeros, or null: digits summed over a tile (INT8)
                const float* __restrict__ lsb,  // [1], or a value for each row or image: of one code, above 0 (DAC)
                i16* __restrict__ codes,        // like v, or null: what the DAC makes of it (DAC)
                const float* __restrict__ dac_error,  // [3, G * drive]  gain, offset in V, curve in steps (DRIVERS)
                float per_volt, float digit_max,      // digits of 1 V, and the largest (DRIVERS)
                float bend, float scale,              // of `Conduction` (DRIVERS)
                float code_min, float code_max, i64 lsb_count,
                i64 row0,  // first row of this call
                int rows, int groups, int drive, int tiles, int tile, int k, int stream_bits, int streams, int phases,
                int channels, int height, int width, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h,
                int pad_w, int dilation_h, int dilation_w, int out_h, int out_w, int channel_step,
                int position_step) {  // lines of a patch: images.cuh
  __shared__ Value block[32][LINES + 4 / sizeof(Value)];
  const int lines = groups * tiles * k;
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const int line0 = blockIdx.x * LINES, first = blockIdx.y * 32;
  const int here = lines - line0 < LINES ? lines - line0 : LINES;  // lines of this block
  // The value at a place, of one over an LSB.
  const auto take = [&](i64 at, float per_lsb) -> Value {
#if DAC
    const i16 code = (i16)(i32)dac_code(v[at], per_lsb, code_min, code_max);
    if (codes) codes[at] = code;
    return code;
#else
    return v[at];
#endif
  };
  // One over the LSB of row or image n, where there is one.
  const auto per_lsb_of = [&](i64 n, bool real) { return DAC && real ? 1.0f / lsb[lsb_count > 1 ? n : 0] : 0.0f; };

  // The driven line of a line of a, or -1 where that is padding; its group.
  const auto driven_line = [&](int line, int& group) {
    group = line / (tiles * k);
    const int at = line - group * (tiles * k), t = at / k, within = at - t * k, d = t * tile + within;
    return within < tile && d < drive ? d : -1;
  };

  // Of every line: where its values are, from a row's or a pixel's on; where its position lies in a patch, or far over an edge
  // if there is no such line.
  struct alignas(16) Line {
    i64 offset;
    int down, right;
  };
  __shared__ Line of_lines[LINES];
  const int tall = CONV == 1 ? height : out_h, wide = CONV == 1 ? width : out_w, planes = CONV == 1 ? channels : drive;
  if (threadIdx.x < here) {
    int group, down = 0, right = 0;
    const int d = driven_line(line0 + threadIdx.x, group);
#if CONV == 1
    const int plane = d / channel_step % channels, position = d / position_step % (kernel_h * kernel_w);
    const int below = position / kernel_w;
    down = below * dilation_h - pad_h, right = (position - below * kernel_w) * dilation_w - pad_w;
#else
    const int plane = d;
#endif
    const i64 from = (i64)group * planes + plane;
    of_lines[threadIdx.x] = Line{CONV ? (from * tall + down) * wide + right : from, d < 0 ? -(1 << 30) : down, right};
  }
  __syncthreads();

  // A matrix is read along its lines, images along their pixels: both coalesce.
#if CONV == 0
  const i64 row = row0 + first + y, pitch = (i64)groups * drive, from = row * pitch;
  float per_lsb[4];
#pragma unroll
  for (int step = 0; step < 4; ++step) per_lsb[step] = per_lsb_of(row + 8 * step, first + y + 8 * step < rows);
  for (int i = x; i < here; i += 32) {
    const Line line = of_lines[i];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const bool real = line.down == 0 && first + y + 8 * step < rows;
      block[y + 8 * step][i] = real ? take(from + line.offset + 8 * step * pitch, per_lsb[step]) : (Value)0;
    }
  }
#else
  const i64 row = row0 + first + x, image = row / (out_h * out_w);
  const int pixel = (int)(row - image * (out_h * out_w)), above = pixel / out_w;
  const int top = first + x < rows ? above * (CONV == 1 ? stride_h : 1) : -(1 << 30);
  const int left = (pixel - above * out_w) * (CONV == 1 ? stride_w : 1);
  const i64 from = (image * groups * planes * tall + top) * wide + left;
  const float per_lsb = per_lsb_of(image, first + x < rows);
#pragma unroll 4
  for (int i = y; i < here; i += 8) {
    const Line line = of_lines[i];
    const bool real = (u32)(top + line.down) < (u32)tall && (u32)(left + line.right) < (u32)wide;
    block[x][i] = real ? take(from + line.offset, per_lsb) : (Value)0;
  }
#endif
  __syncthreads();

  for (int part = x; part < here; part += 32) {
    const int line = line0 + part;
#if DRIVERS
    int own_group;
    const int own = driven_line(line, own_group);
    DacError error{1.0f, 0.0f, 0.0f};
#if DRIVERS != 2
    if (own >= 0) {
      const i64 at = (i64)own_group * drive + own, all = (i64)groups * drive;
      error = DacError{dac_error[at], dac_error[all + at] * per_volt, dac_error[2 * all + at]};
    }
#endif
    // What devices see of a digit; nothing drives what is no line.
    const auto seen = [&](float digit) {
      const float steps = DRIVERS == 2 ? digit : dac_steps(digit, error, digit_max);
      return DRIVERS == 1 ? steps : conducted(steps, Conduction{bend, scale});
    };
#else
    const auto seen = [](float digit) { return digit; };
#endif
    const int stored = PANELS ? (int)gridDim.y * 32 : rows;
    // Where the first row of a thread lies in a, in the first pass; the rows of a block are those of one panel.
    i64 to = PANELS ? panel_place(first + y, line, lines) : (i64)(first + y) * lines + line;
#if INT8
    i64 sum_at = (i64)(first + y) * groups * tiles + (line0 + part) / k;
#endif
    for (int phase = 0; phase < phases; ++phase)
      for (int stream = 0; stream < streams; ++stream) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const int i = y + 8 * step;
          if (first + i >= stored) continue;
          const Value value = block[i][part];
#if CODES
          const float driven = stream_bits == 0 ? (float)value
                                                : stream_digit(value, stream * stream_bits, (1u << stream_bits) - 1,
                                                               phases == 1  ? 0
                                                               : phase == 0 ? 1
                                                                            : -1);
          const float digit = seen(INT8 ? min(max(driven, -127.0f), 127.0f) : driven);
#else
          const float digit = seen(value);
#endif
          const i64 at = to + (i64)8 * step * (PANELS ? PANEL_LINES : lines);
          a[at] = operand(digit);
          if (squares) squares[at] = digit * digit;
#if INT8
          if (code_sums) {  // K is a multiple of 128, so the 32 lines of a warp belong to one tile
            i32 sum = (i32)digit;
            for (int far = 16; far; far >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, far);
            if (x == 0) atomicAdd(code_sums + sum_at + (i64)8 * step * groups * tiles, sum);
          }
#endif
        }
        to += (i64)stored * lines;
#if INT8
        sum_at += (i64)rows * groups * tiles;
#endif
      }
  }
}

}  // namespace gpuxbar
