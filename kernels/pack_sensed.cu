// pack_sensed: conductance planes -> the right operand of fused_tile_mvm, the driven lines of a sensed line side by side.
//
// Axes    S planes, G groups, N sensed lines, T tiles of K driven lines (padded with 0): b [S, G, N, T, K].
//         Forwards the wordlines are driven, transposed the bitlines.
// Launch  256 threads a block, which takes every gridDim-th square of 32 sensed lines by 32 driven ones. With a state
//         nothing is done if b holds this version of g already; the last block to end says that it does.
// Macros  BFLOAT bf16 of g * scale^2, INT8 level of g as int8 (nearest, -128 to 127), else fp16 high part (and low part)
//         of g * scale; TRANSPOSED;
//         PANELS b in panels of 128 x 64 (N padded to 128, panels.cuh), for fused_tile_mvm_sm90;
//         IMPLICIT the lines of a tile in the order of patches.cuh, for codes gathered from images
// Wrapper gpuxbar/ops/fused_tile_mvm.py      Oracle gpuxbar/reference/tile_mvm.py
#include "gpuxbar/bfloat.cuh"
#include "gpuxbar/panels.cuh"
#include "gpuxbar/patches.cuh"

#ifndef BFLOAT
#define BFLOAT 0
#endif
#ifndef INT8
#define INT8 0
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
#elif INT8
using Operand = i8;
#else
using Operand = u16;
#endif

extern "C" __global__ void __launch_bounds__(256)
    pack_sensed(const float* __restrict__ g,      // [S, G * inputs, cols]  S (or a noise variance, A^2/V^2)
                Operand* __restrict__ b,          // [S, G, N, T, K]
                Operand* __restrict__ low,        // like b, or null: what fp16 leaves of g * scale, in fp16
                const i64* __restrict__ version,  // [1] number of the state of g, 0: unknown; or null: pack
                i64* __restrict__ state,          // [2] what b holds, version and layout as one number, and 0; or null
                i64 layout,                       // of b and of the settings below, as one number
                int commit,                       // whether b is the last array of this version to be packed
                float scale,                      // 1/S, a power of 2; levels: one over their step
                float offset,                     // S, of level 0
                int planes, int groups, int inputs, int cols, int tiles, int tile, int k,
                int stored,     // N, padded in panels
                int positions,  // of the kernel of a convolution (IMPLICIT)
                int chunks) {   // of eight channels a position (IMPLICIT)
  __shared__ float block[32][33];
  const i64 stamp = version ? *version ^ layout : 0;
  if (version && *version != 0 && state[0] == stamp) return;
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const int sense = TRANSPOSED ? inputs : cols, drive = TRANSPOSED ? cols : inputs, lines = tiles * k;
  const int across = (lines + 31) / 32, down = (stored + 31) / 32, squares = planes * groups * across * down;
  __shared__ int driven[32];  // by the lines of a square: which line of the array, or -1

  for (int at = blockIdx.x; at < squares; at += gridDim.x) {
    const int strip = at / across, array = strip / down;  // plane * groups + group
    const int line0 = (at - strip * across) * 32, n0 = (strip - array * down) * 32;
    if (y == 0) {
      const int line = line0 + x, t = line / k, first = t * tile;
#if IMPLICIT
      const int d = patch_line(line - t * k, first, positions, chunks);
#else
      const int d = first + line - t * k;
#endif
      driven[x] = line < lines && d >= first && d < first + tile && d < drive ? d : -1;
    }
    __syncthreads();
    const float* const from = g + (i64)array * inputs * cols;
#pragma unroll
    for (int i = y; i < y + 32; i += 8) {
      const int n = n0 + (TRANSPOSED ? i : x), d = driven[TRANSPOSED ? x : i];
      float value = 0.0f;
      if (n < sense && d >= 0) value = from[(i64)(TRANSPOSED ? n : d) * cols + (TRANSPOSED ? d : n)] - offset;
      if (TRANSPOSED)
        block[i][x] = value;
      else
        block[x][i] = value;
    }
    __syncthreads();

    const int line = line0 + x;
    const i64 start = (i64)array * stored * lines;
    if (line < lines)
#pragma unroll
      for (int i = y; i < y + 32; i += 8) {
        if (n0 + i >= stored) break;
#if PANELS
        const i64 to = start + panel_place(panel_row(n0 + i), line, lines);
#else
        const i64 to = start + (i64)(n0 + i) * lines + line;
#endif
#if BFLOAT
        b[to] = bfloat_bits(block[i][x] * scale * scale);
#elif INT8
        b[to] = (i8)(i32)round_even(min(max(block[i][x] * scale, -128.0f), 127.0f));
#else
        const float value = block[i][x] * scale;
        const u16 high = half_bits(value);
        b[to] = high;
        if (low) low[to] = half_bits(value - half_value(high));
#endif
      }
    __syncthreads();
  }

  // Every block counts when all its threads have looked at the state, so the last one changes it under nobody's eyes.
  if (!commit) return;
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd((u64*)state + 1, 1ull) == gridDim.x - 1) state[0] = stamp, state[1] = 0;
}

}  // namespace gpuxbar
