// pack_sensed: conductance planes -> the right operand of fused_tile_mvm, the driven lines of a sensed line side by side.
//
// Axes    S planes, G groups, N sensed lines, T tiles of K driven lines (padded with 0): b [S, G, N, T, K].
//         Forwards the wordlines are driven, transposed the bitlines.
// Launch  a 32 x 32 block of (sensed line, driven line) each, 256 threads; grid (ceil(T K / 32), ceil(N / 32), S G).
// Macros  BFLOAT bf16 of g, else fp16 high part (and low part) of g * scale; TRANSPOSED;
//         PANELS b in panels of 128 x 64 (N padded to 128, panels.cuh), for fused_tile_mvm_sm90;
//         IMPLICIT the lines of a tile in the order of patches.cuh, for codes gathered from images
// Wrapper gpuxbar/ops/fused_tile_mvm.py      Oracle gpuxbar/reference/tile_mvm.py
#include "gpuxbar/panels.cuh"
#include "gpuxbar/patches.cuh"

#ifndef BFLOAT
#define BFLOAT 0
#endif
#ifndef PANELS
#define PANELS 0
#endif
#ifndef IMPLICIT
#define IMPLICIT 0
#endif
#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif

namespace gpuxbar {

#if BFLOAT
using Operand = i16;
#else
using Operand = u16;
#endif

// Nearest bf16 of a finite number, half to even.
GPUXBAR_FN i16 bfloat_bits(float x) {
  const u32 bits = float_bits(x);
  return (i16)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

extern "C" __global__ void __launch_bounds__(256)
    pack_sensed(const float* __restrict__ g,  // [S, G * inputs, cols]  S (or a noise variance, A^2/V^2)
                Operand* __restrict__ b,      // [S, G, N, T, K]
                Operand* __restrict__ low,    // like b, or null: what fp16 leaves of g * scale, in fp16
                float scale,                  // 1/S, a power of 2
                int inputs, int cols, int tiles, int tile, int k,
                int positions,  // of the kernel of a convolution (IMPLICIT)
                int chunks) {   // of eight channels a position (IMPLICIT)
  __shared__ float block[32][33];
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const int sense = TRANSPOSED ? inputs : cols, drive = TRANSPOSED ? cols : inputs, lines = tiles * k;
  const int line0 = blockIdx.x * 32, n0 = blockIdx.y * 32;

  for (int i = y; i < 32; i += 8) {
    const int line = line0 + (TRANSPOSED ? x : i), n = n0 + (TRANSPOSED ? i : x), first = line / k * tile;
#if IMPLICIT
    const int d = patch_line(line % k, first, positions, chunks);
#else
    const int d = first + line % k;
#endif
    float value = 0.0f;
    if (n < sense && line < lines && d >= first && d < first + tile && d < drive)
      value = g[((i64)blockIdx.z * inputs + (TRANSPOSED ? n : d)) * cols + (TRANSPOSED ? d : n)];
    if (TRANSPOSED)
      block[i][x] = value;
    else
      block[x][i] = value;
  }
  __syncthreads();

  const int line = line0 + x;
  if (line >= lines) return;
  const int stored = PANELS ? (int)gridDim.y * 32 : sense;
  for (int i = y; i < 32 && n0 + i < stored; i += 8) {
#if PANELS
    const i64 to = (i64)blockIdx.z * stored * lines + panel_place(panel_row(n0 + i), line, lines);
#else
    const i64 to = ((i64)blockIdx.z * sense + n0 + i) * lines + line;
#endif
#if BFLOAT
    b[to] = bfloat_bits(block[i][x]);
#else
    const float value = block[i][x] * scale;
    const u16 high = half_bits(value);
    b[to] = high;
    if (low) low[to] = half_bits(value - half_value(high));
#endif
  }
}

}  // namespace gpuxbar
