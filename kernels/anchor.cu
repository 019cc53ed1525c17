// anchor: which tiles are solved anew, and what is remembered of them, decided in device memory.
//
// Order   anchor_drift, anchor_choose; for the chosen tiles, some at a time: anchor_gather, an exact solution,
//         anchor_commit; then anchor_apply. One stream, nothing waits for the host.
// Axes    tiles [T, N], N = R * C cells; of them B at most are solved at an update.
// Launch  anchor_drift, anchor_gather, anchor_commit: a block of 256 threads a tile; anchor_choose: a thread a tile;
//         anchor_apply: 1-D grid-stride. Every sum is made in a fixed order.
// Wrapper gpuxbar/ops/anchored_conductance_cuda.py      Oracle the NumPy path of gpuxbar/ops/anchored_conductance.py
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

constexpr int WARPS = 8;

GPUXBAR_FN float block_sum(float x, float* sums) {
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < WARPS; ++w) total += sums[w];
  __syncthreads();
  return total;
}

// |a - b| / |b| from the sums of squares; 0 where both are 0.
GPUXBAR_FN float relative(float apart, float size) { return sqrt_fast(apart / max(size, 1e-30f)); }

extern "C" __global__ void __launch_bounds__(256)
    anchor_drift(const float* __restrict__ g, const float* __restrict__ start,  // [T, N] S: now, and when last solved
                 const float* __restrict__ slope,                               // [T] error per drift
                 const int* __restrict__ moved,  // [1] whether there is an update, or null: there is
                 float* __restrict__ error,      // [T] estimate
                 int* __restrict__ age,          // [T] updates since the last solution; negative: none yet
                 float* __restrict__ drift,      // [T]
                 float* __restrict__ urgency,    // [T] 1 or above: due
                 int cells, int interval, float tolerance, float far,
                 int every)  // every tile is due, as if none were solved
{
  __shared__ float sums[WARPS];
  const i64 tile = blockIdx.x;
  float apart = 0.0f, size = 0.0f;
  for (int e = threadIdx.x; e < cells; e += blockDim.x) {
    const float b = start[tile * cells + e], off = g[tile * cells + e] - b;
    apart = fma(off, off, apart);
    size = fma(b, b, size);
  }
  apart = block_sum(apart, sums);
  size = block_sum(size, sums);
  if (threadIdx.x) return;
  const float gone = relative(apart, size);
  drift[tile] = gone;
  if (moved && !*moved) {
    urgency[tile] = 0.0f;
    return;
  }
  const int old = every || age[tile] < 0 ? -1 : age[tile] + 1;
  const float estimate = slope[tile] * gone;
  age[tile] = old;
  error[tile] = estimate;
  float most = (float)old / (float)interval;  // NaN is never more
  if (estimate / tolerance > most) most = estimate / tolerance;
  if (gone / far > most) most = gone / far;
  if (gone == 0.0f) most = 0.0f;  // where it was solved
  urgency[tile] = old < 0 ? bits_float(0x7F800000u) : most;
}

// The tile at each place in the order of urgency, equal ones by their number.
extern "C" __global__ void __launch_bounds__(256)
    anchor_choose(const float* __restrict__ urgency, int* __restrict__ chosen,  // [B]
                  int tiles, int most) {
  __shared__ float others[256];
  const int tile = blockIdx.x * blockDim.x + threadIdx.x;
  const float own = tile < tiles ? urgency[tile] : 0.0f;
  int place = 0;
  for (int first = 0; first < tiles; first += 256) {
    const int count = tiles - first < 256 ? tiles - first : 256;
    if (threadIdx.x < count) others[threadIdx.x] = urgency[first + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < count; ++i) place += others[i] > own || (others[i] == own && first + i < tile);
    __syncthreads();
  }
  if (tile < tiles && place < most) chosen[place] = tile;
}

extern "C" __global__ void __launch_bounds__(256)
    anchor_gather(const float* __restrict__ g, const int* __restrict__ chosen, float* __restrict__ gathered,
                  int cells) {
  const i64 from = (i64)chosen[blockIdx.x] * cells, to = (i64)blockIdx.x * cells;
  for (int e = threadIdx.x; e < cells; e += blockDim.x) gathered[to + e] = g[from + e];
}

extern "C" __global__ void __launch_bounds__(256)
    anchor_commit(const float* __restrict__ exact,          // [b, N] S: of the chosen tiles
                  const float* __restrict__ g,              // [T, N] S
                  const float* __restrict__ approximation,  // [T, N] S
                  const int* __restrict__ chosen,           // [b]
                  const float* __restrict__ drift, const float* __restrict__ urgency, float* __restrict__ offset,
                  float* __restrict__ start, float* __restrict__ slope, float* __restrict__ error,
                  int* __restrict__ age, int cells, int interval,
                  float least)  // drift below which nothing is learned
{
  __shared__ float sums[WARPS];
  const i64 tile = chosen[blockIdx.x];
  if (!(urgency[tile] >= 1.0f)) return;
  const float* const solved = exact + (i64)blockIdx.x * cells;
  float apart = 0.0f, size = 0.0f;
  for (int e = threadIdx.x; e < cells; e += blockDim.x) {
    const i64 at = tile * cells + e;
    const float off = max(approximation[at] + offset[at], 0.0f) - solved[e];
    apart = fma(off, off, apart);
    size = fma(solved[e], solved[e], size);
    offset[at] = solved[e] - approximation[at];
    start[at] = g[at];
  }
  apart = block_sum(apart, sums);
  size = block_sum(size, sums);
  if (threadIdx.x) return;
  const int old = age[tile];
  if (old >= 0 && drift[tile] > least) slope[tile] = relative(apart, size) / drift[tile];
  error[tile] = 0.0f;
  age[tile] = old < 0 ? (int)(tile % interval) : 0;  // first all at once, then 1 / interval of them an update
}

extern "C" __global__ void __launch_bounds__(256)
    anchor_apply(float* __restrict__ g_eff,  // [T, N] S: the approximation, corrected in place
                 const float* __restrict__ offset, i64 size) {
  const i64 stride = (i64)gridDim.x * blockDim.x;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const float x = g_eff[e] + offset[e];
    g_eff[e] = x < 0.0f ? 0.0f : x;  // NaN stays
  }
}

}  // namespace gpuxbar
