// conductance_leaf_gradient: from the gradients of leaves of 16 x 16 cells to those of their cells, in shared memory.
//
// Axes    grad_q [T, leaves, 64, 64] as conductance_leaf orders q; symmetric, of the last 16 rows the first 48 columns are
//         not read. grad_g [T, R, C].
// Launch  one block of 256 threads a leaf, 62 KB of dynamic shared memory; grid T * leaves. Every output is the work of
//         one thread in a fixed order.
// Wrapper gpuxbar/ops/effective_conductance_gradient_cuda.py      Oracle gpuxbar/reference/wire_currents.py
#include "gpuxbar/leaf.cuh"

extern __shared__ __align__(1024) unsigned char gx_smem[];

namespace gpuxbar {

constexpr int MOST = 4608;  // largest level of blocks
constexpr int WORK = 2048;  // of a merge, and of the products below

// `grad`, gradients of all merged blocks, becomes those of their parts `q` (what a merge_level of the same arguments
// reads); `q` and `other` are used up. With B = [[B1, 0], [0, B2]], the joined sides' columns, and T = [[A F, -F'], [-F,
// -F Z]], the joined sides see B T of the merged block's ports, so that theirs are T' (B' D B) T and D B T.
template <int LEVEL>
__device__ __forceinline__ void split_level(float* q, float* other, float* grad, float* work, Next next) {
  using L = Level<LEVEL>;
  constexpr int PAIRS = L::PAIRS, S = L::S, K = L::K, E = L::E, N = 2 * E, EACH = 2 * PAIRS * S * K / THREADS;
  static_assert(L::ROWS + L::COLS == E && 2 * PAIRS * S * K % THREADS == 0);
  float* const side = q;                   // [PAIRS, 2, S, K] the joined sides' columns of q
  float* const t = q + 2 * PAIRS * S * K;  // [PAIRS, 2 K, 2 K] T
  float* const h = t + PAIRS * 4 * K * K;  // [PAIRS, 2 K, 2 K] B' D B
  float* const d = other;                  // [PAIRS, N, N] D, ports of block 0 before those of block 1
  float* const u = work;                   // [PAIRS, N, 2 K] D B
  float* const f = work;                   // [PAIRS, K, K] F = (1 + Z A)^-1, before u
  float* const g = work;                   // [PAIRS, 2 K, 2 K] B' D B T, after u
  static_assert(2 * PAIRS * S * K + 8 * PAIRS * K * K <= MOST && PAIRS * N * 2 * K <= WORK);
  const int me = this_thread();

  float own[EACH];
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int e = n * THREADS + me;
    own[n] = q[e / K * S + E + e % K];
  }
  for_each<PAIRS * N * N>([=](int e) {
    const int pair = e / (N * N);
    const Place i = port_of<LEVEL>(e / N % N, pair, next), j = port_of<LEVEL>(e % N, pair, next);
    d[(pair * N + i.block * E + i.at) * N + j.block * E + j.at] = grad[e];
  });
  __syncthreads();
#pragma unroll
  for (int n = 0; n < EACH; ++n) side[n * THREADS + me] = own[n];
  __syncthreads();

  for_each<PAIRS * K * K>([=](int e) {
    const float* const q1 = side + (e / (K * K) * 2 * S + E) * K;
    const int i = e / K % K, j = e % K;
    f[e] = (i == j ? 1.0f : 0.0f) - dot<K>(q1 + i * K, 1, q1 + S * K + j, K);
  });
  __syncthreads();
  invert_all<PAIRS, K>(f, f + PAIRS * K * K);
  for_each<PAIRS * K * K>([=](int e) {
    const int pair = e / (K * K), i = e / K % K, j = e % K;
    const float* const q1 = side + (2 * pair * S + E) * K;
    const float* const own_f = f + pair * K * K;
    float* const to = t + pair * 4 * K * K;
    to[i * 2 * K + j] = dot<K>(q1 + (S + i) * K, 1, own_f + j, K);
    to[j * 2 * K + K + i] = -f[e];
    to[(K + i) * 2 * K + j] = -f[e];
    to[(K + i) * 2 * K + K + j] = dot<K>(own_f + i * K, 1, q1 + j, K);
  });
  __syncthreads();
  for_each<PAIRS * N * 2 * K>([=](int e) {
    const int row = e / (2 * K), pair = row / N, block = e / K % 2, j = e % K;
    u[e] = dot<E>(d + row * N + block * E, 1, side + (2 * pair + block) * S * K + j, K);
  });
  __syncthreads();
  for_each<PAIRS * 4 * K * K>([=](int e) {
    const int block = e / (2 * K * K), i = e / (2 * K) % K, j = e % (2 * K);  // of all pairs
    h[e] = dot<E>(side + block * S * K + i, K, u + block * E * 2 * K + j, 2 * K);
  });
  for_each<2 * PAIRS * E * S>([=](int e) {
    const int row = e / S, block = row / E, pair = block / 2, half = block % 2, i = row % E, j = e % S;
    float* const to = grad + block * S * S;
    if (j < E) {
      to[i * S + j] = d[row * N + half * E + j];
    } else {
      const float across = dot<2 * K>(u + row * 2 * K, 1, t + pair * 4 * K * K + half * K + j - E, 2 * K);
      to[i * S + j] = across;
      to[j * S + i] = across;
    }
  });
  __syncthreads();
  for_each<PAIRS * 4 * K * K>([=](int e) {
    const int row = e / (2 * K), pair = row / (2 * K), j = e % (2 * K);
    g[e] = dot<2 * K>(h + row * 2 * K, 1, t + pair * 4 * K * K + j, 2 * K);
  });
  __syncthreads();
  for_each<2 * PAIRS * K * K>([=](int e) {
    const int block = e / (K * K), pair = block / 2, half = block % 2, i = e / K % K, j = e % K;
    grad[(block * S + E + i) * S + E + j] =
        dot<2 * K>(t + (block * K + i) * 2 * K, 1, g + pair * 4 * K * K + half * K + j, 2 * K);
  });
  __syncthreads();
}

// The level of that number, LEVEL or below; of blocks where `merge_levels` leaves them.
template <int LEVEL = LAST>
__device__ __forceinline__ void split(int level, float* a, float* b, float* grad, float* work, Next next) {
  if (level == LEVEL)
    split_level<LEVEL>(LEVEL % 2 ? b : a, LEVEL % 2 ? a : b, grad, work, next);
  else if constexpr (LEVEL > 0)
    split<LEVEL - 1>(level, a, b, grad, work, next);
}

extern "C" __global__ void __launch_bounds__(256)
    conductance_leaf_gradient(const float* __restrict__ g,           // [T, R, C] S
                              const float* __restrict__ r_wordline,  // [R] ohm, or null: wordline_value; others alike
                              const float* __restrict__ r_bitline, const float* __restrict__ r_source,
                              const float* __restrict__ r_sink, const float* __restrict__ grad_q,
                              float* __restrict__ grad_g, float wordline_value, float bitline_value, float source_value,
                              float sink_value, int rows, int cols, int high_bits,
                              int wide_bits)  // leaves: 2^high_bits x 2^wide_bits
{
  float* const a = (float*)gx_smem;
  float* const b = a + MOST;
  float* const grad = b + MOST;
  float* const work = grad + MOST;
  const i64 tile = blockIdx.x >> (high_bits + wide_bits);
  const int leaf = (int)(blockIdx.x & ((1u << (high_bits + wide_bits)) - 1));
  const Leaf at = leaf_place(leaf, high_bits, wide_bits);
  const Wires wires{r_wordline, r_bitline, r_source, r_sink, wordline_value, bitline_value, source_value, sink_value};
  const LeafCell cell = leaf_cell(g + tile * rows * cols, wires, at, rows, cols, (LEAF << high_bits) - rows);
  for (int e = threadIdx.x; e < 4096; e += THREADS) {
    const int i = e / 64, j = e % 64;
    grad[e] = grad_q[(i64)blockIdx.x * 4096 + (i >= 48 && j < 48 ? j * 64 + i : e)];
  }
  for (int level = LAST; level >= 0; --level) {
    cell_level(cell, a);
    merge_levels(level, a, b, work);  // what the parts have behind them, made again: that takes no memory
    split(level, a, b, grad, work, Next{wide_bits > 0, (leaf & 1) != 0});
  }
  if (cell.row < 0 || cell.col >= cols) return;
  float voltage[4], sum = 0.0f;
  cell_voltage(cell.device, cell.left, cell.below, voltage);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float vi = cell.second ? voltage[cell_side(i, true)] : voltage[cell_side(i, false)];
      const float vj = cell.second ? voltage[cell_side(j, true)] : voltage[cell_side(j, false)];
      sum = fma(vi * vj, grad[threadIdx.x * 16 + i * 4 + j], sum);
    }
  grad_g[(tile * rows + cell.row) * cols + cell.col] = sum;
}

}  // namespace gpuxbar
