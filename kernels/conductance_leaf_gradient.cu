// conductance_leaf_gradient: from the gradients of leaves of 16 x 16 cells to those of their cells, in shared memory.
//
// Axes    grad_q [T, leaves, 64, 64] as conductance_leaf orders q; symmetric, of the last 16 rows the first 48 columns are
//         not read. grad_g [T, R, C].
// Launch  one block of 128 threads a leaf, 68 KB of dynamic shared memory; grid T * leaves. Every output is the work of
//         one thread in a fixed order.
// Wrapper gpuxbar/ops/effective_conductance_gradient_cuda.py      Oracle gpuxbar/reference/wire_currents.py
#include "gpuxbar/leaf.cuh"

extern __shared__ __align__(1024) unsigned char gx_smem[];

namespace gpuxbar {

constexpr int MOST = 5120;  // largest level of blocks
constexpr int WORK = 2048;  // of a merge, and of the products below
static_assert(MERGE_WORK <= WORK);

// `grad`, gradients of all merged blocks, becomes those of their parts `q` (what a merge_level of the same arguments
// reads); `q` and `other` are used up. With B = [[B1, 0], [0, B2]], the joined sides' columns, and T = [[A F, -F'], [-F,
// -F Z]], the joined sides see B T of the merged block's ports, so that theirs are T' (B' D B) T and D B T. D, T and B' D B are
// symmetric: their columns are read as rows.
template <int LEVEL>
__device__ __forceinline__ void split_level(float* q, float* other, float* grad, float* work, Next next) {
  using L = Level<LEVEL>;
  constexpr int PAIRS = L::PAIRS, S = L::S, K = L::K, E = L::E, N = 2 * E, EACH = 2 * PAIRS * S * K / THREADS;
  constexpr int ROWS = N % 4 ? 2 : 4, HIGH = K < 4 ? K : 4, WIDE = K < 2 ? 2 : 4;  // of squares: of N, of K, of 2 K
  static_assert(L::ROWS + L::COLS == E && 2 * PAIRS * S * K % THREADS == 0);
  float* const side = q;                   // [PAIRS, 2, S, K] the joined sides' columns of q
  float* const t = q + 2 * PAIRS * S * K;  // [PAIRS, 2 K, 2 K] T
  float* const h = t + PAIRS * 4 * K * K;  // [PAIRS, 2 K, 2 K] B' D B
  float* const d = other;                  // [PAIRS, N, N] D, ports of block 0 before those of block 1
  float* const u = work;                   // [PAIRS, N, 2 K] D B
  float* const f = work;                   // [PAIRS, K, K] F = (1 + Z A)^-1, before u
  float* const g = work;                   // [PAIRS, 2 K, 2 K] B' D B T, after u
  static_assert(2 * PAIRS * S * K + 8 * PAIRS * K * K <= MOST && PAIRS * N * 2 * K <= WORK);
  constexpr int G = L::G;
  __shared__ u16 ports[2][N / G];  // of groups of neighbours, of even pairs, then of odd ones: where they lie in D
  const int me = this_thread();

  float own[EACH];
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int e = n * THREADS + me;
    own[n] = q[e / (K * S) * L::SIZE + e / K % S * S + E + e % K];
  }
  for_each<2 * N / G>([=](int e) {
    const int odd = e / (N / G), group = e % (N / G);
    const Place place = port_of<LEVEL>(group * G, odd, next);
    ports[odd][group] = (u16)(place.block * E + place.at);
  });
  solve_joints<LEVEL>(q, f);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < EACH; ++n) side[n * THREADS + me] = own[n];
  for_each<PAIRS * N * N / G>([=](int e) {
    const int row = e / (N / G), pair = row / N, i = row % N, j = e % (N / G);
    float own[G];
    load(grad + e * G, own);
    store(d + (pair * N + ports[pair & 1][i / G] + i % G) * N + ports[pair & 1][j], own);
  });
  __syncthreads();

  for_each<2 * PAIRS * K>([=](int e) {  // columns of A F and -F, then of -F' and -F Z
    const int pair = e / (2 * K), j = e % K;
    const bool second = e / K % 2;
    const float* const own_f = f + pair * K * K;
    const float* const joint = side + ((2 * pair + !second) * S + E) * K;  // of the other block
    const float *const in = second ? joint : own_f, *const through = second ? own_f : joint;
    float* const to = t + pair * 4 * K * K + e % (2 * K);
    float v[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      v[k] = in[k * K + j];
      to[((second ? 0 : K) + k) * 2 * K] = -own_f[second ? j * K + k : k * K + j];
    }
    apply<K>([=](int i, float (&row)[K]) { load(through + i * K, row); }, v);
#pragma unroll
    for (int k = 0; k < K; ++k) to[((second ? K : 0) + k) * 2 * K] = v[k];
  });
  __syncthreads();
  for_each<PAIRS * N * 2 * K / (ROWS * HIGH)>([=](int e) {
    constexpr int ACROSS = 2 * K / HIGH;
    const int row = e / ACROSS * ROWS, pair = row / N, col = e % ACROSS * HIGH, block = col / K;
    float sum[ROWS][HIGH] = {};
    multiply<E>(d + (pair * N + block * E) * N + row % N, N, side + (2 * pair + block) * S * K + col % K, K, sum);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) store(u + (row + r) * 2 * K + col, sum[r]);
  });
  __syncthreads();
  for_each<PAIRS * 4 * K * K / (HIGH * WIDE)>([=](int e) {
    constexpr int ACROSS = 2 * K / WIDE;
    const int row = e / ACROSS * HIGH, block = row / K, col = e % ACROSS * WIDE;  // of all pairs
    float sum[HIGH][WIDE] = {};
    multiply<E>(side + block * S * K + row % K, K, u + block * E * 2 * K + col, 2 * K, sum);
#pragma unroll
    for (int r = 0; r < HIGH; ++r) store(h + (row + r) * 2 * K + col, sum[r]);
  });
  for_each<2 * PAIRS * E * E / G>([=](int e) {
    const int row = e / (E / G), block = row / E, j = e % (E / G) * G;
    float own[G];
    load(d + row * N + block % 2 * E + j, own);
    store(grad + block * S * S + row % E * S + j, own);
  });
  for_each<2 * PAIRS * E * K / HIGH>([=](int e) {
    constexpr int ACROSS = K / HIGH;
    const int row = e / ACROSS, block = row / E, pair = block / 2, i = row % E, col = e % ACROSS * HIGH;
    float sum[1][HIGH] = {};
    multiply<2 * K>(u + row * 2 * K, 1, t + pair * 4 * K * K + block % 2 * K + col, 2 * K, sum);
    float* const to = grad + block * S * S;
    store(to + i * S + E + col, sum[0]);
#pragma unroll
    for (int c = 0; c < HIGH; ++c) to[(E + col + c) * S + i] = sum[0][c];
  });
  __syncthreads();
  for_each<PAIRS * 4 * K * K / (HIGH * WIDE)>([=](int e) {
    constexpr int ACROSS = 2 * K / WIDE;
    const int row = e / ACROSS * HIGH, pair = row / (2 * K), col = e % ACROSS * WIDE;
    float sum[HIGH][WIDE] = {};
    multiply<2 * K>(h + pair * 4 * K * K + row % (2 * K), 2 * K, t + pair * 4 * K * K + col, 2 * K, sum);
#pragma unroll
    for (int r = 0; r < HIGH; ++r) store(g + (row + r) * 2 * K + col, sum[r]);
  });
  __syncthreads();
  for_each<2 * PAIRS * K * K / (HIGH * HIGH)>([=](int e) {
    constexpr int ACROSS = K / HIGH;
    const int row = e / ACROSS * HIGH, block = row / K, pair = block / 2, col = e % ACROSS * HIGH;
    const int to_row = row % K, from = pair * 4 * K * K + block % 2 * K;
    float sum[HIGH][HIGH] = {};
    multiply<2 * K>(t + from + to_row, 2 * K, g + from + col, 2 * K, sum);
#pragma unroll
    for (int r = 0; r < HIGH; ++r) store(grad + (block * S + E + to_row + r) * S + E + col, sum[r]);
  });
  __syncthreads();
}

// The level of that number, LEVEL or below; of blocks in `a` or, of an odd level, in `b`.
template <int LEVEL = LAST>
__device__ __forceinline__ void split(int level, float* a, float* b, float* grad, float* work, Next next) {
  if (level == LEVEL)
    split_level<LEVEL>(LEVEL % 2 ? b : a, LEVEL % 2 ? a : b, grad, work, next);
  else if constexpr (LEVEL > 0)
    split<LEVEL - 1>(level, a, b, grad, work, next);
}

extern "C" __global__ void __launch_bounds__(128, 3)
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
  const LeafCells cells{g + tile * rows * cols, wires, at, rows, cols, (LEAF << high_bits) - rows};
  for (int e = threadIdx.x; e < 4096; e += THREADS) {
    const int i = e / 64, j = e % 64;
    grad[e] = grad_q[(i64)blockIdx.x * 4096 + (i >= 48 && j < 48 ? j * 64 + i : e)];
  }
  for (int level = LAST; level >= 0; --level) {  // what the parts have behind them, made again: that takes no memory
    if (level == 0) {
      low_level<0>(cells, a);
    } else if (level == 1) {
      low_level<1>(cells, b);
    } else {
      low_level<2>(cells, a);
      merge_levels(level, a, b, work);
    }
    split(level, a, b, grad, work, Next{wide_bits > 0, (leaf & 1) != 0});
  }
  for_each<LEAF * LEAF>([=](int number) {
    const LeafCell cell = cells(number);
    if (cell.row < 0 || cell.col >= cols) return;
    const bool second = number & 1;
    float voltage[4], sum = 0.0f;
    cell_voltage(cell.device, cell.left, cell.below, voltage);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float vi = second ? voltage[cell_side(i, true)] : voltage[cell_side(i, false)];
        const float vj = second ? voltage[cell_side(j, true)] : voltage[cell_side(j, false)];
        sum = fma(vi * vj, grad[number * 16 + i * 4 + j], sum);
      }
    grad_g[(tile * rows + cell.row) * cols + cell.col] = sum;
  });
}

}  // namespace gpuxbar
