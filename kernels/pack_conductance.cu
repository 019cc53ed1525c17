// pack_conductance: conductance planes -> the right operand of the tile products.
//
// Axes    G groups, T tiles of K driven lines (padded with 0), N = S planes times sensed lines (padded to ld columns):
//         b [G, T, K, ld]. Forwards the wordlines are driven, transposed the bitlines.
// Launch  a 32 x 32 block of (driven line, column) each, 256 threads; grid (ceil(ld / 32), ceil(K / 32), G T).
// Macros  HALF fp16 high part (and low part) of g * scale, BFLOAT bf16, else float32; TRANSPOSED
// Wrapper gpuxbar/ops/tile_mvm_cuda.py      Oracle gpuxbar/reference/tile_mvm.py
#include "gpuxbar/bfloat.cuh"

#ifndef HALF
#define HALF 0
#endif
#ifndef BFLOAT
#define BFLOAT 0
#endif
#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif

namespace gpuxbar {

#if HALF
using Operand = u16;
#elif BFLOAT
using Operand = i16;
#else
using Operand = float;
#endif

extern "C" __global__ void __launch_bounds__(256)
    pack_conductance(const float* __restrict__ g,  // [S, G * inputs, cols]  S (or a noise variance, A^2/V^2)
                     Operand* __restrict__ b,      // [G, T, K, ld]
                     Operand* __restrict__ low,    // like b, or null: what fp16 leaves of g * scale, in fp16
                     float scale,                  // 1/S, a power of 2
                     int planes, int groups, int inputs, int cols, int tiles, int tile, int k, int ld) {
  __shared__ float block[32][33];
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const int n0 = blockIdx.x * 32, k0 = blockIdx.y * 32, group = blockIdx.z / tiles, t = blockIdx.z - group * tiles;
  const int sense = TRANSPOSED ? inputs : cols, drive = TRANSPOSED ? cols : inputs;

#pragma unroll
  for (int i = y; i < y + 32; i += 8) {
    const int n = n0 + (TRANSPOSED ? i : x), line = k0 + (TRANSPOSED ? x : i);
    const int plane = n / sense, s = n - plane * sense, d = t * tile + line;
    float value = 0.0f;
    if (plane < planes && line < tile && d < drive) {
      const i64 wordline = (i64)(plane * groups + group) * inputs + (TRANSPOSED ? s : d);
      value = g[wordline * cols + (TRANSPOSED ? d : s)];
    }
    if (TRANSPOSED)
      block[x][i] = value;
    else
      block[i][x] = value;
  }
  __syncthreads();

  const int n = n0 + x;
  if (n >= ld) return;
  const i64 first = ((i64)blockIdx.z * k + k0) * ld + n;
#pragma unroll
  for (int i = y; i < y + 32; i += 8) {
    if (k0 + i >= k) break;
    const i64 to = first + (i64)i * ld;
#if HALF
    const float value = block[i][x] * scale;
    const u16 high = half_bits(value);
    b[to] = high;
    if (low) low[to] = half_bits(value - half_value(high));
#elif BFLOAT
    b[to] = bfloat_bits(block[i][x] * scale);
#else
    b[to] = block[i][x] * scale;
#endif
  }
}

}  // namespace gpuxbar
