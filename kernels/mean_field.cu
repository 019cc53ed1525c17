// mean_field: the coupling between the lines of a tile, read off a coarse tile of at most 16 x 16 cells, added to the
// ladder; two launches with `conductance_leaf` on the coarse tiles between them.
//
// Axes    g, g_eff [T, R, C]; k x k cells become one, so that P = ceil(R / k) and Q = ceil(C / k), the uppermost block
//         short; coarse [T, P, Q]; strength [T, R + C]: sums of the ladder over wordlines and bitlines, S; parts
//         [T, 2, P, C]: over the bitlines of a block alone, of the ladder and of g;
//         ends [2, 16]: source resistance of the coarse wordlines and sink resistance of the coarse bitlines, segments
//         [2, 16]: of a segment of both, ohm; q [T, 64, 64]: ports of the merged coarse tile.
// Launch  one block of 256 threads a tile; grid T. Every sum is made in a fixed order.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/parasitics.cuh"

namespace gpuxbar {

constexpr int SIDE = 16, WARPS = 8;

GPUXBAR_FN float warp_sum(float x) {
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// Mean of `line` (or of one value for all) over the lines of a block.
GPUXBAR_FN float block_mean(const float* line, float value, int from, int to) {
  if (!line) return value;
  float sum = 0.0f;
  for (int i = from; i < to; ++i) sum += line[i];
  return sum / (float)(to - from);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    mean_field_coarsen(const float* __restrict__ g,           // [T, R, C] S
                       const float* __restrict__ ladder,      // [T, R, C] S
                       const float* __restrict__ r_wordline,  // [R] ohm, or null: wordline_value; the others alike
                       const float* __restrict__ r_bitline, const float* __restrict__ r_source,
                       const float* __restrict__ r_sink, float* __restrict__ parts, float* __restrict__ coarse,
                       float* __restrict__ strength, float* __restrict__ segments, float* __restrict__ ends,
                       float wordline_value, float bitline_value, float source_value, float sink_value, int rows,
                       int cols, int k) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int high = (rows + k - 1) / k, wide = (cols + k - 1) / k, pad = high * k - rows;
  const float* const from = g + (i64)blockIdx.x * rows * cols;
  const float* const alone = ladder + (i64)blockIdx.x * rows * cols;
  float* const along = strength + (i64)blockIdx.x * (rows + cols);
  float* const part = parts + (i64)blockIdx.x * 2 * high * cols;
  for (int r = warp; r < rows; r += WARPS) {
    const float* const line = alone + (i64)r * cols;
    float sum = 0.0f;
#pragma unroll 4
    for (int c = lane; c < cols; c += 32) sum += line[c];
    sum = warp_sum(sum);
    if (lane == 0) along[r] = sum;
  }
  const int strips = (cols + 31) / 32;
  for (int piece = warp; piece < high * strips; piece += WARPS) {
    const int block = piece / strips, c = piece % strips * 32 + lane;
    if (c >= cols) continue;
    const int first = block * k < pad ? 0 : block * k - pad, last = (block + 1) * k - pad;
    const i64 start = (i64)first * cols + c;
    const float *a = alone + start, *b = from + start;
    float sum = 0.0f, cells = 0.0f;
#pragma unroll 8
    for (int r = first; r < last; ++r, a += cols, b += cols) sum += *a, cells += *b;
    part[block * cols + c] = sum;
    part[(high + block) * cols + c] = cells;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    float sum = 0.0f;
    for (int block = 0; block < high; ++block) sum += part[block * cols + c];
    along[rows + c] = sum;
  }
  for (int cell = threadIdx.x; cell < high * wide; cell += blockDim.x) {
    const int left = cell % wide * k, right = left + k < cols ? left + k : cols;
    const float* const block = part + (high + cell / wide) * cols;
    float sum = 0.0f;
    for (int c = left; c < right; ++c) sum += block[c];
    coarse[(i64)blockIdx.x * high * wide + cell] = sum;
  }
  if (blockIdx.x || threadIdx.x >= 2 * SIDE) return;
  const bool down = threadIdx.x >= SIDE;  // a bitline, else a wordline
  const int block = threadIdx.x % SIDE, before = down ? 0 : pad, count = down ? cols : rows;
  if (block >= (down ? wide : high)) return;
  const int first = block * k < before ? 0 : block * k - before;
  const int last = (block + 1) * k - before < count ? (block + 1) * k - before : count;
  const float segment = block_mean(down ? r_bitline : r_wordline, down ? bitline_value : wordline_value, first, last);
  segments[threadIdx.x] = segment;
  ends[threadIdx.x] =
      coarse_end(block_mean(down ? r_sink : r_source, down ? sink_value : source_value, first, last), segment, k);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    mean_field(const float* __restrict__ coarse, const float* __restrict__ strength, const float* __restrict__ segments,
               const float* __restrict__ ends, const float* __restrict__ q,
               float* __restrict__ g_eff,  // [T, R, C] S: the ladder, to which the coupling is added
               int rows, int cols, int k) {
  __shared__ float cells[SIDE * SIDE], along[SIDE * SIDE], down[SIDE * SIDE], smooth[SIDE][SIDE];
  __shared__ float sums[2 * SIDE];  // strengths of the coarse lines
  const int me = threadIdx.x;
  const int high = (rows + k - 1) / k, wide = (cols + k - 1) / k, pad = high * k - rows;
  const float* const own = strength + (i64)blockIdx.x * (rows + cols);
  if (me < high * wide) cells[me] = coarse[(i64)blockIdx.x * high * wide + me];
  __syncthreads();
  if (me < high) walk(cells + me * wide, along + me * wide, wide, 1, ends[me], segments[me]);
  if (me >= 32 && me < 32 + wide) {
    const int c = me - 32, last = (high - 1) * wide + c;
    walk(cells + last, down + last, high, -wide, ends[SIDE + c], segments[SIDE + c]);
  }
  if (me >= 64 && me < 64 + 2 * SIDE) {
    const int block = (me - 64) % SIDE;
    const bool column = me >= 64 + SIDE;
    const int before = column ? 0 : pad, count = column ? cols : rows;
    float sum = 0.0f;
    for (int i = block * k - before; i < (block + 1) * k - before; ++i)
      if (i >= 0 && i < count) sum += own[(column ? rows : 0) + i];
    sums[me - 64] = sum;
  }
  __syncthreads();
  if (me < high * wide) {
    const int r = me / wide, c = me % wide;
    const float through = -q[(i64)blockIdx.x * 4096 + (i64)(SIDE - high + r) * 64 + 32 + c];
    const float scale = sums[r] * sums[SIDE + c];
    smooth[r][c] = scale > 0.0f ? (through - cells[me] * along[me] * down[me]) / scale : 0.0f;
  }
  __syncthreads();
  // A warp has 32 bitlines from the middle of a block to that of the next, or to the tile's edge.
  const int lane = me & 31, strips = (cols + 31) / 32, gaps = high > 1 ? high - 1 : 1;
  for (int piece = me >> 5; piece < gaps * strips; piece += WARPS) {
    const int low = piece / strips, next = low + 1 < high ? low + 1 : low, c = piece % strips * 32 + lane;
    if (c >= cols) continue;
    const Between x = between(c, k, wide);
    const int right = x.low + 1 < wide ? x.low + 1 : x.low;
    const float here = own[rows + c] * fma(x.share, smooth[low][right] - smooth[low][x.low], smooth[low][x.low]);
    const float there = own[rows + c] * fma(x.share, smooth[next][right] - smooth[next][x.low], smooth[next][x.low]);
    const int first = low ? (2 * low + 1) * k / 2 - pad : 0, last = low + 1 < gaps ? (2 * low + 3) * k / 2 - pad : rows;
    float* cell = g_eff + ((i64)blockIdx.x * rows + first) * cols + c;
    const float step = 1.0f / (float)k, begin = ((float)(first + pad) + 0.5f) * step - 0.5f - (float)low;
#pragma unroll 4
    for (int i = 0; i < last - first; ++i, cell += cols) {
      const float share = max(0.0f, min(1.0f, fma((float)i, step, begin)));
      *cell = fma(own[first + i], fma(share, there - here, here), *cell);
    }
  }
}

}  // namespace gpuxbar
