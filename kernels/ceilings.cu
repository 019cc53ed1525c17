// ceilings: how fast what a fused read is made of runs alone, with operands at hand: its bounds, for the proof on a GPU.
//
// Axes    a thread does `rounds` times the same; out [threads of the grid]
// Launch  any number of blocks of 256 threads. Shared memory (dynamic): 1024 + 16384 + 8 for UNIT 4, else none.
// Random  UNIT 1 and 2 draw at counter {thread, round, 0, 0}; UNIT 0 makes each counter of the words before
// Macros  UNIT 0 words of Philox-10 (integer products); 1 exact and 2 fast normals (special functions too); 3 mma.sync of
//         fp16 from registers (sm_80 and later), 4 wgmma of fp16 from shared memory (sm_90a)
// Wrapper gpuxbar/bench/ceilings.py      Oracle the same file, in NumPy
#include "gpuxbar/mma.cuh"
#include "gpuxbar/normal.cuh"
#include "gpuxbar/panels.cuh"

#ifndef UNIT
#define UNIT 0
#endif
#if UNIT == 4
#include "gpuxbar/wgmma.cuh"
#endif

extern __shared__ __align__(1024) unsigned char gx_smem[];

namespace gpuxbar {

using Operand = u16;

template <int COUNT>
GPUXBAR_FN float total(const float (&x)[COUNT]) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < COUNT; ++e) sum += x[e];
  return sum;
}

extern "C" __global__ void __launch_bounds__(256)
    ceilings(const Operand* __restrict__ a,  // UNIT 3 [16, 16], UNIT 4 a panel [128, 64] (panels.cuh), fp16; else null
             u32* __restrict__ out,          // words combined by xor, or a float: sum of the thread's results
             u64 seed, int rounds) {
  const u32 thread = blockIdx.x * 256 + threadIdx.x;
#if UNIT == 0
  Counter c{thread, 0, 0, 0};
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) c = philox<10>(c, (u32)seed, (u32)(seed >> 32));
  out[thread] = c.x ^ c.y ^ c.z ^ c.w;
#elif UNIT == 1 || UNIT == 2
  float sum = 0.0f;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const Counter c{thread, (u32)round, 0, 0};
#if UNIT == 1
    sum += total(normals4(c, (u32)seed, (u32)(seed >> 32)).z);
#else
    sum += total(normals8_fast(c, (u32)seed, (u32)(seed >> 32)).z);
#endif
  }
  out[thread] = float_bits(sum);
#elif UNIT == 3
  // a times the transpose of its first eight rows
  const u32 lane = threadIdx.x & 31;
  u32 left[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) left[e] = *(const u32*)(a + (lane / 4 + e % 2 * 8) * 16 + 2 * (lane % 4) + e / 2 * 8);
  constexpr int CHAINS = 8;  // products of a warp that do not wait for each other
  float sums[CHAINS][4] = {};
#pragma unroll 1
  for (int round = 0; round < rounds; ++round)
#pragma unroll
    for (int chain = 0; chain < CHAINS; ++chain) multiply_half(sums[chain], left, left[0], left[2]);
  float sum = 0.0f;
#pragma unroll
  for (int chain = 0; chain < CHAINS; ++chain) sum += total(sums[chain]);
  out[thread] = float_bits(sum);
#else
  // a times its transpose, 64 rows a warpgroup
  const u32 panel = (shared_address(gx_smem) + 1023) & ~1023u, landed = panel + 2 * PANEL;
  if (threadIdx.x == 0) {
    barrier_init(landed, 1);
    barrier_fence();
    barrier_expect(landed, 2 * PANEL);
    copy_bulk(panel, a, 2 * PANEL, landed);
  }
  __syncthreads();
  barrier_wait(landed, 0);
  const u64 left = descriptor(panel + threadIdx.x / 128 * PANEL), right = descriptor(panel);
  float sums[64] = {};
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    products_fence();
#pragma unroll
    for (int part = 0; part < PANEL_LINES / 16; ++part)
      multiply_warpgroup(sums, left + 2 * part, right + 2 * part, round || part);
    products_commit();
    products_wait<0>();  // other warpgroups multiply meanwhile
  }
  out[thread] = float_bits(total(sums));
#endif
}

}  // namespace gpuxbar
